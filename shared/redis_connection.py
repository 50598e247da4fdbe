"""The connection to a Redis server: made to outlive a restart of it, and named in its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import StartError, StreamError


def connect(url: str, *, timeout_seconds: float = 30.0, retries: int = 8) -> Any:
    """A client; eight retries last about ten seconds, so a server's restart is survived."""
    return redis.Redis.from_url(
        url,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries),
        retry_on_error=[RedisTimeoutError],
        socket_connect_timeout=min(5.0, timeout_seconds),
        socket_timeout=timeout_seconds,
        health_check_interval=15,
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


@contextmanager
def translated(key: str) -> Iterator[None]:
    """Errors of the server are errors of the stream at `key`."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StreamError(f"{key}: {error or type(error).__name__}") from error
