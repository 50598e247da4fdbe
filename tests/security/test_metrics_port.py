"""Who gets metrics, and what a kubelet learns without a token or a certificate."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import make_wsgi_app

from shared.errors import StartError
from shared.metrics.process import serve_metrics
from shared.metrics_server import MAX_CONNECTIONS, MetricsServer
from shared.roles import METRICS_NAME
from shared.rpc import PROGRESS
from shared.tls import Credentials
from tests.certificates import Authority, write_credentials
from tests.security.identities import credentials, leaf
from tests.security.services import CALL_SECONDS, SERVICES, serving

OURS = Authority("ours")
VERIFIER = SERVICES["verifier"].full_name


@contextmanager
def metrics(
    *, tls: Credentials | None = None, token: Path | None = None
) -> Iterator[MetricsServer]:
    server = serve_metrics(host="127.0.0.1", port=0, tls=tls, token_file=token)
    try:
        yield server
    finally:
        server.close()


def get(
    server: MetricsServer,
    path: str = "/metrics",
    *,
    authorization: str | None = None,
    trusted: ssl.SSLContext | None = None,
) -> tuple[int, str]:
    """Status and text."""
    scheme = "http" if trusted is None else "https"
    url = f"{scheme}://127.0.0.1:{server.port}{path}"
    return ask(url, authorization=authorization, trusted=trusted)


def status(url: str) -> int:
    return ask(url)[0]


def ask(
    url: str, *, authorization: str | None = None, trusted: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """Status and text."""
    headers = {} if authorization is None else {"Authorization": authorization}
    asked = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=CALL_SECONDS, context=trusted) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class _AsPrometheus(ssl.SSLContext):
    """With `server_name` in its `tls_config`."""

    def wrap_socket(self, *args: object, **kwargs: object) -> ssl.SSLSocket:
        return super().wrap_socket(*args, **{**kwargs, "server_hostname": METRICS_NAME})  # type: ignore[arg-type]


def trusting(authority: Authority) -> ssl.SSLContext:
    context = _AsPrometheus(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.certificate.decode())
    return context


@pytest.fixture(scope="module")
def sesame(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetricsServer]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("sesame\n")
    with metrics(token=token) as server:
        yield server


def test_without_a_token_file_everybody_gets_them() -> None:
    with metrics() as server:
        code, text = get(server)
    assert code == 200 and "isentrope_grpc_server_handled" in text


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer sesamf", 401),
        ("Bearer sesame2", 401),
        ("Basic sesame", 401),
        ("Bearer s\u00e9same", 401),
        ("Bearer sesame", 200),
        ("bearer  sesame", 200),
    ],
)
def test_with_one_only_who_knows_it_does(
    authorization: str | None, code: int, sesame: MetricsServer
) -> None:
    assert get(sesame, authorization=authorization)[0] == code


def test_a_new_token_is_good_at_once_and_the_old_one_no_more(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    with metrics(token=token) as server:
        assert get(server, authorization="Bearer old")[0] == 200
        token.write_text("new")
        assert get(server, authorization="Bearer old")[0] == 401
        assert get(server, authorization="Bearer new")[0] == 200
        token.unlink()
        assert get(server, authorization="Bearer new")[0] == 401
        assert get(server, authorization="Bearer ")[0] == 401


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), (" \n", "empty; write a tok")])
def test_a_token_file_without_a_token_is_refused(
    text: str | None, words: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    if text is not None:
        token.write_text(text)
    with pytest.raises(StartError, match=f"ISENTROPE_METRICS_TOKEN_FILE = {token}: {words}"):
        serve_metrics(host="127.0.0.1", port=0, token_file=token)


def test_over_tls_the_port_shows_one_name_for_all_roles_and_rotates(tmp_path: Path) -> None:
    theirs = Authority("theirs")
    with metrics(tls=credentials(tmp_path, OURS, "rollout")) as server:
        assert get(server, trusted=trusting(OURS))[0] == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(server, trusted=trusting(theirs))
        write_credentials(tmp_path / "rollout", leaf(theirs, "rollout"), theirs)
        assert get(server, trusted=trusting(theirs))[0] == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(server, trusted=trusting(OURS))


def expiries(server: MetricsServer, *, trusted: ssl.SSLContext | None = None) -> dict[str, float]:
    """By certificate, seconds since 1970, as a scrape tells."""
    _, text = get(server, trusted=trusted or trusting(OURS))
    found = re.findall(
        r'^isentrope_certificate_expiry_timestamp_seconds\{certificate="(\w+)"\} (\S+)$', text, re.M
    )
    return {name: float(value) for name, value in found}


def end_of(certificate: bytes) -> float:
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()


def test_what_expires_is_told_and_follows_the_folder(tmp_path: Path) -> None:
    first, short = (
        leaf(OURS, "rollout", valid_until=timedelta(minutes=minutes)) for minutes in (30, 5)
    )
    folder, later = tmp_path / "rollout", Authority("later", valid_until=timedelta(days=9))
    write_credentials(folder, first, OURS)
    with metrics(tls=Credentials(folder)) as server:
        ours = end_of(OURS.certificate)
        assert expiries(server) == {"own": end_of(first.certificate), "authority": ours}
        write_credentials(folder, short, OURS, later)
        assert expiries(server) == {
            "own": end_of(short.certificate),
            "authority": end_of(later.certificate),
        }


def test_plain_text_and_silence_on_the_tls_port_keep_nobody_waiting(tmp_path: Path) -> None:
    with metrics(tls=credentials(tmp_path, OURS, "rollout")) as server:
        place = ("127.0.0.1", server.port)
        with socket.create_connection(place, CALL_SECONDS):
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                get(server)
            assert get(server, trusted=trusting(OURS))[0] == 200


@pytest.mark.parametrize("is_secure", [False, True])
def test_a_peer_that_dribbles_is_cut_off(is_secure: bool, tmp_path: Path) -> None:
    server = MetricsServer(
        "127.0.0.1",
        0,
        metrics=make_wsgi_app(),
        tls=credentials(tmp_path, OURS, "rollout") if is_secure else None,
        connection_seconds=0.3,
    )
    # The start of a request, or of a TLS record of 16 KiB.
    said = b"\x16\x03\x01\x40\x00\x01" if is_secure else b"GET /metrics HTTP/1.1\r\nX: "
    deadline = time.monotonic() + CALL_SECONDS
    with socket.create_connection(("127.0.0.1", server.port), CALL_SECONDS) as peer:
        peer.sendall(said)
        peer.settimeout(0.05)
        while is_open(peer):
            assert time.monotonic() < deadline
            with suppress(ConnectionError):
                peer.sendall(b"x")
    server.close()


def is_open(peer: socket.socket) -> bool:
    """Whether the other end has not closed it; what it says is left aside."""
    try:
        while peer.recv(1 << 16):
            pass
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    return False


def test_more_connections_than_there_are_places_for_are_turned_away() -> None:
    with metrics() as server:
        place = ("127.0.0.1", server.port)
        silent = [socket.create_connection(place, CALL_SECONDS) for _ in range(MAX_CONNECTIONS)]
        with socket.create_connection(place, CALL_SECONDS) as one_more:
            assert one_more.recv(1) == b""
        for each in silent:
            each.close()


async def test_a_kubelet_learns_what_grpc_health_says_and_no_more(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame")
    tls = credentials(tmp_path, OURS, "verifier")

    async def ask(service: str) -> int:
        return (await asyncio.to_thread(get, http, f"/health/{service}", trusted=trust))[0]

    # A kubelet checks no certificate.
    trust = ssl._create_unverified_context()
    with metrics(tls=tls, token=token) as http:
        assert await ask(VERIFIER) == 503
        async with serving("verifier", tls) as server:
            http.answer_health(server.is_healthy)
            assert await ask(VERIFIER) == 200
            assert await ask(PROGRESS) == 200
            assert await ask("isentrope.v1.Learner") == 404
            await server.set_progressing(False)
            assert (await ask(PROGRESS), await ask(VERIFIER)) == (503, 200)
            await server.set_serving(False)
            assert await ask(VERIFIER) == 503
        assert (await asyncio.to_thread(get, http, "/", trusted=trust))[0] == 404
        assert (await asyncio.to_thread(get, http, trusted=trust))[0] == 401


def test_an_event_loop_that_hangs_is_not_well_and_its_metrics_are_told_all_the_same() -> None:
    command = [sys.executable, "-m", "tests.security.hung_loop", str(10 * CALL_SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            until(lambda: {status(f"{url}/health/{name}") for name in ("x", PROGRESS)} == {200})
            process.send_signal(signal.SIGUSR1)
            until(lambda: status(f"{url}/health/{PROGRESS}") == 503)  # the signal is delivered
            assert (status(f"{url}/health/x"), status(f"{url}/health/{PROGRESS}")) == (503, 503)
            assert status(f"{url}/metrics") == 200
            assert process.poll() is None
        finally:
            process.kill()


def until(holds: Callable[[], bool]) -> None:
    """An answer that comes too late on a busy machine is none, and is asked for again."""
    deadline = time.monotonic() + 2 * CALL_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_health_does_not_come_from_an_event_loop_that_ended() -> None:
    async def well(service: str) -> bool:
        return True

    async def tell() -> None:
        http.answer_health(well)

    with metrics() as http:
        asyncio.run(tell())
        assert get(http, "/health/x")[0] == 503
