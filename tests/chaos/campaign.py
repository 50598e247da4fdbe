"""One campaign: a run, faults one after another, the run's end in order, and the reckoning."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from services.cli.launch import plan_warmup
from services.cli.measurements import latest, read_rows
from services.cli.run_folder import RunFolder, new_run
from shared.config import load_run
from shared.config.learner import LearnerConfig
from shared.stream import DEAD_LETTER
from tests.chaos.disk import SmallDisk, small_disk
from tests.chaos.faults import FAULTS, Scene
from tests.chaos.reckoning import Finding, num_wrong_so_far, reckon
from tests.chaos.stack import ChaosError, Exit, Say, Stack
from tests.end_to_end.real_run import processes_in

RECOVERY_SECONDS = 300.0
"""A step must end within this after a fault is over."""

ENDLESS = 1_000_000

RUN_FILE = """
[run]
name = "chaos"
num_steps = {num_steps}
seed = {seed}
directory = "{directory}"
[model]
{model}
max_length = 32
{warmup}
[task]
name = "countdown"
params = {{ numbers = 2 }}
[rollout]
num_replicas = 2
group_size = 4
max_completion_tokens = 16
max_concurrent_groups = 2
kv_cache_mib = 64
[verifier]
num_replicas = 2
max_concurrent_groups = 4
[learner]
groups_per_batch = 4
max_staleness = 1
learning_rate = 1e-4
[weights]
timeout_seconds = 5.0
[evaluation]
every_steps = 25
num_problems = 8
group_size = 2
[checkpoint]
every_steps = 5
[redis]
reclaim_seconds = 2.0
[network]
lease_seconds = 2.0
call_timeout_seconds = 20.0
"""

WARMUP = """
[warmup]
num_steps = 120
batch_size = 48
hidden_size = 64
num_layers = 2
num_heads = 2
intermediate_size = 128
"""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done.

    Attributes:
        kinds: of faults, in this order; it may be endless.
        seconds: no fault begins later than this after the run's first step.
        calm_seconds: least and most time between a recovery and the next fault.
        model: folder of a model, None to train one.
    """

    folder: Path
    kinds: Iterator[str]
    seconds: float
    seed: int
    calm_seconds: tuple[float, float]
    model: Path | None = None


@dataclass(frozen=True, slots=True)
class Struck:
    """One fault and how the run took it; seconds from when it began.

    Attributes:
        next_step: until a step ended, None if none did within the bound.
        standstill: the longest time without an end of a step until it had recovered.
        was_whole: every service was there, none still starting after an earlier fault.
        num_wrong: prompts lost, trained twice or trained too stale since the fault before.
        exits: services that ended by themselves meanwhile.
    """

    kind: str
    whom: str
    at: float
    step: int
    lasted: float
    next_step: float | None
    standstill: float
    was_whole: bool
    num_wrong: int
    exits: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """Everything there is to report.

    Attributes:
        load: processes that wanted a processor, mean of the last 15 minutes, at start and end.
    """

    order: Order
    left_out: tuple[str, ...] = ()
    struck: list[Struck] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    num_steps: int = 0
    seconds: float = 0.0
    load: tuple[float, ...] = ()
    trouble: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, and the run recovered from everything."""
        recovered = all(each.next_step is not None for each in self.struck)
        return not self.trouble and recovered and all(each.holds for each in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.order.seed,
            "seconds": self.seconds,
            "num_steps": self.num_steps,
            "num_faults": len(self.struck),
            "load": self.load,
            "is_good": self.is_good,
            "trouble": self.trouble,
            "left_out": self.left_out,
            "faults": [asdict(each) for each in self.struck],
            "exits": [asdict(each) for each in self.exits],
            "findings": [asdict(each) for each in self.findings],
        }


def run_campaign(order: Order, *, say: Say) -> Outcome:
    """Start the run, strike it, end it, and look at what is left."""
    order.folder.mkdir(parents=True, exist_ok=True)
    run_file = order.folder / "run.toml"
    run_file.write_text(_run_file(order, num_steps=ENDLESS), "utf8")
    config = load_run(run_file)
    # Redis' data is elsewhere: a server that cannot write refuses everything, which is no fault of
    # the run's own disk.
    with small_disk(Path(config.run.directory)) as disk:
        if order.model is None:
            say("training the warm-up model")
            warmup = plan_warmup(config, run_file)
            subprocess.run(
                warmup.command, check=True, timeout=600, stdout=subprocess.DEVNULL,
                env={**os.environ, **warmup.environment},
            )  # fmt: skip
        folder = new_run(config, run_file, "chaos")
        campaign = _Campaign(order, folder, order.folder / "redis", disk, say)
        return asyncio.run(campaign.run())


class _Campaign:
    def __init__(
        self, order: Order, folder: RunFolder, redis: Path, disk: SmallDisk | None, say: Say
    ) -> None:
        self._order = order
        self._folder = folder
        self._redis = redis
        self._say = say
        self._disk = disk
        self._outcome = Outcome(order)
        self._num_wrong = 0
        self._others = processes_in(folder.path)
        if disk is None:
            self._outcome.left_out = ("disk full: no right to mount a file system",)

    async def run(self) -> Outcome:
        """The outcome; errors of the run are in it."""
        started, outcome = time.monotonic(), self._outcome
        load = os.getloadavg()[-1]
        contents: dict[str, list[bytes]] = {}
        async with Stack(self._folder, self._redis, self._say) as stack:
            scene = Scene(stack, Random(self._order.seed), self._disk)
            try:
                await self._begin(stack)
                await self._strike(scene)
                contents = await self._finish(stack)
                contents[DEAD_LETTER] += scene.letters
            except ChaosError as error:
                outcome.trouble = str(error)
            outcome.exits = stack.exits
        if not outcome.trouble:
            outcome.findings = [
                *reckon(self._folder, contents, scene.poison, self._others),
                Finding(
                    "no service ended by itself",
                    not stack.exits,
                    f"{len(stack.exits)} ends that no fault had asked for",
                ),
            ]
        outcome.load = (load, os.getloadavg()[-1])
        outcome.num_steps, outcome.seconds = stack.steps.newest, time.monotonic() - started
        return outcome

    async def _begin(self, stack: Stack) -> None:
        self._say("starting the services")
        await stack.until_whole()
        if not await stack.has_stepped(since=0.0, timeout_seconds=RECOVERY_SECONDS):
            raise ChaosError(f"no step ended within {RECOVERY_SECONDS:.0f} s of the start")
        self._say("all services are up")

    async def _strike(self, scene: Scene) -> None:
        deadline = time.monotonic() + self._order.seconds
        kinds = (kind for kind in self._order.kinds if "disk" not in kind or scene.disk)
        for kind in kinds:
            await asyncio.sleep(scene.random.uniform(*self._order.calm_seconds))
            if time.monotonic() > deadline:
                return
            struck = await self._fault(scene, kind)
            self._outcome.struck.append(struck)
            self._say(_line(struck))

    async def _fault(self, scene: Scene, kind: str) -> Struck:
        stack, num_exits = scene.stack, len(scene.stack.exits)
        was_whole = stack.is_whole
        scene.begin()
        whom = await FAULTS[kind](scene)
        stack.steps.look()
        over = time.monotonic()
        has_recovered = await stack.has_stepped(since=over, timeout_seconds=RECOVERY_SECONDS)
        began, after = scene.began, stack.steps.after(scene.began)
        moments = [scene.last_step_at, *after, *([] if has_recovered else [time.monotonic()])]
        return Struck(
            kind,
            whom,
            at=began,
            step=scene.step,
            lasted=over - began,
            next_step=after[0] - began if has_recovered else None,
            standstill=max(end - start for start, end in pairwise(moments)),
            was_whole=was_whole,
            num_wrong=self._num_wrong_since(),
            exits=tuple(f"{each.name} {each.how}" for each in stack.exits[num_exits:]),
        )

    def _num_wrong_since(self) -> int:
        before, self._num_wrong = self._num_wrong, num_wrong_so_far(self._folder)
        return max(0, self._num_wrong - before)

    async def _finish(self, stack: Stack) -> dict[str, list[bytes]]:
        """End the run in order; what the streams hold then."""
        self._say("waiting until everybody who was killed is back")
        await stack.until_whole()
        self._say(f"the run is to end soon after step {stack.steps.newest}")
        await stack.end_learner()
        # As many steps more as groups may be outstanding, so that none is left over.
        last = int(latest(read_rows(self._folder.metrics), "step") or 0)
        last += self._steps_for_what_is_out(stack.config.learner)
        await stack.finish(_run_file(self._order, num_steps=last))
        streams = stack.streams
        return {each.name: await each.peek() for each in (*streams.sources, streams.dead_letter)}

    def _steps_for_what_is_out(self, learner: LearnerConfig) -> int:
        """After a crash more may be out than admission lets out."""
        rows = read_rows(self._folder.ledger)
        num_batches = math.ceil(len(rows[-1]["outstanding"]) / learner.groups_per_batch)
        return max(num_batches, learner.max_staleness + 1)


def _run_file(order: Order, *, num_steps: int) -> str:
    return RUN_FILE.format(
        num_steps=num_steps,
        seed=order.seed,
        directory=order.folder / "runs",
        model="" if order.model is None else f'path = "{order.model}"',
        warmup=WARMUP if order.model is None else "",
    )


def _line(struck: Struck) -> str:
    """What is said when a fault is over."""
    recovered = (
        "no step within the bound"
        if struck.next_step is None
        else f"next step after {struck.next_step:.1f} s, longest standstill"
        f" {struck.standstill:.1f} s"
    )
    return f"step {struck.step}: {struck.kind} ({struck.whom}): {recovered}"
