"""A real learner process fed by one producer whose answers depend on the prompt's place alone.

The process is forked from a server that has imported torch and DeepSpeed once. It can be told to
kill itself at an exact moment, which Python's audit events give without a change to our code.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc
from services.cli.audit import Audit, audit
from services.cli.measurements import is_step, read_rows
from shared.codec import decode_prompt_group, encode_scored_group
from shared.errors import StreamError
from shared.lease import Registry
from shared.records import (
    Completion,
    Outcome,
    PromptGroup,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds
from tests.forked import FORKED, redirect_output

PATIENCE_SECONDS = 240.0
POLL_SECONDS = 0.05
NUM_STEPS = 15
GROUPS_PER_BATCH = 2
SEED = 5

RUN_FILE = """
[run]
name = "recorded"
num_steps = {num_steps}
seed = {seed}
directory = "{directory}"
[model]
path = "{model}"
max_length = 32
[task]
name = "countdown"
params = {{ numbers = 2 }}
[advantage]
dynamic_sampling = true
[policy_loss]
loss_mode = "clip_cov"
clip_cov_ratio = 0.05
clip_cov_lb = 0.001
clip_cov_ub = 100.0
[entropy]
method = "aent"
entropy_coeff = 0.003
[rollout]
group_size = 4
max_completion_tokens = 12
[learner]
groups_per_batch = {groups_per_batch}
max_staleness = 16
learning_rate = 1e-3
[evaluation]
every_steps = 4
num_problems = 4
group_size = 2
[checkpoint]
every_steps = 3
[redis]
reconcile_seconds = 0.5
reclaim_seconds = 1.0
"""

VOLATILE = (
    "time",
    "seconds",
    "wait_data",
    "queue_",
    "dropped_",
    "law_",
    "eval_",
    "tokens_per_second",
)
"""Parts of the names of metrics that are of the clock, of the process or of the evaluations."""


@dataclass(frozen=True, slots=True)
class Death:
    """When a learner kills itself: before it opens this file, once it has renamed to that."""

    opens: str
    after_renaming_to: str = ""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run in a folder, on the Redis at `redis_url`."""

    folder: Path
    model: Path
    redis_url: str

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def run_file(self) -> Path:
        return self.folder / "run.toml"

    def prepare(self) -> None:
        self.folder.mkdir()
        self.run_file.write_text(
            RUN_FILE.format(
                num_steps=NUM_STEPS,
                seed=SEED,
                groups_per_batch=GROUPS_PER_BATCH,
                directory=self.folder.parent,
                model=self.model,
            )
        )

    def start(self, *, resume: bool = False, death: Death | None = None) -> Any:
        process = FORKED.Process(target=_be_a_learner, args=(self, resume, death), daemon=True)
        process.start()
        return process

    async def until(self, holds: Callable[[], object], process: Any) -> None:
        """Wait until it holds; fails if the learner ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert process.is_alive(), self.log
            assert time.monotonic() < deadline, self.log
            await asyncio.sleep(POLL_SECONDS)

    async def until_ended(self, process: Any, *, exit_code: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.is_alive():
            assert time.monotonic() < deadline, self.log
            await asyncio.sleep(POLL_SECONDS)
        assert process.exitcode == exit_code, self.log

    @property
    def log(self) -> str:
        return (self.folder / "learner.log").read_text("utf8", "replace")[-6000:]

    @property
    def steps(self) -> list[dict[str, Any]]:
        rows = read_rows(self.folder / "metrics.jsonl")
        return [dict(row) for row in rows if is_step(row)]

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [dict(row) for row in read_rows(self.folder / "ledger.jsonl")]

    @property
    def num_skipped(self) -> int:
        return sum(len(row["skipped"]) for row in self.ledger)

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    @property
    def measured(self) -> list[dict[str, Any]]:
        """What each step measured of the model and the data."""
        return [
            {name: value for name, value in row.items() if not any(v in name for v in VOLATILE)}
            for row in self.steps
        ]

    @property
    def trained(self) -> list[list[list[int]]]:
        return [row["trained"] for row in self.ledger]

    @property
    def weights(self) -> dict[str, bytes]:
        files = (self.folder / "model").glob("*.safetensors")
        return {path.name: path.read_bytes() for path in files}

    def audit(self) -> Audit:
        rows = read_rows(self.folder / "metrics.jsonl")
        return audit(self.ledger, rows, seed=SEED, num_steps=NUM_STEPS)

    @asynccontextmanager
    async def streams(self) -> AsyncIterator[Streams]:
        async with open_streams(
            self.redis_url,
            run_id=self.run_id,
            prompts=Bounds(4096, 1 << 28),
            groups=Bounds(4096, 1 << 28),
            timeout_seconds=20.0,
            retries=1,
        ) as opened:
            yield opened

    async def until_known(self, process: Any) -> str:
        """The address of the learner's gRPC service."""
        async with self.streams() as streams:
            registry = Registry(streams.client, prefix=streams.prefix)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not (members := await registry.members("learner")):
                assert process.is_alive(), self.log
                assert time.monotonic() < deadline, self.log
                await asyncio.sleep(POLL_SECONDS)
            return members[0].address

    async def until_says(self, address: str, words: str, process: Any) -> None:
        """Until the learner's account of itself has these words."""
        said = ""

        def says() -> bool:
            nonlocal said
            with grpc.insecure_channel(address) as channel:
                stub = learner_pb2_grpc.LearnerStub(channel)
                said = stub.GetStatus(pb.GetLearnerStatusRequest(), timeout=60).activity
            return words in said

        await self.until(says, process)

    @asynccontextmanager
    async def produced(self) -> AsyncIterator[Gate]:
        """Prompts are answered meanwhile, one at a time and in their order, as the gate lets."""
        gate = Gate()
        async with self.streams() as streams:
            task = asyncio.create_task(_produce(streams, gate))
            try:
                yield gate
            finally:
                task.cancel()
                await asyncio.wait({task})


class Gate:
    """Open at first. One that lets only so many prompts be answered keeps a learner from its end,
    however long the test takes for what it does next."""

    def __init__(self) -> None:
        self._left = math.inf
        self._is_open = asyncio.Event()
        self._is_open.set()

    def open(self) -> None:
        """For all that come."""
        self.let(math.inf)

    def close(self) -> None:
        """For everybody."""
        self.let(0)

    def let(self, count: float) -> None:
        """For so many from now on."""
        self._left = count
        if count > 0:
            self._is_open.set()
        else:
            self._is_open.clear()

    async def wait(self) -> None:
        """Until it is open."""
        await self._is_open.wait()

    def count(self) -> None:
        """One has passed."""
        self.let(self._left - 1)


async def _produce(streams: Streams, gate: Gate) -> None:
    while True:
        await gate.wait()
        try:
            # What an earlier producer, or a lost reply, left pending is older: it comes first.
            for entry in [
                *await streams.prompts.pending("producer"),
                *await streams.prompts.claim("producer", count=1, wait_seconds=0.2),
            ]:
                payload = encode_scored_group(answered(decode_prompt_group(entry.payload)))
                await streams.prompts.finish(entry, output=streams.scored, payload=payload)
                gate.count()
        except StreamError:
            await asyncio.sleep(POLL_SECONDS)


def answered(prompt: PromptGroup) -> ScoredGroup:
    """Completions and scores that depend on the prompt's place alone; one in four is all wrong."""
    draw = Random(f"{prompt.purpose}/{prompt.uid.epoch}/{prompt.uid.index}")
    chance = 0.0 if draw.random() < 0.25 else 0.5
    completions, scores = [], []
    for _ in range(prompt.group_size):
        length = draw.randint(3, 12)
        token_ids = array("I", [draw.randrange(1, 15) for _ in range(length)])
        logprobs = array("f", [-draw.random() * 4 for _ in range(length)])
        completions.append(Completion(token_ids, logprobs, (VersionRun(0, length),), False))
        passed = draw.random() < chance
        scores.append(Score(Outcome.PASS if passed else Outcome.FAIL, float(passed), ""))
    rollout = RolloutGroup(prompt, tuple(completions), "producer", 0.0)
    return ScoredGroup(rollout, tuple(scores), "producer", 0.0)


def _be_a_learner(run: RecordedRun, resume: bool, death: Death | None) -> None:
    """In the forked process: `python -m services.learner`, from its arguments on."""
    from services.learner.__main__ import main
    from shared.process import run_service

    redirect_output(run.folder / "learner.log")
    os.environ["REDIS_URL"] = run.redis_url
    if death is not None:
        _arrange(death)
    arguments = ["--config", str(run.run_file), "--run-id", run.run_id, "--name", "learner"]
    sys.exit(run_service("learner", main, arguments + ["--resume"] * resume))


def _arrange(death: Death) -> None:
    is_armed = not death.after_renaming_to

    def listen(event: str, args: tuple[Any, ...]) -> None:
        nonlocal is_armed
        if event == "os.rename" and death.after_renaming_to:
            is_armed = is_armed or str(args[1]).endswith(death.after_renaming_to)
        elif event == "open" and is_armed and str(args[0]).endswith(death.opens):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
