"""A run with every real part, as a person starts it, and what can be seen of it from outside.

`Up` is one `isentrope up` in a process of its own, not a terminal; its services have certificates,
and ask for them. Its folder is the working directory and the temporary folder of every process it
starts, so that `processes_in` finds them all, whatever they call themselves.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from protos import learner_pb2 as learner_pb
from protos import learner_pb2_grpc, rollout_pb2_grpc
from protos import rollout_pb2 as rollout_pb
from services.cli.measurements import is_step, read_rows
from shared.lease import Member, Registry
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from shared.roles import OPERATOR, peer_options
from shared.rpc import PROGRESS
from shared.tls import Credentials
from tests.security.identities import TOKEN, secure_machine

RUN_ID = "run"
PATIENCE_SECONDS = 240.0
CALL_SECONDS = 60.0
POLL_SECONDS = 0.1

Row = dict[str, Any]
Answer = TypeVar("Answer")

RUN_FILE = """
[run]
name = "whole"
num_steps = {num_steps}
directory = "{directory}"
[model]
path = "{model}"
max_length = 32
[task]
name = "countdown"
params = {{ numbers = 2 }}
[rollout]
num_replicas = {num_replicas}
group_size = 4
max_completion_tokens = 16
max_concurrent_groups = 2
kv_cache_mib = 64
[learner]
groups_per_batch = 4
max_staleness = {max_staleness}
learning_rate = 1e-4
[evaluation]
every_steps = {evaluated_every}
num_problems = 8
group_size = 2
[checkpoint]
every_steps = 3
[redis]
reclaim_seconds = 2.0
"""
GROUPS_PER_BATCH = 4
EVALUATED_EVERY = 3


class Up:
    """A running `isentrope up`; what it prints goes to a file, so that nobody has to read it."""

    def __init__(self, folder: Path, run_file: Path, *arguments: str) -> None:
        self.folder = folder
        self.run = folder / RUN_ID
        self._printed = folder / f"printed-{time.monotonic_ns()}"
        with self._printed.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.cli", "up", str(run_file), *arguments],
                cwd=folder,
                env={**_inherited(), "TMPDIR": str(folder / "tmp"), **secure_machine(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )

    @property
    def _errors(self) -> Path:
        return self._printed.with_suffix(".errors")

    @property
    def printed(self) -> str:
        return self._printed.read_text("utf8")

    @property
    def errors(self) -> str:
        return self._errors.read_text("utf8")

    @property
    def rows(self) -> list[Row]:
        return [dict(row) for row in read_rows(self.run / "metrics.jsonl")]

    @property
    def steps(self) -> list[Row]:
        """The rows of training steps."""
        return [row for row in self.rows if is_step(row)]

    @property
    def trained(self) -> list[Row]:
        """The rows of the ledger: `step` and `trained`, a list of (epoch, index, attempt)."""
        return [json.loads(line) for line in (self.run / "ledger.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[int]:
        """Their steps."""
        names = [path.name for path in (self.run / "checkpoints").glob("step-*")]
        return sorted(int(name.split("-")[1]) for name in names)

    @property
    def redis_url(self) -> str:
        return (self.run / "redis-url").read_text().strip()

    def until(self, holds: Callable[[], Answer], what: str) -> Answer:
        """The first answer that is true; fails when `up` ends before, or after long patience."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (answer := holds()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.story}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.story}"
            time.sleep(POLL_SECONDS)
        return answer

    def until_step(self, step: int) -> None:
        self.until(lambda: any(row["step"] >= step for row in self.steps), f"step {step}")

    def until_says(self, text: str) -> None:
        self.until(lambda: text in self.printed, f"{text!r}")

    def until_serving(self, replicas: Set[str]) -> None:
        """Until the learner has confirmed that all of them serve some version."""

        def are_serving() -> bool:
            told = dict(self.learner_status().replicas)
            return {name for name, says in told.items() if says.startswith("serves")} == replicas

        self.until(are_serving, f"{', '.join(sorted(replicas))} to serve")

    def wait(self, status: int) -> None:
        """Wait for the end; fails unless it comes with this exit status."""
        self.process.wait(PATIENCE_SECONDS)
        assert self.process.returncode == status, self.story

    @property
    def story(self) -> str:
        """What a person needs who reads of the failure."""
        logs = sorted((self.run / "logs").glob("*.log"))
        tails = [f"--- {log.name}\n{log.read_text('utf8', 'replace')[-2000:]}" for log in logs]
        return "\n".join([self.printed, self.errors, *tails])

    def pid_of(self, service: str, name: str) -> int:
        """The process of `python -m services.SERVICE ... --name NAME`."""
        found = [
            pid
            for pid in processes_in(self.folder)
            if _is_service(_command(pid), f"services.{service}", name)
        ]
        assert len(found) == 1, (name, found)
        return found[0]

    def members(self) -> dict[str, Member]:
        """Who holds a lease, by name."""

        async def look() -> list[Member]:
            client = connect(self.redis_url, timeout_seconds=CALL_SECONDS)
            try:
                return await Registry(client, prefix=key_prefix(RUN_ID)).members()
            finally:
                await client.aclose()

        return {member.name: member for member in asyncio.run(look())}

    def learner_status(self) -> learner_pb.GetLearnerStatusResponse:
        with self.learner() as learner:
            return learner.GetStatus(learner_pb.GetLearnerStatusRequest(), timeout=CALL_SECONDS)

    def until_members(self, names: Set[str]) -> dict[str, Member]:
        """Those who hold a lease, once all of `names` do: on a busy machine one may run out."""

        def are_there() -> dict[str, Member]:
            found = self.members()
            return found if names <= found.keys() else {}

        return self.until(are_there, f"the leases of {', '.join(sorted(names))}")

    @contextmanager
    def learner(self) -> Iterator[learner_pb2_grpc.LearnerStub]:
        with self.open(self.until_members({"learner"})["learner"]) as channel:
            yield learner_pb2_grpc.LearnerStub(channel)

    def open(self, member: Member) -> grpc.Channel:
        """A channel to a service, with an operator's certificate."""
        shown = Credentials.of_role(self.folder / "tls", OPERATOR).current()
        options = peer_options(member.role)
        return grpc.secure_channel(member.address, shown.channel_credentials(), options=options)

    def rollout_status(self, member: Member) -> rollout_pb.GetRolloutStatusResponse:
        with self.open(member) as channel:
            stub = rollout_pb2_grpc.RolloutStub(channel)
            return stub.GetStatus(rollout_pb.GetRolloutStatusRequest(), timeout=CALL_SECONDS)

    def scrape(self, member: Member) -> dict[str, Metric]:
        """The service's `/metrics`, by family."""
        text = self._get(member, "/metrics", {"Authorization": f"Bearer {TOKEN}"})
        return {family.name: family for family in text_string_to_metric_families(text)}

    def probe(self, member: Member) -> str:
        """What a kubelet without a certificate is told; an error unless that is well."""
        return self._get(member, "/health/", {}) + self._get(member, f"/health/{PROGRESS}", {})

    def _get(self, member: Member, path: str, headers: dict[str, str]) -> str:
        asked = urllib.request.Request(f"https://{member.metrics_address}{path}", headers=headers)
        trusted = ssl.create_default_context(cafile=self.folder / "tls" / OPERATOR / "ca.crt")
        trusted.check_hostname = False  # the name is `metrics.isentrope`, wherever it is
        with urllib.request.urlopen(asked, timeout=CALL_SECONDS, context=trusted) as answer:
            text: str = answer.read().decode()
        return text

    @contextmanager
    def paused(self, *, after_step: int | None = None) -> Iterator[None]:
        """The learner between two steps, at once or after this one, and nothing changing."""
        with self.learner() as learner:
            # Connected by then, so that the order comes long before the run's end.
            learner.GetStatus(learner_pb.GetLearnerStatusRequest(), timeout=CALL_SECONDS)
            if after_step is not None:
                self.until_step(after_step)
            learner.Pause(learner_pb.PauseRequest(), timeout=CALL_SECONDS)
            self.until(lambda: self.learner_status().activity.startswith("is paused"), "the pause")
            try:
                yield
            finally:
                learner.Resume(learner_pb.ResumeRequest(), timeout=CALL_SECONDS)

    def end(self) -> None:
        """Nobody of this run is left, however the test went."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in processes_in(self.folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def write_run_file(
    folder: Path, *, model: Path, num_steps: int, max_staleness: int, num_replicas: int = 2
) -> Path:
    (folder / "tmp").mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(
        RUN_FILE.format(
            num_steps=num_steps,
            directory=folder,
            model=model,
            max_staleness=max_staleness,
            num_replicas=num_replicas,
            evaluated_every=EVALUATED_EVERY,
        )
    )
    return path


def sample(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The value of one series."""
    [value] = [
        each.value
        for family in families.values()
        for each in family.samples
        if each.name == name and each.labels == labels
    ]
    return value


def processes_in(folder: Path) -> list[int]:
    """Running processes that work in `folder`, or name it in their arguments or environment."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _belongs(entry, folder)
    ]


def children_of(pid: int) -> list[int]:
    """Every process that one of its threads started, and they."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    listed = [int(child) for thread in threads for child in thread.read_text().split()]
    return [each for child in listed for each in (child, *children_of(child))]


def positions(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Places in the prompt order, (epoch, index), in the order in which they were trained."""
    return [(epoch, index) for row in rows for epoch, index, _ in row["trained"]]


def _inherited() -> dict[str, str]:
    """This process's environment, without what would be told to the run besides its file."""
    told = (
        "REDIS_URL",
        "ISENTROPE_HOST",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "PYTEST_CURRENT_TEST",
    )
    return {name: value for name, value in os.environ.items() if name not in told}


def _belongs(process: Path, folder: Path) -> bool:
    try:
        if not _is_running(process):
            return False
        told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        return Path(os.readlink(process / "cwd")) == folder or os.fsencode(folder) in told
    except OSError:
        return False  # it ended while we looked


def _is_running(process: Path) -> bool:
    """False for one that is gone or waits to be reaped."""
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def _is_service(command: Sequence[str], module: str, name: str) -> bool:
    return module in command and "--name" in command and name in command
