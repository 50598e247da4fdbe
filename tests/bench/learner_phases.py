"""Where the time of a learner's step goes: the engine's model behind a stopwatch.

Without a GPU and with one thread, time is the process's CPU time, which what else runs on the
machine moves little; otherwise it is the clock's, and a GPU is waited for at each end of a phase.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.learner.batch import MicroBatch
from services.learner.engine import LearnerEngine
from services.learner.passes import OptimizerStep
from services.learner.training import Trainer
from shared.config import RunConfig
from shared.rl.entropy import TokenStatistics

PHASES = ("measure", "forward", "backward", "optimiser", "other")
"""`measure` is the pass without gradient before the first update, from which tokens are selected;
`backward` holds the head's second forward pass; `other` is packing, loss and diagnostics."""

MATMUL_SIZES = {"cpu": (768, 1024, 1536), "cuda": (4096, 8192, 16384)}
MATMUL_REPEATS = 3


class Stopwatch:
    """Seconds spent in named phases, which do not nest."""

    def __init__(self, *, by_cpu: bool) -> None:
        self._by_cpu = by_cpu
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Seconds since some moment."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if self._by_cpu else time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started


class TimedModel:
    """A `TrainedModel` whose passes, gradients and optimiser steps are timed."""

    def __init__(self, model: Any, stopwatch: Stopwatch) -> None:
        self._model = model
        self._stopwatch = stopwatch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, micro_batch: MicroBatch, **options: Any) -> TokenStatistics:
        with self._stopwatch.phase("forward" if torch.is_grad_enabled() else "measure"):
            statistics: TokenStatistics = self._model.forward(micro_batch, **options)
        return statistics

    def reference_logprobs(self, micro_batch: MicroBatch, **options: Any) -> Tensor:
        with self._stopwatch.phase("measure"):
            logprobs: Tensor = self._model.reference_logprobs(micro_batch, **options)
        return logprobs

    def accumulate(self, loss: Tensor, **options: Any) -> None:
        with self._stopwatch.phase("backward"):
            self._model.accumulate(loss, **options)

    def step(self) -> OptimizerStep:
        with self._stopwatch.phase("optimiser"):
            taken: OptimizerStep = self._model.step()
        return taken


def put_stopwatch(engine: LearnerEngine, config: RunConfig, stopwatch: Stopwatch) -> None:
    """From now on `engine.train` tells the stopwatch what it does."""
    trainer = engine._trainer
    engine._trainer = Trainer(config, TimedModel(trainer._model, stopwatch), trainer._ranks)


def matmul_flops(dtype: torch.dtype, stopwatch: Stopwatch) -> float:
    """Operations a second of the fastest of a few square products on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fastest = 0.0
    for size in MATMUL_SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        left @ right  # the first one allocates
        for _ in range(MATMUL_REPEATS):
            started = stopwatch.now()
            left @ right
            fastest = max(fastest, 2 * size**3 / (stopwatch.now() - started))
    return fastest


def reset_peak_memory() -> None:
    """`peak_memory` counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", "utf8")


def peak_memory() -> int:
    """Bytes: of tensors on a GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text("utf8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
