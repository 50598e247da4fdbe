"""`make fuzz`: rounds of every attack until the time is up; the first finding ends it.

A finding names its seed and case: `python -m tests.fuzz --seed SEED --rounds 1` finds it again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import tempfile
import time
from pathlib import Path

from tests.fuzz import rounds
from tests.fuzz.calls import fuzzed

_CASES = 40


async def main() -> None:
    """Rounds with seeds of their own; AssertionError, or what a decoder let out, is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of the first round")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="at most so many")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rounds.traced()
    deadline, grown_from = time.monotonic() + 60 * given.minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        async with fuzzed() as servers:
            for number in range(given.rounds):
                seed = given.seed if number == 0 else f"{given.seed}-{number}"
                print(f"round {number}, seed {seed}", flush=True)
                rounds.attack_decoders(seed, Path(folder) / str(number), 10 * _CASES)
                await rounds.attack_calls(seed, servers, _CASES)
                await rounds.attack_connections(seed, servers, _CASES)
                await rounds.attack_with_too_much(servers)
                await rounds.attack_consumers(seed, 4 * _CASES)
                resident = rounds.resident_bytes()
                grown_from = grown_from or resident
                assert resident - grown_from < rounds.MOST_GROWTH, (
                    f"grew from {grown_from >> 20} to {resident >> 20} MiB"
                )
                if time.monotonic() > deadline:
                    break
    print(f"no finding; {resident >> 20} MiB, {grown_from >> 20} MiB after the first round")


if __name__ == "__main__":
    asyncio.run(main())
