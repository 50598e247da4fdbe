"""Which processes make up a run on this machine, and how each is started."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.cli.run_folder import RunFolder
from shared.config import RunConfig
from shared.errors import ConfigError

LEARNER = "learner"
ROLLOUT = "rollout"
VERIFIER = "verifier"
REDIS = "redis"

_STAGES = {LEARNER: 0, ROLLOUT: 1, VERIFIER: 1, REDIS: 2}


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to start.

    Attributes:
        environment: added to this process's own.
        has_lease: it is up when its lease is in Redis and its gRPC server answers.
    """

    name: str
    role: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    has_lease: bool = True

    @property
    def stage(self) -> int:
        """Lower ones are ended first: a learner needs Redis for its last checkpoint."""
        return _STAGES.get(self.role, 0)


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What every service of a run is told.

    Attributes:
        redis_url: a person's, and that of each role that has none of its own.
        redis_urls: by role, where each has a user of its own.
    """

    config: RunConfig
    run_file: Path
    run_id: str
    redis_url: str
    is_resumed: bool
    redis_urls: Mapping[str, str] = field(default_factory=dict)

    def redis_url_of(self, role: str) -> str:
        """Where a service of that role finds Redis."""
        return self.redis_urls.get(role, self.redis_url)


Plan = Callable[[RunIdentity], Sequence[Launch]]


def plan_services(run: RunIdentity) -> list[Launch]:
    """Verifiers, rollout replicas, learner ranks."""
    config = run.config
    gpus = GpuShares.of(
        visible_gpus(), num_ranks=config.learner.num_ranks, per_replica=_gpus_of(config)
    )
    return [
        *[_verifier(run, index) for index in range(config.verifier.num_replicas)],
        *[_rollout(run, index, gpus) for index in range(config.rollout.num_replicas)],
        *_learner_ranks(run, gpus),
    ]


def plan_warmup(config: RunConfig, run_file: Path) -> Launch:
    """The process that trains the small model a run without one starts from."""
    command = _python("services.learner.warmup", "--config", str(run_file))
    environment = {
        "OMP_NUM_THREADS": "1",  # two wait for each other on a busy machine: many times slower
        "PYTHONUNBUFFERED": "1",
    }
    return Launch(
        "warm-up", LEARNER, (*command, "--folder", config.model_path), environment, has_lease=False
    )


def check_ports(config: RunConfig) -> None:
    """Refuse fixed ports that several processes of this machine would share.

    Raises:
        ConfigError: names the key.
    """
    network = config.network
    processes = config.rollout.num_replicas + config.verifier.num_replicas + 1
    wanted = [
        ("rollout_port", network.rollout_port, config.rollout.num_replicas, "rollout replicas"),
        ("verifier_port", network.verifier_port, config.verifier.num_replicas, "verifiers"),
        ("metrics_port", network.metrics_port, processes, "services"),
    ]
    for key, port, number, who in wanted:
        if port and number > 1:
            raise ConfigError(
                f"network.{key} = {port}: {number} {who} on one machine cannot share it; use 0"
                " for any free port"
            )


def restart_command(run: RunIdentity, launch: Launch) -> str:
    """What a person types to start a replica again."""
    command = _python(f"services.{launch.role}", *_common(run, launch.name))
    url_file = RunFolder(run.run_file.parent).redis_url_file_of(launch.role)
    return f'REDIS_URL="$(cat {shlex.quote(str(url_file))})" {shlex.join(command)}'


@dataclass(frozen=True, slots=True)
class GpuShares:
    """Which GPUs the learner's ranks and each rollout replica may see; empty without GPUs."""

    learner: tuple[str, ...]
    others: tuple[str, ...]
    per_replica: int

    @classmethod
    def of(cls, gpus: Sequence[str], *, num_ranks: int, per_replica: int) -> GpuShares:
        """The learner takes the first `num_ranks`, replicas the rest; all share if too few.

        Raises:
            ConfigError: fewer GPUs than one replica needs.
        """
        if gpus and per_replica > len(gpus):
            raise ConfigError(
                f"rollout.tensor_parallel_size = {per_replica}: this machine has {len(gpus)} GPUs;"
                " lower it"
            )
        rest = tuple(gpus[num_ranks:])
        return cls(
            learner=tuple(gpus[:num_ranks]),
            others=rest if len(rest) >= per_replica else tuple(gpus),
            per_replica=per_replica,
        )

    def of_replica(self, index: int) -> dict[str, str]:
        """Environment of a rollout replica; replicas beyond the last GPU start over."""
        if not self.others:
            return {}
        places = len(self.others) // self.per_replica
        first = index % places * self.per_replica
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.others[first : first + self.per_replica])}

    def of_rank(self, rank: int) -> dict[str, str]:
        """Environment of a learner rank, which takes the GPU that LOCAL_RANK counts to."""
        if not self.learner:
            return {"LOCAL_RANK": str(rank)}
        return {
            "CUDA_VISIBLE_DEVICES": ",".join(self.learner),
            "LOCAL_RANK": str(rank % len(self.learner)),
        }


def visible_gpus() -> list[str]:
    """GPUs this process may use, as CUDA_VISIBLE_DEVICES spells them; asked of nvidia-smi."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [part for part in said.split(",") if part.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def free_port() -> int:
    """A TCP port that nobody on this machine listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _verifier(run: RunIdentity, index: int) -> Launch:
    name = f"{VERIFIER}-{index}"
    environment = _environment(run, VERIFIER, threads=1) | {"CUDA_VISIBLE_DEVICES": ""}
    command = _python("services.verifier", *_common(run, name), "--exit-with-parent")
    return Launch(name, VERIFIER, command, environment)


def _rollout(run: RunIdentity, index: int, gpus: GpuShares) -> Launch:
    name = f"{ROLLOUT}-{index}"
    threads = run.config.rollout.threads
    environment = _environment(run, ROLLOUT, threads=threads) | gpus.of_replica(index)
    command = _python("services.rollout", *_common(run, name), "--exit-with-parent")
    return Launch(name, ROLLOUT, command, environment)


def _learner_ranks(run: RunIdentity, gpus: GpuShares) -> list[Launch]:
    threads, num_ranks = run.config.learner.threads, run.config.learner.num_ranks
    shared = _environment(run, LEARNER, threads=threads) | {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    resume = ["--resume"] if run.is_resumed else []
    names = [LEARNER, *(f"{LEARNER}-rank-{rank}" for rank in range(1, num_ranks))]
    return [
        Launch(
            name,
            LEARNER,
            _python("services.learner", *_common(run, name), "--exit-with-parent", *resume),
            shared | {"RANK": str(rank)} | gpus.of_rank(rank),
            has_lease=rank == 0,
        )
        for rank, name in enumerate(names)
    ]


def _common(run: RunIdentity, name: str) -> list[str]:
    return ["--config", str(run.run_file), "--run-id", run.run_id, "--name", name]


def _environment(run: RunIdentity, role: str, *, threads: int) -> dict[str, str]:
    return {
        "REDIS_URL": run.redis_url_of(role),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


def _gpus_of(config: RunConfig) -> int:
    return config.rollout.tensor_parallel_size


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)
