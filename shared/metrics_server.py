"""The HTTP port of a service: `/metrics` for who has the token, `/health/...` for the kubelet.

    GET /metrics            401 without `Authorization: Bearer <token>`, where there is a token file
    GET /health/<service>   200 or 503, as grpc.health.v1 says of that service; 404 of another

A kubelet has neither a certificate nor a token, so that it cannot ask a gRPC server that wants one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from shared.errors import StartError
from shared.tls import Credentials

logger = logging.getLogger(__name__)

IDLE_SECONDS = 10.0
"""A connection that says nothing for so long is closed."""

CONNECTION_SECONDS = 30.0
"""A connection that is not done by then is closed, however often it says something."""

MAX_CONNECTIONS = 64
"""Answered at a time; more are turned away."""

HEALTH_SECONDS = 4.0

_HEALTH = "/health/"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Ask = Callable[[str], Coroutine[Any, Any, bool | None]]


class MetricsServer:
    """Serves in threads of its own, until the process ends or it is closed.

    Args:
        metrics: the WSGI application behind `/metrics`.
        tls: HTTPS by these credentials; plain HTTP without.
        token_file: holds the token, and is read again for each request; nobody needs one without.
        health_seconds: an event loop that does not answer within this time is not well; less than
            a probe waits.
        connection_seconds: the longest that one peer is listened to.
    Raises:
        OSError: the port is taken.
        StartError: the token file cannot be read, or holds none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        metrics: Application,
        tls: Credentials | None = None,
        token_file: Path | None = None,
        health_seconds: float = HEALTH_SECONDS,
        connection_seconds: float = CONNECTION_SECONDS,
    ) -> None:
        self._metrics = metrics
        self._health_seconds = health_seconds
        self._token_file = token_file
        if token_file is not None:
            read_token(token_file)
        self._ask: tuple[Ask, asyncio.AbstractEventLoop] | None = None
        self._server = _Server((host, port), tls, connection_seconds)
        self._server.set_app(self._answer)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The one it really listens on."""
        return int(self._server.server_port)

    def answer_health(self, ask: Ask) -> None:
        """Have `/health/` ask this from now on, in the running event loop; 503 before."""
        self._ask = ask, asyncio.get_running_loop()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(IDLE_SECONDS)

    def _answer(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path: str = request.get("PATH_INFO", "")
        if path.startswith(_HEALTH):
            return _say(self._health(path.removeprefix(_HEALTH)), start)
        if path != "/metrics":
            return _say(HTTPStatus.NOT_FOUND, start)
        if not self._has_token(request):
            return _say(HTTPStatus.UNAUTHORIZED, start, ("WWW-Authenticate", "Bearer"))
        # Always plain text: in OpenMetrics, which Prometheus 2 asks for, prometheus_client turns
        # the colon in the names of vLLM's series into an underscore.
        return self._metrics({**request, "HTTP_ACCEPT": "text/plain"}, start)

    def _health(self, service: str) -> HTTPStatus:
        """Asked in the event loop: one that hangs must not look well."""
        if self._ask is None:
            return HTTPStatus.SERVICE_UNAVAILABLE
        ask, loop = self._ask
        if loop.is_closed():
            return HTTPStatus.SERVICE_UNAVAILABLE
        asking = asyncio.run_coroutine_threadsafe(ask(service), loop)
        try:
            is_well = asking.result(self._health_seconds)
        except (FutureTimeoutError, CancelledError):  # hangs, or ends just now
            asking.cancel()
            return HTTPStatus.SERVICE_UNAVAILABLE
        if is_well is None:
            return HTTPStatus.NOT_FOUND
        return HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE

    def _has_token(self, request: dict[str, Any]) -> bool:
        if self._token_file is None:
            return True
        try:
            token = read_token(self._token_file)
        except StartError as error:
            logger.warning("nobody gets metrics: %s", error)
            return False
        kind, _, given = str(request.get("HTTP_AUTHORIZATION", "")).partition(" ")
        # WSGI hands header bytes over as latin-1.
        is_same = hmac.compare_digest(given.strip().encode("latin-1"), token)
        return kind.lower() == "bearer" and is_same


def read_token(path: Path) -> bytes:
    """Raises StartError if the file is not there or empty."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise StartError(
            f"ISENTROPE_METRICS_TOKEN_FILE = {path}: {error.strerror}; name a file that holds the"
            " token, or unset it to serve metrics to everybody"
        ) from None
    if not token:
        raise StartError(
            f"ISENTROPE_METRICS_TOKEN_FILE = {path}: empty; write a token into it, such as"
            " openssl rand -hex 24 prints"
        )
    return token


def _say(
    status: HTTPStatus, start: Callable[..., Any], *headers: tuple[str, str]
) -> Iterable[bytes]:
    start(f"{status.value} {status.phrase}", [("Content-Type", "text/plain"), *headers])
    return [f"{status.phrase}\n".encode()]


class _Handler(WSGIRequestHandler):
    timeout = IDLE_SECONDS

    def log_message(self, *_: Any) -> None:
        """Scrapes and probes come every few seconds."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Shakes hands in the thread of the connection: a slow peer keeps nobody else waiting."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self, address: tuple[str, int], tls: Credentials | None, connection_seconds: float
    ) -> None:
        self.address_family = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0][0]
        self._tls = tls
        self._connection_seconds = connection_seconds
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's name, which may ask a DNS server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "metrics", int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is None:
            with _cut_off_after(self._connection_seconds, request):
                super().finish_request(request, client_address)
            return
        request.settimeout(IDLE_SECONDS)
        https = self._tls.current().https
        with (
            https.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as wrapped,
            _cut_off_after(self._connection_seconds, wrapped),
        ):
            wrapped.do_handshake()
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off, or speaks plain text to HTTPS, is no error of ours."""
        logger.debug("a connection from %s failed", client_address, exc_info=True)


@contextmanager
def _cut_off_after(seconds: float, connection: socket.socket) -> Iterator[None]:
    """Have whoever waits for this connection find it at its end by then."""
    timer = threading.Timer(seconds, _cut_off, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket's own: the other thread is to read on, and to find nothing there.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
