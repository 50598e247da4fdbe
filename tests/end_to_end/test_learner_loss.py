"""The learner is killed, the run is moved and goes on, and is interrupted by a person.

What is moved is the run's folder, with Redis' files in it: to another folder, where everything
listens elsewhere and has other certificates, as on another machine.

The run is synchronous, so that each token was sampled by the very weights that the learner scores
it with, also by replicas that were ahead of the learner which came back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.real_run import (
    RUN_ID,
    Row,
    Up,
    positions,
    processes_in,
    write_run_file,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

NUM_STEPS = 1000
"""The person must come before the end."""

KILL_AT = 5
LARGEST_MISMATCH = 1e-4
"""Nats, of one token's log-prob in float32: vLLM's against the learner's."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One `isentrope up` after its end, and the files as it left them."""

    up: Up
    steps: list[Row]
    trained: list[Row]
    checkpoints: list[int]
    left: list[int]

    @classmethod
    def ended(cls, up: Up) -> Launch:
        return cls(up, up.steps, up.trained, up.checkpoints, processes_in(up.folder))


@dataclass(frozen=True, slots=True)
class Story:
    """The two launches of one run."""

    killed: Launch
    interrupted: Launch


@pytest.fixture(scope="module")
def story(model: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Up]) -> Story:
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    up = start(here, run_file_in(here, model), "--run-id", RUN_ID)
    up.until_step(KILL_AT)
    kill_with_work_to_lose(up)
    up.wait(1)
    killed = Launch.ended(up)

    (here / RUN_ID).rename(there / RUN_ID)
    up = start(there, run_file_in(there, model), "--resume", "--run-id", RUN_ID)
    up.until_step(killed.steps[-1]["step"] + 1)
    up.process.send_signal(signal.SIGINT)
    up.wait(130)
    return Story(killed, Launch.ended(up))


def run_file_in(folder: Path, model: Path) -> Path:
    return write_run_file(folder, model=model, num_steps=NUM_STEPS, max_staleness=0, num_replicas=1)


def kill_with_work_to_lose(up: Up) -> None:
    """SIGKILL the learner at a moment when it has trained more than its checkpoint holds."""
    learner = up.pid_of("learner", "learner")

    def is_stopped_at_such_a_moment() -> bool:
        os.kill(learner, signal.SIGSTOP)
        if up.checkpoints and up.steps[-1]["step"] > up.checkpoints[-1]:
            return True
        os.kill(learner, signal.SIGCONT)
        return False

    up.until(is_stopped_at_such_a_moment, "a step after a checkpoint")
    os.kill(learner, signal.SIGKILL)


def test_a_killed_learner_ends_the_run_with_its_last_lines(story: Story) -> None:
    up, moved = story.killed.up, story.interrupted.up
    log = (moved.run / "logs" / "learner.log").read_text("utf8").splitlines()
    assert up.errors.startswith("error: learner was killed by SIGKILL")
    assert up.errors.count("\n") == 1
    last = [line.strip() for line in up.printed.splitlines() if line.startswith("  ")]
    assert len(last) > 3
    assert set(last) <= {line.strip() for line in log}
    assert story.killed.left == []


def test_ctrl_c_writes_a_checkpoint_of_the_last_step_and_says_how_to_go_on(story: Story) -> None:
    interrupted = story.interrupted
    assert interrupted.checkpoints[-1] == interrupted.steps[-1]["step"] < NUM_STEPS
    assert interrupted.up.errors == ""
    assert interrupted.up.printed.splitlines()[-1] == (
        f"stopped. To go on: isentrope up {interrupted.up.folder / 'run.toml'} --resume"
        f" --run-id {RUN_ID}"
    )
    assert interrupted.left == []
    assert list((interrupted.up.folder / "tmp").glob("isentrope-*")) == []


def test_a_resumed_run_goes_on_from_its_last_checkpoint(story: Story) -> None:
    kept = [row for row in story.killed.steps if row["step"] <= story.killed.checkpoints[-1]]
    assert kept
    assert story.interrupted.steps[: len(kept)] == kept


def test_a_run_that_was_moved_leaves_nothing_and_needs_nothing_where_it_was(story: Story) -> None:
    assert not story.killed.up.run.exists()
    assert str(story.killed.up.folder) not in (story.interrupted.up.run / "run.toml").read_text()


def test_each_step_and_each_place_of_the_prompt_order_is_there_once(story: Story) -> None:
    steps, trained = story.interrupted.steps, story.interrupted.trained
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert [row["step"] for row in trained] == [row["step"] for row in steps]
    places = positions(trained)
    assert len(places) == len(set(places))


def test_a_step_that_was_lost_is_done_again_with_the_same_groups(story: Story) -> None:
    lost = [row for row in story.killed.trained if row["step"] > story.killed.checkpoints[-1]]
    again = {row["step"]: row["trained"] for row in story.interrupted.trained}
    assert lost
    for row in lost:
        assert sorted(again[row["step"]]) == sorted(row["trained"])


def test_a_step_that_was_lost_comes_out_the_same(story: Story) -> None:
    lost = [row for row in story.killed.steps if row["step"] > story.killed.checkpoints[-1]]
    again = {row["step"]: row for row in story.interrupted.steps}
    assert lost
    for row in lost:
        for key in ("reward_mean", "entropy", "loss", "grad_norm", "mismatch_kl"):
            assert again[row["step"]][key] == pytest.approx(row[key], rel=1e-4, abs=1e-7), key


def test_a_synchronous_run_trains_on_tokens_of_the_very_version_it_updates(story: Story) -> None:
    for row in story.interrupted.steps:
        assert set(row["staleness_counts"]) == {"0"}
        assert row["groups_over_max_staleness"] == 0


def test_sampler_and_learner_agree_on_the_probability_of_each_token(story: Story) -> None:
    for row in story.interrupted.steps:
        assert row["mismatch_abs_max"] <= LARGEST_MISMATCH, row["step"]
        assert row["mismatch_abs_mean"] > 0, "compared with itself"
