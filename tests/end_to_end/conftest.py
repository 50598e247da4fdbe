"""What the end-to-end tests share: one small model, and runs that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.learner.warmup import warm_up
from shared.config import parse_run
from tests.end_to_end.real_run import Up

WARMUP = """
[run]
name = "warmup"
num_steps = 1
[model]
max_length = 32
[warmup]
num_steps = 120
batch_size = 48
hidden_size = 64
num_layers = 2
num_heads = 2
intermediate_size = 128
[task]
name = "countdown"
params = { numbers = 2 }
[rollout]
max_completion_tokens = 16
"""

Start = Callable[..., Up]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends its completions, and is right now and then."""
    trained = tmp_path_factory.mktemp("warmup") / "model"
    warm_up(parse_run(WARMUP), trained, report=lambda progress: None)
    return trained


@contextmanager
def starting() -> Iterator[Start]:
    """Start `isentrope up`; nobody of it is left at the end of the context."""
    started: list[Up] = []

    def start(folder: Path, run_file: Path, *arguments: str) -> Up:
        started.append(Up(folder, run_file, *arguments))
        return started[-1]

    try:
        yield start
    finally:
        for up in started:
            up.end()


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with starting() as started:
        yield started
