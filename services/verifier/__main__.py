"""Start a verifier: `python -m services.verifier --config run.toml`."""

from __future__ import annotations

import asyncio
import sys

from shared.process import ServiceArguments, run_service


async def main(given: ServiceArguments, stop: asyncio.Event) -> None:
    """Import grpc and the tokenizer only now, when the run file is known to be right."""
    from services.verifier.app import serve_verifier

    await serve_verifier(given, stop)


if __name__ == "__main__":
    sys.exit(run_service("verifier", main))
