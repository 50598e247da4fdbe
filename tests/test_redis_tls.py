"""Redis over TLS: real handshakes at a TLS end before a real server, whose build has none."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared.errors import ConfigError, StartError, StreamError
from shared.redis_connection import AWAY, check_server, connect, translated
from shared.redis_stream import open_streams
from shared.stream import Bounds
from tests.certificates import Authority, write_credentials

pytestmark = pytest.mark.integration

SECONDS = 120.0
PAST = {"valid_from": timedelta(days=-2), "valid_until": timedelta(days=-1)}


@dataclass
class TlsEnd:
    """Takes TLS on a port of 127.0.0.1, and passes on to the server's socket."""

    socket: str
    folder: Path
    asks_clients: bool = False
    port: int = 0
    links: set[asyncio.StreamWriter] = field(default_factory=set)

    def context(self) -> ssl.SSLContext:
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.folder / "ca.crt")
        made.load_cert_chain(self.folder / "tls.crt", self.folder / "tls.key")
        made.verify_mode = ssl.CERT_REQUIRED if self.asks_clients else ssl.CERT_NONE
        return made

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(
            self._link, "127.0.0.1", self.port, ssl=self.context(), reuse_address=True
        )
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for writer in self.links:
                writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind = await asyncio.open_unix_connection(self.socket)
        self.links |= {writer, behind}
        with contextlib.suppress(OSError):
            await asyncio.gather(_pass_on(reader, behind), _pass_on(behind_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
def ours() -> Authority:
    return Authority()


@pytest.fixture
def end(redis_url: str, ours: Authority, tmp_path: Path) -> TlsEnd:
    folder = write_credentials(tmp_path / "server", ours.issue("redis", ips=["127.0.0.1"]), ours)
    return TlsEnd(urlsplit(redis_url).path, folder)


def address(end: TlsEnd, client: Path, *, shows_certificate: bool = False) -> str:
    files = {"ssl_ca_certs": "ca.crt"}
    if shows_certificate:
        files |= {"ssl_certfile": "tls.crt", "ssl_keyfile": "tls.key"}
    query = "&".join(f"{name}={client / file}" for name, file in files.items())
    return f"rediss://127.0.0.1:{end.port}/0?{query}"


async def use(url: str) -> None:
    """What a service does first, and what its streams do."""
    bounds = Bounds(8, 1000)
    async with open_streams(
        url, run_id="tls", prompts=bounds, groups=bounds, timeout_seconds=SECONDS, retries=0
    ) as streams:
        assert await streams.prompts.put(b"a")
        [entry] = await streams.prompts.claim("me", count=1, wait_seconds=SECONDS)
        await streams.prompts.acknowledge([entry.id])


async def test_streams_work_over_tls(end: TlsEnd, ours: Authority, tmp_path: Path) -> None:
    client = write_credentials(tmp_path / "client", None, ours)
    async with end.serving():
        await use(address(end, client))


async def test_a_client_shows_its_certificate_where_the_server_asks(
    end: TlsEnd, ours: Authority, tmp_path: Path
) -> None:
    end.asks_clients = True
    client = write_credentials(tmp_path / "client", ours.issue("learner"), ours)
    async with end.serving():
        await use(address(end, client, shows_certificate=True))
        with pytest.raises(StartError, match=r"redis\.url = 'rediss://127"):
            await use(address(end, client))


@pytest.mark.parametrize(
    ("authority", "leaf", "words"),
    [
        ("another", {"ips": ["127.0.0.1"]}, "certificate verify failed"),
        ("ours", {"ips": ["127.0.0.1"], **PAST}, "certificate has expired"),
        ("ours", {"dns": ["redis.elsewhere"]}, "IP address mismatch"),
    ],
    ids=["another authority", "expired", "another host"],
)
async def test_a_server_that_is_not_ours_is_refused_with_the_files_named(
    end: TlsEnd, ours: Authority, tmp_path: Path, authority: str, leaf: Any, words: str
) -> None:
    signer = ours if authority == "ours" else Authority()
    write_credentials(end.folder, signer.issue("redis", **leaf), ours)
    client = write_credentials(tmp_path / "client", None, ours)
    named = f"no TLS with it .*{words}.*see that {re.escape(str(client / 'ca.crt'))}"
    async with end.serving():
        with pytest.raises(StartError, match=named):
            await use(address(end, client))


async def test_without_an_authority_of_ours_the_system_s_are_asked(end: TlsEnd) -> None:
    async with end.serving():
        with pytest.raises(StartError, match=r"no TLS with it .*see that \?ssl_ca_certs=FILE"):
            await use(f"rediss://127.0.0.1:{end.port}")


async def test_a_plain_client_gets_nothing_from_a_tls_port(end: TlsEnd) -> None:
    async with end.serving():
        with pytest.raises(StartError, match=r"redis\.url = 'redis://127.*no answer"):
            await use(f"redis://127.0.0.1:{end.port}")


async def test_a_tls_client_does_not_speak_plainly(
    redis_url: str, ours: Authority, tmp_path: Path
) -> None:
    client = write_credentials(tmp_path / "client", None, ours)

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.append(await reader.read(100))
        writer.write(b"-ERR what?\r\n")
        writer.close()

    said: list[bytes] = []
    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"rediss://rollout:a-password@127.0.0.1:{port}?ssl_ca_certs={client / 'ca.crt'}"
        with pytest.raises(StartError, match="no TLS with it"):
            await check_server(url, timeout_seconds=SECONDS)
    assert said
    assert not any(b"a-password" in each for each in said)


@pytest.mark.parametrize("broken", ["missing", "garbage"])
async def test_a_file_that_cannot_be_used_is_named(
    end: TlsEnd, tmp_path: Path, broken: str
) -> None:
    if broken == "garbage":
        (tmp_path / "ca.crt").write_text("not PEM")
    async with end.serving():
        with pytest.raises(StartError, match=f"see that {re.escape(str(tmp_path / 'ca.crt'))}"):
            await use(address(end, tmp_path))


@pytest.mark.parametrize("url", ["http://redis", "rediss://redis?ssl_ca=x", "redis"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"redis.url or REDIS_URL = {url!r}")):
        connect(url)


async def test_a_connection_after_a_rotation_uses_the_new_files(
    end: TlsEnd, ours: Authority, tmp_path: Path
) -> None:
    end.asks_clients = True
    folder = write_credentials(tmp_path / "client", ours.issue("learner"), ours)
    async with end.serving():
        client = connect(address(end, folder, shows_certificate=True), retries=0)
        await client.ping()
        await client.connection_pool.disconnect()
    new = Authority()
    write_credentials(end.folder, new.issue("redis", ips=["127.0.0.1"]), new)
    async with end.serving():
        refusal = pytest.raises(StreamError, match="certificate verify failed")
        with refusal as error, translated("key"):
            await client.ping()
        assert error.value.status == AWAY, "a rotation under way is waited for"
        write_credentials(folder, new.issue("learner"), ours, new)
        assert await client.ping()
    await client.aclose()
