"""Start one rank of the learner: `python -m services.learner --config run.toml`."""

from __future__ import annotations

import asyncio
import sys

from shared.process import ServiceArguments, run_service


async def main(given: ServiceArguments, stop: asyncio.Event) -> None:
    """Import torch and deepspeed only now, when arguments and run file are known to be right."""
    from services.learner.app import run_rank

    await run_rank(given, stop)


if __name__ == "__main__":
    sys.exit(run_service("learner", main))
