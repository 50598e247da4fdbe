"""What every service's process does alike: arguments, signals, the one-line error at the end."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import Environment, RunConfig, load_run
from shared.errors import ConfigError, IsentropeError
from shared.logs import configure_logging
from shared.tls import Credentials

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

_EVERY_INTERFACE = ("", "0.0.0.0", "::")  # noqa: S104


@dataclass(frozen=True, slots=True)
class ServiceArguments:
    """What a service is started with.

    Attributes:
        run_id: names the run's folder and its Redis keys.
        name: of this replica, unique in its role.
        resume: learner only: go on from the newest checkpoint.
        stays: learner only: serve on after the last step, until told to end.
        tls: what this process shows to peers and asks of them; None is plain text.
        run_file: where `config` was read from, if from a file.
    """

    config: RunConfig
    environment: Environment
    run_id: str
    name: str
    resume: bool
    stays: bool = False
    tls: Credentials | None = None
    run_file: Path | None = None

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
        parser.add_argument(
            "--stay",
            action="store_true",
            help="serve on after the last step; for a cluster, which restarts what ends",
        )
    given = parser.parse_args(arguments)
    if given.exit_with_parent:
        end_with_parent()
    environment = Environment.read()
    config = _as_deployed(load_run(given.config), environment, role)
    return ServiceArguments(
        config=config,
        environment=environment,
        run_id=given.run_id or config.run.name,
        name=given.name or f"{role}-{os.getpid()}",
        resume=role == "learner" and given.resume,
        stays=role == "learner" and given.stay,
        tls=_credentials(environment, config, role),
        run_file=given.config,
    )


def _credentials(environment: Environment, config: RunConfig, role: str) -> Credentials | None:
    """Those of this process, if it was given any; else a warning where others can reach it.

    Raises:
        StartError: they do not hold together, or are another role's.
    """
    if environment.tls_folder is not None:
        return Credentials.of_role(environment.tls_folder, role)
    host = config.network.host
    is_local = host in ("localhost", "::1") or host.startswith("127.")
    # Rank 0 alone serves.
    if environment.rank == 0 and not is_local:
        logger.warning(
            "%s is reached from other machines in plain text, by anybody: set ISENTROPE_TLS to a"
            " folder with its certificate (deploy/SECURITY.md)",
            host,
        )
    return None


def _as_deployed(config: RunConfig, environment: Environment, role: str) -> RunConfig:
    """The run file with the addresses that this process was given by the cluster.

    Raises:
        ConfigError: it would tell peers an address that leads nowhere.
    """
    given = {
        "host": environment.bind_host,
        f"{role}_port": environment.port,
        "metrics_port": environment.metrics_port,
    }
    known = {key: value for key, value in given.items() if value is not None}
    network = config.network.model_copy(update=known)
    if network.host in _EVERY_INTERFACE and environment.advertised_host is None:
        raise ConfigError(
            f"network.host = {network.host!r}: peers cannot reach that; set ISENTROPE_HOST to the"
            " address of this machine or pod"
        )
    return config.model_copy(update={"network": network})


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
