"""What each method adds to a learner's step: paired timings on the real engine, in one process.

    python -m tests.bench.method_cost --rounds small=10 large=6

A plain step (vanilla PPO, no entropy term) comes before and after every step of a method, on the
same batch and the same weights: the learning rate is too small to move any of them. A pair's
overhead is the method's time over the mean of its two neighbours', minus 1; reported are the
median over the rounds and its distribution-free interval of 95 %. `vanilla` against itself shows
the noise. Times are CPU seconds of the process, which has one thread, so that what else runs on
the machine moves them little; seconds by the clock are beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from services.learner.engine import LearnerEngine
from services.learner.training import Trainer
from shared.config import Environment, RunConfig
from tests.bench.benchmark import (
    RESULTS,
    Progressing,
    Setting,
    console,
    median_interval,
    write_result,
)
from tests.bench.learner_groups import Size as BatchSize
from tests.bench.learner_groups import random_groups

RESULT = RESULTS / "method-cost.json"
LIBRARIES = ("torch", "deepspeed", "transformers")

Document = dict[str, dict[str, Any]]

COVARIANCE_METHODS: dict[str, Document] = {
    f"{mode}, {logprobs}": {"policy_loss": {"loss_mode": mode, "selection_logprobs": logprobs}}
    for mode in ("clip_cov", "kl_cov")
    for logprobs in ("current", "proximal")
}
OTHER_METHODS: dict[str, Document] = {
    "vanilla": {},
    "bonus": {"entropy": {"method": "bonus", "entropy_coeff": 1e-3}},
    "aent": {"entropy": {"method": "aent", "entropy_coeff": 2e-3}},
    "gspo": {"policy_loss": {"loss_mode": "gspo"}},
    "cispo": {"policy_loss": {"loss_mode": "cispo"}},
    "top entropy": {"policy_loss": {"top_entropy_quantile": 0.2}},
    "entropy-ratio clip": {
        "policy_loss": {"entropy_ratio_clip_low": 0.05, "entropy_ratio_clip_high": 0.05}
    },
    "reference KL": {"reference_kl": {"coef": 1e-3}},
    # Of the step that makes the comparison; by default one in ten does.
    "entropy change": {"diagnostics": {"entropy_change_every_steps": 1}},
}
PLAIN: Document = {"diagnostics": {"entropy_change_every_steps": 0}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(BatchSize):
    """A model and a batch."""

    logit_chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of the whole batch, at most."""
        longest = self.prompt_tokens[1] + self.completion_tokens[1]
        return self.groups * self.group_size * longest


SIZES = {
    # The built-in task's model and the demo's batch.
    "small": Size(
        model={
            "vocab_size": 20,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        groups=32,
        group_size=8,
        prompt_tokens=(10, 14),
        completion_tokens=(12, 32),
        logit_chunk_tokens=1024,
    ),
    # The vocabulary of Qwen2.5 on a trunk so small that the logits are nearly the whole cost.
    "large": Size(
        model={
            "vocab_size": 151_936,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        groups=4,
        group_size=4,
        prompt_tokens=(10, 14),
        completion_tokens=(12, 24),
        logit_chunk_tokens=128,
    ),
}


class Layout(NamedTuple):
    """How a batch is cut; `micro_batches` are about how many each optimiser step accumulates."""

    optimizer_steps: int
    micro_batches: int

    def methods(self) -> dict[str, Document]:
        """Covariance methods in every layout, the others where it makes no difference to them."""
        if self == Layout(2, 1):
            return {**OTHER_METHODS, **COVARIANCE_METHODS}
        return COVARIANCE_METHODS


LAYOUTS = [Layout(steps, parts) for parts in (1, 4) for steps in (1, 2, 4)]


class Seconds(NamedTuple):
    """One step's."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A method's step, and the mean of the plain steps before and after it."""

    method: Seconds
    plain: Seconds

    @property
    def cpu_overhead(self) -> float:
        return self.method.cpu / self.plain.cpu - 1

    @property
    def wall_overhead(self) -> float:
        return self.method.wall / self.plain.wall - 1


class Row(NamedTuple):
    """A line of the table; overheads are shares of the plain step."""

    size: str
    optimizer_steps: int
    micro_batches: int
    method: str
    pairs: int
    plain_seconds: float
    overhead: float
    overhead_low: float
    overhead_high: float
    wall_overhead: float


class Bench:
    """One engine, and a trainer for each configuration that shares its weights and optimiser."""

    def __init__(self, size: Size, folder: Path) -> None:
        self._size = size
        _save_model(size, folder)
        # It loads the reference model, which only the trainers of that method ask.
        self._engine = LearnerEngine.start(
            self._config(Layout(1, 1), OTHER_METHODS["reference KL"]),
            str(folder),
            Environment.read({}),
        )
        self._groups = random_groups(size, skew=1.0)

    def close(self) -> None:
        self._engine.close()

    def trainer(self, layout: Layout, method: Document) -> Trainer:
        shared = self._engine._trainer
        return Trainer(self._config(layout, method), shared._model, shared._ranks)

    def time(self, trainer: Trainer) -> Seconds:
        """One step, from scored groups to the report."""
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train(self._groups, step=1, policy_version=0)
        return Seconds(time.process_time() - cpu, time.perf_counter() - wall)

    def _config(self, layout: Layout, method: Document) -> RunConfig:
        tokens = self._size.num_tokens // layout.optimizer_steps // layout.micro_batches
        learner = {
            "groups_per_batch": self._size.groups,
            "optimizer_steps_per_batch": layout.optimizer_steps,
            # Below the resolution of float32: every step meets the same weights.
            "learning_rate": 1e-12,
            "micro_batch_tokens": tokens,
            "logit_chunk_tokens": self._size.logit_chunk_tokens,
        }
        run = {"name": "bench", "num_steps": 1}
        base = {"run": run, "model": {"path": "bench"}, "learner": learner}
        return RunConfig.model_validate({**base, **PLAIN, **method})


def _save_model(size: Size, folder: Path) -> None:
    disable_progress_bar()
    torch.manual_seed(0)
    # Wide weights: the logits then differ as those of a trained model do.
    shape = Qwen2Config(**size.model, tie_word_embeddings=True, initializer_range=0.2)
    Qwen2ForCausalLM(shape).save_pretrained(folder)


def measure(
    bench: Bench, layout: Layout, methods: Sequence[str], rounds: int, progress: Progressing
) -> dict[str, list[Pair]]:
    """Rounds of plain, method, plain, method, ..., plain, all methods in each."""
    plain = bench.trainer(layout, {})
    trainers = {name: bench.trainer(layout, layout.methods()[name]) for name in methods}
    pairs: dict[str, list[Pair]] = {name: [] for name in methods}
    for trainer in (plain, *trainers.values()):  # the first call of each allocates
        bench.time(trainer)
    for _ in range(rounds):
        before = bench.time(plain)
        for name, trainer in trainers.items():
            mine, after = bench.time(trainer), bench.time(plain)
            mean = Seconds(*(statistics.fmean(both) for both in zip(before, after, strict=True)))
            pairs[name].append(Pair(mine, mean))
            before = after
            progress.advance(f"{layout.optimizer_steps} optimiser steps, {name}")
    return pairs


def row(size: str, layout: Layout, method: str, pairs: Sequence[Pair]) -> Row:
    overheads = [pair.cpu_overhead for pair in pairs]
    low, high = median_interval(overheads)
    return Row(
        size=size,
        optimizer_steps=layout.optimizer_steps,
        micro_batches=layout.micro_batches,
        method=method,
        pairs=len(pairs),
        plain_seconds=round(statistics.median(pair.plain.wall for pair in pairs), 4),
        overhead=round(statistics.median(overheads), 4),
        overhead_low=round(low, 4),
        overhead_high=round(high, 4),
        wall_overhead=round(statistics.median(pair.wall_overhead for pair in pairs), 4),
    )


def run(rounds: Mapping[str, int], only: str, console: Console) -> list[Row]:
    """Every method whose name holds `only`, at every size that has rounds."""
    rows = []
    chosen = {
        layout: [name for name in layout.methods() if only in name or name == "vanilla"]
        for layout in LAYOUTS
    }
    num_pairs = sum(rounds.values()) * sum(len(names) for names in chosen.values())
    with Progressing(console, num_pairs) as progress:
        for size, count in rounds.items():
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(SIZES[size], Path(folder))
            for layout, names in chosen.items():
                measured = measure(bench, layout, names, count, progress) if names else {}
                rows += [row(size, layout, name, pairs) for name, pairs in measured.items()]
            bench.close()
    return rows


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="What a method adds to a learner's step", caption=caption)
    for name in ("size", "steps", "micro-batches", "method"):
        made.add_column(name, justify="left" if name in ("size", "method") else "right")
    for name in ("plain step", "overhead", "95 %", "by the clock", "pairs"):
        made.add_column(name, justify="right")
    for each in rows:
        made.add_row(
            each.size,
            str(each.optimizer_steps),
            str(each.micro_batches),
            each.method,
            f"{each.plain_seconds:.2f} s",
            f"{each.overhead:+.1%}",
            f"{each.overhead_low:+.1%} to {each.overhead_high:+.1%}",
            f"{each.wall_overhead:+.1%}",
            str(each.pairs),
        )
    return made


def _rounds(text: str) -> tuple[str, int]:
    size, _, count = text.partition("=")
    if size not in SIZES or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: want small=10 or large=6")
    return size, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each method adds to a learner's step.")
    parser.add_argument(
        "--rounds", type=_rounds, nargs="+", default=[("small", 10), ("large", 6)], metavar="SIZE=N"
    )
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    rounds = " ".join(f"{size}={count}" for size, count in given.rounds)
    command = f"tests.bench.method_cost --rounds {rounds}"
    if given.only:
        command += f" --only {given.only!r}"
    setting = Setting.of(command, packages=LIBRARIES)
    screen = console()
    rows = run(dict(given.rounds), given.only, screen)
    screen.print(table(rows, str(setting)))
    write_result(given.result, setting, rows=[each._asdict() for each in rows])


if __name__ == "__main__":
    main()
