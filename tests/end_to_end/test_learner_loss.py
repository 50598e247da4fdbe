"""The learner is killed, the run goes on; it is interrupted, and goes on again to its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.real_run import (
    EVALUATED_EVERY,
    GROUPS_PER_BATCH,
    RUN_ID,
    Row,
    Up,
    positions,
    processes_in,
    write_run_file,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

NUM_STEPS = 40
MAX_STALENESS = 1
KILL_AT = 5


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
    """The three launches of one run."""

    killed: Launch
    interrupted: Launch
    finished: Launch


@pytest.fixture(scope="module")
def story(model: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Up]) -> Story:
    folder = tmp_path_factory.mktemp("learner")
    run_file = write_run_file(folder, model=model, num_steps=NUM_STEPS, max_staleness=MAX_STALENESS)
    up = start(folder, run_file, "--run-id", RUN_ID)
    up.until_step(KILL_AT)
    kill_with_work_to_lose(up)
    up.wait(1)
    killed = Launch.ended(up)

    up = start(folder, run_file, "--resume")
    up.until_step(killed.steps[-1]["step"] + 1)
    up.process.send_signal(signal.SIGINT)
    up.wait(130)
    interrupted = Launch.ended(up)

    up = start(folder, run_file, "--resume")
    up.wait(0)
    return Story(killed, interrupted, Launch.ended(up))


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
    up = story.killed.up
    log = (up.run / "logs" / "learner.log").read_text("utf8").splitlines()
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


def test_a_resumed_run_goes_on_from_its_last_checkpoint(story: Story) -> None:
    for before, after in [
        (story.killed, story.interrupted),
        (story.interrupted, story.finished),
    ]:
        kept = [row for row in before.steps if row["step"] <= before.checkpoints[-1]]
        assert kept
        assert after.steps[: len(kept)] == kept


def test_each_step_is_in_the_file_once(story: Story) -> None:
    assert [row["step"] for row in story.finished.steps] == list(range(1, NUM_STEPS + 1))
    assert [row["policy_version"] for row in story.finished.steps] == [
        row["step"] for row in story.finished.steps
    ]
    assert story.finished.checkpoints[-1] == NUM_STEPS


def test_each_place_of_the_prompt_order_is_trained_on_once(story: Story) -> None:
    trained = story.finished.trained
    assert [row["step"] for row in trained] == list(range(1, NUM_STEPS + 1))
    places = positions(trained)
    assert len(places) == len(set(places)) == NUM_STEPS * GROUPS_PER_BATCH


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


def test_nothing_over_the_staleness_bound_is_trained_on(story: Story) -> None:
    for row in story.finished.steps:
        assert row["groups_over_max_staleness"] == 0
        assert max(map(int, row["staleness_counts"])) <= MAX_STALENESS


def test_each_evaluation_is_in_the_file_once(story: Story) -> None:
    rows = [row for row in story.finished.up.rows if row.get("eval_score") is not None]
    assert sorted(row["eval_step"] for row in rows) == [
        *range(0, NUM_STEPS, EVALUATED_EVERY),
        NUM_STEPS,
    ]


def test_nobody_of_a_finished_run_is_left(story: Story) -> None:
    up = story.finished.up
    assert story.finished.left == []
    assert up.errors == ""
    assert (up.run / "report.html").exists()
    assert list((up.folder / "tmp").glob("isentrope-*")) == []
