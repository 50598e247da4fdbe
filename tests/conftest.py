"""What tests of every kind share: their order, no hurry, and a Redis, gone at the end."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from shared.redis_server import embedded_redis
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds

# A busy machine is no failure. The examples are the same each time, so that a red run is of the
# change it came with; HYPOTHESIS_PROFILE=searching looks for new ones.
for name, is_steady in (("steady", True), ("searching", False)):
    settings.register_profile(
        name, deadline=None, derandomize=is_steady, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: short ones then keep all workers busy until the end."""
    places: dict[Path, int] = {}
    for item in items:
        places[item.path] = min(_place(item), places.get(item.path, _place(item)))
    items.sort(key=lambda item: places[item.path])


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("end_to_end"):
        return 0
    return 1 if item.get_closest_marker("integration") else 2


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
        timeout_seconds=60.0,
    ) as opened:
        yield opened
