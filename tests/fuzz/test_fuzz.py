"""The short form of `make fuzz`, and that it leaves nothing out."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.descriptor import FileDescriptor

from tests.fuzz import rounds
from tests.fuzz.calls import Fuzzed, fuzzed
from tests.fuzz.services import TARGETS, Code

SEED = "short"
ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Fuzzed]:
    async with fuzzed() as servers:
        yield servers


@pytest.fixture
def counted() -> Iterator[None]:
    import tracemalloc

    rounds.traced()
    yield
    tracemalloc.stop()


def our_methods() -> set[str]:
    found = set()
    for path in (ROOT / "protos").glob("*.proto"):
        file: FileDescriptor = importlib.import_module(f"protos.{path.stem}_pb2").DESCRIPTOR
        for service in file.services_by_name.values():
            found |= {f"/{service.full_name}/{each.name}" for each in service.methods}
    return found


def test_every_method_is_attacked() -> None:
    assert our_methods() <= set(TARGETS)


@pytest.mark.asyncio(loop_scope="module")
async def test_no_call_crashes_hangs_or_gets_an_unclear_status(running: Fuzzed) -> None:
    await rounds.attack_calls(SEED, running, 12)
    await running.assert_forgets()


@pytest.mark.asyncio(loop_scope="module")
async def test_connections_that_break_off_or_lie_leave_the_servers_serving(
    running: Fuzzed,
) -> None:
    await rounds.attack_connections(SEED, running, 10)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_that_is_too_large_is_refused(running: Fuzzed) -> None:
    method = "/isentrope.v1.Rollout/BeginUpdate"
    assert await running.call(method, b"\0" * ((64 << 20) + 1)) is Code.RESOURCE_EXHAUSTED
    await running.assert_serves()


@pytest.mark.usefixtures("counted")
def test_no_decoder_lets_another_error_out_or_reserves_what_is_only_announced(
    tmp_path: Path,
) -> None:
    rounds.attack_decoders(SEED, tmp_path, 100)


async def test_entries_that_decode_harm_neither_sampler_nor_inbox() -> None:
    await rounds.attack_consumers(SEED, 64)
