"""What every service's process does alike: arguments, signals, the one-line error at the end."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import Environment, RunConfig, load_run
from shared.errors import ConfigError, IsentropeError
from shared.logs import configure_logging

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ServiceArguments:
    """What a service is started with.

    Attributes:
        run_id: names the run's folder and its Redis keys.
        name: of this replica, unique in its role.
        resume: learner only: go on from the newest checkpoint.
    """

    config: RunConfig
    environment: Environment
    run_id: str
    name: str
    resume: bool

    @property
    def run_folder(self) -> Path:
        """Where the run's files are."""
        return Path(self.config.run.directory) / self.run_id

    @property
    def host(self) -> str:
        """The address peers reach this process at."""
        return self.environment.advertised_host or self.config.network.host

    @property
    def redis_url(self) -> str:
        """Where the streams are.

        Raises:
            ConfigError: neither the environment nor the run file says.
        """
        url = self.environment.redis_url or self.config.redis.url
        if url is None:
            raise ConfigError(
                "redis.url is not set and neither is REDIS_URL: a service started by hand must be"
                " told where Redis is; `isentrope up` prints the address of the one it starts"
            )
        return url


def run_service(
    role: str,
    main: Callable[[ServiceArguments, asyncio.Event], Awaitable[None]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run `main` until it returns; SIGTERM and SIGINT set the event it is given.

    Returns:
        0; or, after one line on standard error, 2 for bad configuration and 1 for what else
        this project raises on purpose.
    """
    configure_logging()
    try:
        asyncio.run(_until_signal(main, _parse(role, arguments)))
    except IsentropeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


async def _until_signal(
    main: Callable[[ServiceArguments, asyncio.Event], Awaitable[None]], given: ServiceArguments
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(given, stop)


def _parse(role: str, arguments: Sequence[str] | None) -> ServiceArguments:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{role}", description=f"The {role} service of an Isentrope run."
    )
    parser.add_argument("--config", type=Path, required=True, help="the run file (TOML)")
    parser.add_argument("--run-id", help="default: run.name")
    parser.add_argument("--name", help=f"unique name of this replica; default: {role}-<pid>")
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="end when the starting process ends"
    )
    if role == "learner":
        parser.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint"
        )
    given = parser.parse_args(arguments)
    if given.exit_with_parent:
        end_with_parent()
    config = load_run(given.config)
    return ServiceArguments(
        config=config,
        environment=Environment.read(),
        run_id=given.run_id or config.run.name,
        name=given.name or f"{role}-{os.getpid()}",
        resume=role == "learner" and given.resume,
    )


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
