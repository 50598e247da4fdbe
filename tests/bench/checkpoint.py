"""How long training waits for a checkpoint, and how long the checkpoint takes in all.

    python -m tests.bench.checkpoint

A real `LearnerEngine` of 25 M parameters, 0.4 GB of weights and optimiser state, on one rank. In
turns: a step alone; a checkpoint alone, which is a copy to the host's memory and then the files;
steps while one is written; and a checkpoint that training waits for, without a copy. Medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from rich.table import Table

from services.learner.checkpoint import write_checkpoint
from services.learner.engine import LearnerEngine
from services.learner.snapshot import Snapshot
from shared.config import Environment, RunConfig
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.learner_groups import CPU_SIZES, random_groups, save_model

RESULT = RESULTS / "checkpoint.json"
SIZE = "25M"


class Turn(NamedTuple):
    """Seconds of one turn, and the size of its checkpoint in bytes.

    `blocking` is the copy that training waits for; `durable` is from its begin until the disk has
    the checkpoint; `waiting` the same where training waits for the disk; `beside` of a step that is
    trained while a checkpoint is written, `alone` of one that is not.
    """

    alone: float
    blocking: float
    durable: float
    beside: float
    waiting: float
    num_bytes: int


def seconds_of(work: Callable[[], object]) -> float:
    """On the clock of the wall: a disk is waited for."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Bench:
    """One engine, its batch and a folder for its checkpoints."""

    def __init__(self, folder: Path) -> None:
        size = CPU_SIZES[SIZE]
        save_model(size, folder / "model")
        config = RunConfig.model_validate(
            {
                "run": {"name": "bench", "num_steps": 1000},
                "model": {"path": str(folder / "model"), "max_length": 4096},
                "learner": {"micro_batch_tokens": size.micro_batch_tokens, "zero_stage": 1},
            }
        )
        self._engine = LearnerEngine.start(config, config.model_path, Environment.read({}))
        self._groups = random_groups(size)
        self._folder = folder / "checkpoints"
        self._step = 0

    def turn(self) -> Turn:
        """Every kind of wait once."""
        alone = seconds_of(self.train)
        blocking, durable, num_bytes = self._checkpoint()
        waiting = seconds_of(self._wait_for_checkpoint)
        return Turn(alone, blocking, durable, self._step_beside(), waiting, num_bytes)

    def train(self) -> None:
        """One step."""
        self._step += 1
        self._engine.train(self._groups, step=self._step, policy_version=self._step - 1)

    def close(self) -> None:
        self._engine.close()

    def _checkpoint(self) -> tuple[float, float, int]:
        started = time.perf_counter()
        snapshot = self._engine.snapshot(copies=True)
        blocking = time.perf_counter() - started
        folder = self._write(snapshot)
        durable = time.perf_counter() - started
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return blocking, durable, num_bytes

    def _wait_for_checkpoint(self) -> None:
        self._write(self._engine.snapshot(copies=False))

    def _step_beside(self) -> float:
        """A step that is begun with the writing, and may last longer than it."""
        snapshot = self._engine.snapshot(copies=True)
        writing = Thread(target=self._write, args=(snapshot,))
        writing.start()
        seconds = seconds_of(self.train)
        writing.join()
        return seconds

    def _write(self, snapshot: Snapshot) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        with snapshot:
            return write_checkpoint(
                self._folder, step=self._step, state={}, save_engine=snapshot.write
            )


def table(turn: Turn, caption: str) -> Table:
    made = Table(title=f"A checkpoint of {turn.num_bytes / 1e9:.2f} GB", caption=caption)
    made.add_column("what")
    made.add_column("seconds", justify="right")
    for what, seconds in (
        ("training waits for the copy", turn.blocking),
        ("until the disk has it", turn.durable),
        ("training waits for the disk (checkpoint.asynchronous = false)", turn.waiting),
        ("a step", turn.alone),
        ("a step while a checkpoint is written", turn.beside),
    ):
        made.add_row(what, f"{seconds:.2f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="How long training waits for a checkpoint.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else a temporary one")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    screen, turns = console(), []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(Path(folder))
        bench.train()
        with Progressing(screen, given.turns) as progress:
            for number in range(given.turns):
                turns.append(bench.turn())
                progress.advance(f"turn {number + 1}")
        bench.close()
    median = Turn(*(statistics.median(each) for each in zip(*turns, strict=True)))
    setting = Setting.of(
        f"tests.bench.checkpoint --turns {given.turns}", packages=("torch", "deepspeed")
    )
    screen.print(table(median, str(setting)))
    write_result(
        given.result, setting, median=median._asdict(), turns=[each._asdict() for each in turns]
    )


if __name__ == "__main__":
    main()
