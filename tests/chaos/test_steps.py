"""The end of a step is seen once, also when a resumed learner has gone back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.steps import Steps


def write(path: Path, steps: Sequence[int]) -> None:
    path.write_text("".join(json.dumps({"step": each, "seconds": 1.0}) + "\n" for each in steps))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_before_the_first_step_there_is_none(metrics: Path) -> None:
    steps = Steps(metrics)
    steps.look()
    assert (steps.newest, steps.ends) == (0, [])
    assert steps.newest_at < 0


def test_each_step_counts_once(metrics: Path) -> None:
    steps = Steps(metrics)
    for number in (1, 2, 3):
        write(metrics, range(1, number + 1))
        steps.look()
        steps.look()
    assert [end.step for end in steps.ends] == [1, 2, 3]
    assert steps.newest == 3
    assert len(steps.after(steps.ends[0].at)) == 2


def test_going_back_to_a_checkpoint_is_no_step_and_a_step_done_again_is(metrics: Path) -> None:
    steps = Steps(metrics)
    for numbers in (range(1, 9), range(1, 6), range(1, 7)):
        write(metrics, numbers)
        steps.look()
    assert [end.step for end in steps.ends] == [8, 6]


def test_an_evaluation_is_no_step(metrics: Path) -> None:
    steps = Steps(metrics)
    write(metrics, [1])
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 1, "eval_score": 0.5}) + "\n")
    steps.look()
    assert [end.step for end in steps.ends] == [1]
