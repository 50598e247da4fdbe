"""The connection to a Redis server: made to outlive a restart of it, and named in its errors.

Two waits follow on each other when the server is away. redis-py repeats a call for some seconds.
Then it is a `StreamError` with status `AWAY`; whoever has a `Patience` waits on, and says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import StartError, StreamError

RETRIES = 8
"""Of redis-py; they last about ten seconds, so a server's restart goes unnoticed."""

MAX_CONNECTIONS = 1024
"""Of one process, each for a call under way; redis-py's own 100 would be few for many groups."""

AWAY = "UNAVAILABLE"
"""`StreamError.status` of a server that does not answer, or refuses for the time being."""

_RETRY_SECONDS = 0.5
_REFUSALS = ("MISCONF", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN")
"""Begin the answers of a server whose disk is full, or that is about to be replaced."""

_Answer = TypeVar("_Answer")


def connect(url: str, *, timeout_seconds: float = 30.0, retries: int = RETRIES) -> Any:
    """A client that repeats a call which did not reach the server."""
    return redis.Redis.from_url(
        url,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries),
        retry_on_error=[RedisTimeoutError],
        socket_connect_timeout=min(5.0, timeout_seconds),
        socket_timeout=timeout_seconds,
        health_check_interval=15,
        max_connections=MAX_CONNECTIONS,
    )


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


async def until_answered(client: Any, url: str, timeout_seconds: float) -> None:
    """Wait for the server's first answer.

    Raises:
        StartError: there was none within `timeout_seconds`.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        raise StartError(
            f"redis.url = {shown(url)!r}: no answer ({error or type(error).__name__}); start Redis"
            " there, or unset REDIS_URL and redis.url to let `isentrope up` start one"
        ) from None


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
        status = AWAY if _is_away(error) else ""
        raise StreamError(f"{key}: {error or type(error).__name__}", status=status) from error
    _cancel_if_asked()


def _is_away(error: Exception) -> bool:
    kinds = (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError, OSError)
    return isinstance(error, kinds) or str(error).startswith(_REFUSALS)


def _cancel_if_asked() -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
