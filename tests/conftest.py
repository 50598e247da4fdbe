"""A real Redis for the tests that need one: its own socket, its own prefix, gone at the end."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.redis_server import embedded_redis
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("redis")
    with embedded_redis(folder) as url:
        yield url


@pytest.fixture
async def streams(redis_url: str) -> AsyncIterator[Streams]:
    async with open_streams(
        redis_url,
        run_id=f"test-{secrets.token_hex(4)}",
        prompts=Bounds(8, 1000),
        groups=Bounds(8, 1000),
        timeout_seconds=5.0,
    ) as opened:
        yield opened
