"""What benchmarks share: an interval, what stands beside the numbers, a sign that they go on."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

RESULTS = Path(__file__).parent / "results"
SECONDS_BETWEEN_LINES = 5.0
LOG_WIDTH = 120
CONFIDENCE = 0.95


class Setting(NamedTuple):
    """When, where and with what a benchmark ran, and the command that repeats it."""

    date: str
    machine: str
    versions: dict[str, str]
    command: str

    @classmethod
    def of(cls, command: str, *, packages: Sequence[str]) -> Setting:
        """This process's; `command` is what follows `python -m`."""
        versions = {name: version(name) for name in packages}
        versions = {"python": platform.python_version(), **versions}
        return cls(date.today().isoformat(), machine(), versions, f"python -m {command}")

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.date}; {self.machine}; {listed}; {self.command}"


def machine() -> str:
    """Processor, number of cores, memory, GPU."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf8").splitlines()
        model = next((line.split(":")[1] for line in lines if "model name" in line), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {model.strip()}, {memory:.0f} GiB, {gpu}"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with CONFIDENCE; all of them where too few.

    As many values lie below the median as heads fall in as many throws of a coin.
    """
    ordered, count = sorted(values), len(values)
    outside, cut = 0.0, 0
    while cut < (count - 1) // 2:
        outside += 2 * math.comb(count, cut) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        cut += 1
    cut = max(0, cut - 1)
    return ordered[cut], ordered[count - 1 - cut]


def write_result(path: Path, setting: Setting, **measured: Any) -> None:
    """One JSON file: the setting, then what was measured."""
    path.write_text(json.dumps({**setting._asdict(), **measured}, indent=1) + "\n", "utf8")


def console() -> Console:
    """Of a benchmark: as wide as the terminal, or as a log."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


class Progressing:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=num_steps)
        self._num_steps, self._done = num_steps, 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Progressing:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, what: str) -> None:
        """One more step was timed."""
        self._done += 1
        self._bar.update(self._task, advance=1, description=what)
        now = time.monotonic()
        if self._console.is_terminal or now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._started) / self._done * (self._num_steps - self._done)
        self._console.print(f"{self._done}/{self._num_steps} steps, {left:.0f} s left: {what}")
