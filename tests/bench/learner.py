"""How fast the learner is: tokens a second, use of the hardware, memory, where the time goes.

    python -m tests.bench.learner                  measure, and store as the baseline
    python -m tests.bench.learner --check          measure, and fail if worse than the baseline

Real `LearnerEngine`s train on random tokens of long-tailed lengths; three sizes, larger ones on a
GPU. Each runs in a process of its own: the first step is left out, and before and after every other
one the matmul peak of that moment is measured, to which the step is compared. Operations are those
that the step needs, from the model's dimensions (attention counted causally, the output embedding
for completion tokens only): one forward pass to measure, and a forward and a backward one to
train, 4 forward passes in all. What is computed again or for padding is not counted.

What `--check` compares are ratios, to the peak and to the bytes of weights, gradients and Adam's
moments, so that a busy or slower machine of the same kind passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from services.learner.engine import LearnerEngine
from shared.config import Environment, RunConfig
from shared.records import ScoredGroup
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.learner_groups import CPU_SIZES, GPU_SIZES, Size, random_groups, save_model
from tests.bench.learner_phases import (
    PHASES,
    Stopwatch,
    matmul_flops,
    peak_memory,
    put_stopwatch,
    reset_peak_memory,
)

RESULT = RESULTS / "learner.json"
LIBRARIES = ("torch", "deepspeed", "transformers")
FORWARDS_TO_TRAIN, FORWARDS_A_STEP = 3, 4
TOLERANCE = 0.15
SECONDS_A_SIZE = 3600.0
MIB = 2**20


class Row(NamedTuple):
    """A size; medians over the steps.

    `step_utilisation` is of the whole step, `train_utilisation` of forward, backward and
    optimiser. `memory_ratio` is the peak over weights, gradients and moments.
    """

    size: str
    parameters: int
    dtype: str
    threads: int
    tokens: int
    predictions: int
    steps: int
    seconds: float
    tokens_per_second: float
    peak_gflops: float
    step_utilisation: float
    train_utilisation: float
    peak_mib: float
    memory_ratio: float
    shares: dict[str, float]


class Step(NamedTuple):
    """One step's seconds, by phase too, and the matmul peak of the moment in operations/s."""

    seconds: float
    phases: Mapping[str, float]
    peak: float

    @property
    def train_seconds(self) -> float:
        return sum(self.phases[name] for name in ("forward", "backward", "optimiser"))


def sizes() -> Mapping[str, Size]:
    """Of this machine."""
    return GPU_SIZES if torch.cuda.is_available() else CPU_SIZES


def run_config(size: Size, threads: int) -> RunConfig:
    """The default objective; a learning rate that moves nothing."""
    return RunConfig.model_validate(
        {
            "run": {"name": "bench", "num_steps": 1},
            "model": {"path": "bench", "dtype": size.dtype, "max_length": 32768},
            "learner": {
                "groups_per_batch": size.groups,
                "learning_rate": 1e-12,
                "micro_batch_tokens": size.micro_batch_tokens,
                "threads": threads,
            },
            "diagnostics": {"entropy_change_every_steps": 0},
        }
    )


def forward_operations(engine: LearnerEngine, groups: Sequence[ScoredGroup]) -> int:
    """Of one forward pass over the batch."""
    cost = engine._trainer._model.cost
    return sum(
        cost.of(len(group.rollout.prompt.prompt_token_ids) + length, length)
        for group in groups
        for length in (len(each.token_ids) for each in group.rollout.completions)
    )


def measure(name: str, threads: int, num_steps: int | None) -> Row:
    """One size, in this process."""
    size = sizes()[name]
    torch.set_num_threads(threads)
    config, groups = run_config(size, threads), random_groups(size)
    stopwatch = Stopwatch(by_cpu=threads == 1 and not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, Path(folder))
        engine = LearnerEngine.start(config, folder, Environment.read({}))
    parameters = sum(weight.numel() for _, weight in engine.weights())
    put_stopwatch(engine, config, stopwatch)
    engine.train(groups, step=1, policy_version=0)  # the first allocates
    reset_peak_memory()
    steps = [_step(engine, groups, stopwatch, size) for _ in range(num_steps or size.steps)]
    memory = peak_memory()
    operations = forward_operations(engine, groups)
    engine.close()
    return _row(name, parameters, threads, groups, operations, memory, steps)


def _step(
    engine: LearnerEngine, groups: Sequence[ScoredGroup], stopwatch: Stopwatch, size: Size
) -> Step:
    dtype = getattr(torch, size.dtype)
    before = matmul_flops(dtype, stopwatch)
    stopwatch.seconds.clear()
    started = stopwatch.now()
    engine.train(groups, step=1, policy_version=0)
    seconds = stopwatch.now() - started
    phases = dict(stopwatch.seconds)
    phases["other"] = seconds - sum(phases.values())
    return Step(seconds, phases, (before + matmul_flops(dtype, stopwatch)) / 2)


def _row(
    name: str,
    parameters: int,
    threads: int,
    groups: Sequence[ScoredGroup],
    operations: int,
    memory: int,
    steps: Sequence[Step],
) -> Row:
    size = sizes()[name]
    lengths = [len(each.token_ids) for group in groups for each in group.rollout.completions]
    prompts = sum(len(group.rollout.prompt.prompt_token_ids) for group in groups) * size.group_size
    seconds = statistics.median(step.seconds for step in steps)
    # In bfloat16 DeepSpeed keeps a float32 master beside the weights.
    per_parameter = 16 if size.dtype == "float32" else 2 + 4 + 4 + 8
    return Row(
        size=name,
        parameters=parameters,
        dtype=size.dtype,
        threads=threads,
        tokens=prompts + sum(lengths),
        predictions=sum(lengths),
        steps=len(steps),
        seconds=round(seconds, 4),
        tokens_per_second=round((prompts + sum(lengths)) / seconds, 1),
        peak_gflops=round(statistics.median(step.peak for step in steps) / 1e9, 1),
        step_utilisation=_utilisation(
            FORWARDS_A_STEP * operations, [(step.seconds, step.peak) for step in steps]
        ),
        train_utilisation=_utilisation(
            FORWARDS_TO_TRAIN * operations, [(step.train_seconds, step.peak) for step in steps]
        ),
        peak_mib=round(memory / MIB, 1),
        memory_ratio=round(memory / (per_parameter * parameters), 3),
        shares={
            phase: round(statistics.median(step.phases[phase] / step.seconds for step in steps), 4)
            for phase in PHASES
        },
    )


def _utilisation(operations: int, times: Sequence[tuple[float, float]]) -> float:
    return round(statistics.median(operations / seconds / peak for seconds, peak in times), 4)


def regressions(
    rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], tolerance: float
) -> list[str]:
    """A line for each ratio that is worse than the baseline's by more than the tolerance."""
    stored = {row["size"]: row for row in baseline}
    found = []
    for row in rows:
        name = row["size"]
        if name not in stored:
            found.append(f"{name}: not in the baseline; measure it there first, without --check")
            continue
        for key, sign in (("step_utilisation", -1), ("memory_ratio", 1)):
            now, then = row[key], stored[name][key]
            if sign * (now / then - 1) > tolerance:
                found.append(f"{name}: {key} {then} was, {now} is, beyond {tolerance:.0%}")
    return found


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="A learner's step", caption=caption)
    made.add_column("size")
    columns = ("parameters", "tokens", "tokens/s", "matmul peak", "step", "training", "memory")
    for name in (*columns, *PHASES):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            row.size,
            f"{row.parameters / 1e6:.1f} M",
            str(row.tokens),
            f"{row.tokens_per_second:.0f}",
            f"{row.peak_gflops:.0f} GFLOP/s",
            f"{row.step_utilisation:.0%}",
            f"{row.train_utilisation:.0%}",
            f"{row.peak_mib:.0f} MiB",
            *(f"{row.shares[phase]:.0%}" for phase in PHASES),
        )
    return made


def _in_child(name: str, given: argparse.Namespace) -> Row:
    command = [sys.executable, "-m", "tests.bench.learner", "--one", name]
    command += ["--threads", str(given.threads)]
    if given.steps:
        command += ["--steps", str(given.steps)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS_A_SIZE
    )
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast the learner is.")
    parser.add_argument("--sizes", nargs="+", choices=list(sizes()), default=list(sizes()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each size; else as many as it says")
    parser.add_argument("--check", action="store_true", help="compare with the baseline")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--result", type=Path, default=RESULT, help="the baseline")
    parser.add_argument("--one", choices=list(sizes()), help="only print this size's row")
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    if given.one:
        print(json.dumps(measure(given.one, given.threads, given.steps)._asdict()))
        return
    screen, rows = console(), []
    with Progressing(screen, len(given.sizes)) as progress:
        for name in given.sizes:
            rows.append(_in_child(name, given))
            progress.advance(name)
    command = f"tests.bench.learner --threads {given.threads} --sizes {' '.join(given.sizes)}"
    setting = Setting.of(command, packages=LIBRARIES)
    screen.print(table(rows, str(setting)))
    measured = [row._asdict() for row in rows]
    if not given.check:
        write_result(given.result, setting, rows=measured)
        return
    stored = json.loads(given.result.read_text("utf8"))
    if stored["machine"] != setting.machine:
        screen.print(f"the baseline is of another machine: {stored['machine']}")
    for line in (found := regressions(measured, stored["rows"], given.tolerance)):
        screen.print(line)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
