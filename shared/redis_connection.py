"""The connection to a Redis server: made to outlive a restart of it, and named in its errors.

Two waits follow on each other when the server is away. redis-py repeats a call for some seconds.
Then it is a `StreamError` with status `AWAY`; whoever has a `Patience` waits on, and says so. A
server that refuses a user is not away: that is said at once, with the user's name, and ends what
was to be done.

A `rediss://` address speaks TLS and checks the server's name. redis-py takes the files from the
address, `?ssl_ca_certs=...&ssl_certfile=...&ssl_keyfile=...`; they are read for every handshake.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import ConfigError, StartError, StreamError

RETRIES = 8
"""Of redis-py; they last about ten seconds, so a server's restart goes unnoticed."""

MAX_CONNECTIONS = 1024
"""Of one process, each for a call under way; redis-py's own 100 would be few for many groups."""

AWAY = "UNAVAILABLE"
"""`StreamError.status` of a server that does not answer, or refuses for the time being."""

REFUSED = "PERMISSION_DENIED"
"""Of a server that answers, and does not let this user in or do this: waiting does not help."""

_RETRY_SECONDS = 0.5
_REFUSALS = ("MISCONF", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN")
"""Begin the answers of a server whose disk is full, or that is about to be replaced."""

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

_Answer = TypeVar("_Answer")


def connect(url: str, *, timeout_seconds: float = 30.0, retries: int = RETRIES) -> Any:
    """A client that repeats a call which did not reach the server.

    Raises:
        ConfigError: the address is not one.
    """
    try:
        client = _Client.from_url(url, **_options(timeout_seconds, retries))
        pool: Any = client.connection_pool
        if issubclass(pool.connection_class, redis.SSLConnection):
            pool.connection_class = _FreshlyReadConnection
        pool.make_connection()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"redis.url or REDIS_URL = {shown(url)!r}: {error}; write it as redis://, rediss:// or"
            " unix:// with parameters that redis-py knows"
        ) from None
    return client


def _options(timeout_seconds: float, retries: int) -> dict[str, Any]:
    return {
        "retry": _RetryIfAway(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries),
        "retry_on_error": [RedisTimeoutError],
        "socket_connect_timeout": min(5.0, timeout_seconds),
        "socket_timeout": timeout_seconds,
        "health_check_interval": 15,
        "max_connections": MAX_CONNECTIONS,
        # It would tell the server the name of the library, for which a user needs one more right.
        "driver_info": None,
    }


async def check_server(url: str, *, timeout_seconds: float) -> None:
    """See that Redis answers, without keeping a connection.

    Raises:
        StartError: it does not.
    """
    client = connect(url)
    try:
        await until_answered(client, url, timeout_seconds)
    finally:
        await client.aclose()


class _FreshlyReadConnection(redis.SSLConnection):
    """redis-py keeps what it has read for as long as the process lives; certificates do not."""

    async def _connect(self) -> None:
        self.ssl_context.context = None
        connect_anew: Any = super()._connect
        await connect_anew()


class _Client(redis.Redis):
    """Says which user it is that a server refuses, and what to do."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            run: Any = super().execute_command
            return await run(*args, **options)
        except RedisError as error:
            if not _is_refusal(error):
                raise
            user = self.connection_pool.connection_kwargs.get("username") or "default"
            raise RefusedError(
                f"Redis refuses user {user!r} {args[0]} ({error}); REDIS_URL must name a user and"
                " password of the server's access list, and `isentrope redis-users` writes one"
                " that lets each service do its part"
            ) from error


class RefusedError(RedisError):
    """The server does not let this user in, or not do this."""


class _RetryIfAway(Retry):
    """Repeats nothing that was refused: redis-py counts a wrong password as a lost connection."""

    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False
    ) -> Any:
        def is_away(error: Exception) -> bool:
            is_final = _is_refusal(error) or _find(error, ssl.SSLError) is not None
            return not is_final and (is_retryable is None or bool(is_retryable(error)))

        return await super().call_with_retry(do, fail, is_away, with_failure_count)


def _is_refusal(error: BaseException) -> bool:
    is_inside_script = "ACL failure in script" in str(error)
    refusals = (AuthenticationError, NoPermissionError)
    return is_inside_script or _find(error, *refusals) is not None


def _find(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The error itself or what it came from, whichever is of one of these kinds."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__ or found.__context__
    return found


async def until_answered(client: Any, url: str, timeout_seconds: float) -> None:
    """Wait for the server's first answer.

    Raises:
        StartError: there was none within `timeout_seconds`.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        raise StartError(f"redis.url = {shown(url)!r}: {_why(error, url)}") from None


def _why(error: Exception, url: str) -> str:
    if isinstance(error, RefusedError):
        return str(error)
    parts, reason = urlsplit(url), str(error) or type(error).__name__
    is_about_files = _find(error, ssl.SSLError, FileNotFoundError, PermissionError) is not None
    if parts.scheme == "rediss" and is_about_files:
        given = parse_qs(parts.query)
        files = ", ".join(given[each][0] for each in _TLS_FILES if each in given)
        return (
            f"no TLS with it ({reason}); see that {files or '?ssl_ca_certs=FILE'} is there, not"
            " expired, of the server's authority, and that its certificate names this host"
        )
    return (
        f"no answer ({reason}); start Redis there, or unset REDIS_URL and redis.url to let"
        " `isentrope up` start one"
    )


def shown(url: str) -> str:
    """`url` without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


class Patience:
    """How long a caller waits for a server that is away.

    Args:
        url: of the server, for the error.
        seconds: from the first error; 0 waits for nothing.
        told: called with the seconds waited so far after each error, and with None once the server
            is back; what it raises ends the wait.
    """

    def __init__(
        self,
        url: str = "",
        *,
        seconds: float = 0.0,
        told: Callable[[float | None], None] = lambda seconds: None,
    ) -> None:
        self._url = url
        self._seconds = seconds
        self._told = told

    async def outlast(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The answer, if need be after a wait; `ask` must be safe to repeat.

        Raises:
            StreamError: the server was away for longer, or refused for another reason.
        """
        began: float | None = None
        while True:
            try:
                answer = await ask()
            except StreamError as error:
                if error.status != AWAY or not self._seconds:
                    raise
                began = time.monotonic() if began is None else began
                self._wait_on(time.monotonic() - began, error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                if began is not None:
                    self._told(None)
                return answer

    def _wait_on(self, waited: float, error: StreamError) -> None:
        if waited > self._seconds:
            raise StreamError(
                f"Redis at {shown(self._url)} was away for {waited:.0f} s, longer than"
                f" redis.outage_seconds = {self._seconds:g} ({error}); start it again, then resume",
                status=AWAY,
            ) from error
        self._told(waited)


@contextmanager
def translated(key: str) -> Iterator[None]:
    """Errors of the server are errors of the stream at `key`; a cancellation is never lost.

    Python 3.11's `asyncio.wait_for`, which redis-py writes with, drops a cancellation that comes
    in the moment its write ends. The task still knows that it was cancelled.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        _cancel_if_asked()
        reason = str(error) or type(error).__name__
        raise StreamError(f"{key}: {reason}", status=_status_of(error)) from error
    _cancel_if_asked()


def _status_of(error: Exception) -> str:
    if isinstance(error, RefusedError):
        return REFUSED
    return AWAY if _is_away(error) else ""


def _is_away(error: Exception) -> bool:
    kinds = (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError, OSError)
    return isinstance(error, kinds) or str(error).startswith(_REFUSALS)


def _cancel_if_asked() -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
