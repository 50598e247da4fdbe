"""The links of the chaos runs do what the faults say of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.proxy import Proxy

PATIENCE_SECONDS = 120.0
MOMENT_SECONDS = 0.2


@dataclass
class Echo:
    """A server that answers with what it was sent, and remembers it."""

    received: bytes = b""
    came: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(100):
            self.received += chunk
            self.came.set()
            writer.write(chunk)
            await writer.drain()
        writer.close()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def of(cls, proxy: Proxy) -> Client:
        host, _, port = proxy.address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def hears(self, number: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(number), PATIENCE_SECONDS)

    async def hears_nothing(self) -> bool:
        try:
            return not await asyncio.wait_for(self.reader.read(1), MOMENT_SECONDS)
        except TimeoutError:
            return True

    async def is_cut(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(1), PATIENCE_SECONDS) == b""
        except ConnectionError:
            return True


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with Proxy(f"{host}:{port}") as link:
        yield link
    server.close()


async def test_bytes_pass_both_ways_unchanged(proxy: Proxy) -> None:
    client = await Client.of(proxy)
    sent = bytes(range(256)) * 1000
    client.writer.write(sent)
    assert await client.hears(len(sent)) == sent


async def test_the_upstream_may_be_a_unix_socket(echo: Echo, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = await asyncio.start_unix_server(echo.serve, str(path))
    async with Proxy(str(path)) as link:
        client = await Client.of(link)
        client.writer.write(b"hello")
        assert await client.hears(5) == b"hello"
    server.close()


async def test_a_cut_ends_every_connection_and_takes_new_ones(proxy: Proxy) -> None:
    clients = [await Client.of(proxy) for _ in range(3)]
    for client in clients:
        client.writer.write(b"a")
        await client.hears(1)
    proxy.cut()
    assert all([await client.is_cut() for client in clients])
    again = await Client.of(proxy)
    again.writer.write(b"b")
    assert await again.hears(1) == b"b"


async def test_a_stalled_link_takes_bytes_and_delivers_them_only_afterwards(
    proxy: Proxy, echo: Echo
) -> None:
    old = await Client.of(proxy)
    old.writer.write(b"a")
    await old.hears(1)
    async with proxy.stalled():
        new = await Client.of(proxy)
        old.writer.write(b"b")
        new.writer.write(b"c")
        assert await old.hears_nothing()
        assert await new.hears_nothing()
        assert echo.received == b"a"
    assert await old.hears(1) == b"b"
    assert await new.hears(1) == b"c"


async def test_a_slow_link_holds_each_way_back(proxy: Proxy) -> None:
    client = await Client.of(proxy)
    async with proxy.delayed(0.1):
        started = time.monotonic()
        client.writer.write(b"a")
        assert await client.hears(1) == b"a"
        assert time.monotonic() - started >= 2 * 0.1


async def test_lost_replies_leave_the_request_done_and_the_connection_cut(
    proxy: Proxy, echo: Echo
) -> None:
    client = await Client.of(proxy)
    async with proxy.losing_replies():
        client.writer.write(b"do it")
        await asyncio.wait_for(echo.came.wait(), PATIENCE_SECONDS)
        assert await client.hears_nothing()
    assert echo.received == b"do it"
    assert await client.is_cut()


async def test_a_client_is_cut_when_there_is_nobody_upstream() -> None:
    async with Proxy("127.0.0.1:1") as link:
        client = await Client.of(link)
        assert await client.is_cut()
