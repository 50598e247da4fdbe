"""Start a rollout replica: `python -m services.rollout --config run.toml`."""

from __future__ import annotations

import asyncio
import sys

from shared.process import ServiceArguments, run_service


async def main(given: ServiceArguments, stop: asyncio.Event) -> None:
    """Import vllm only now, when the arguments and the run file are known to be right."""
    from services.rollout.app import serve_replica

    await serve_replica(given, stop)


if __name__ == "__main__":
    sys.exit(run_service("rollout", main))
