"""A round of every attack, told by a seed: what `make fuzz` repeats, and a test does once."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

from shared.rpc import MAX_MESSAGE_BYTES
from tests.fuzz import consumers
from tests.fuzz.calls import Fuzzed
from tests.fuzz.decoders import attack_drawn, decoders
from tests.fuzz.frames import send, truncated_call
from tests.fuzz.services import TARGETS, Code

MOST_GROWTH = 64 << 20
"""Bytes that a process may have more after many rounds than after the first."""

_ON_DISK = ("checkpoint manifest", "checkpoint state", "journal")


def attack_decoders(seed: str, folder: Path, count: int) -> None:
    """`count` cases of each decoder; a tenth of those that write to the disk."""
    for name, decoder in decoders(folder).items():
        for number in range(count // 10 if name in _ON_DISK else count):
            case = f"{seed}/{name}/{number}"
            try:
                attack_drawn(decoder, random.Random(case))
            except Exception as error:
                error.add_note(f"case {case!r}")
                raise


async def attack_calls(seed: str, fuzzed: Fuzzed, count: int) -> None:
    """`count` cases of each method, and every service serves afterwards."""
    for method in TARGETS:
        for number in range(count):
            case = f"{seed}{method}/{number}"
            try:
                await fuzzed.attack_drawn(random.Random(case), method)
            except AssertionError as error:
                error.add_note(f"case {case!r}")
                raise
    await fuzzed.assert_serves()


async def attack_connections(seed: str, fuzzed: Fuzzed, count: int) -> None:
    """`count` connections to each service that send no whole call, and all serve afterwards."""
    draw = random.Random(f"{seed}/connections")
    for service, address in fuzzed.servers.addresses.items():
        method, target = draw.choice(
            [(name, each) for name, each in TARGETS.items() if each.service == service]
        )
        for _ in range(count):
            request = target.seeds[0].SerializeToString()
            await send(address, truncated_call(draw, method, request))
    await fuzzed.assert_serves()


async def attack_with_too_much(fuzzed: Fuzzed) -> None:
    """A request above the bound is refused by every method, before it is read."""
    for method, target in TARGETS.items():
        if Code.DEADLINE_EXCEEDED in target.codes:
            continue  # it has no time to read so much
        code = await fuzzed.call(method, b"\0" * (MAX_MESSAGE_BYTES + 1))
        assert code is Code.RESOURCE_EXHAUSTED, f"{method} answered {code.name}"
    await fuzzed.assert_serves()


async def attack_consumers(seed: str, count: int) -> None:
    """`count` entries to a replica's sampler and as many to the learner's inbox."""
    await consumers.attack_sampler(random.Random(f"{seed}/sampler"), count)
    await consumers.attack_inbox(random.Random(f"{seed}/inbox"), count)


def resident_bytes() -> int:
    """Memory of this process."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def traced() -> None:
    """Have allocations counted; it makes everything slower."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
