"""A rollout replica is killed, is started again by hand, samples again and leaves in peace.

The run is synchronous, so that each token was sampled by the very weights that the learner scores
it with, whoever came or went in between.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.config import load_run
from tests.end_to_end.real_run import (
    GROUPS_PER_BATCH,
    PATIENCE_SECONDS,
    RUN_ID,
    Up,
    children_of,
    is_gone,
    positions,
    processes_in,
    rollout_status,
    start_by_hand,
    write_run_file,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

NUM_STEPS = 60
KILL_AT = 2
ALONE_STEPS = 2
LARGEST_MISMATCH = 1e-4
"""Nats, of one token's log-prob in float32: vLLM's against the learner's."""

LOST = "rollout-1"
COMMAND = re.compile(r"^  (REDIS_URL=\S+ .* --name rollout-1)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Story:
    """What was seen of the run, in this order, and the run after its end."""

    up: Up
    engine: list[int]
    step_of_return: int
    groups_after_return: int
    status_of_drained: int
    members_after_drain: set[str]
    left: list[int]


@pytest.fixture(scope="module")
def story(model: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Up]) -> Story:
    folder = tmp_path_factory.mktemp("replica")
    run_file = write_run_file(folder, model=model, num_steps=NUM_STEPS, max_staleness=0)
    up = start(folder, run_file, "--run-id", RUN_ID)
    up.until_says("all services are up")
    up.until_step(KILL_AT)

    front = up.pid_of("rollout", LOST)
    engine = children_of(front)
    os.kill(front, signal.SIGKILL)
    up.until(lambda: all(map(is_gone, [front, *engine])), "the end of the replica's processes")
    up.until_step(up.steps[-1]["step"] + ALONE_STEPS)

    # Paused, or the run would be over before an engine has started on a busy machine.
    with up.paused():
        command = COMMAND.search(up.printed)
        assert command is not None, up.printed
        again = start_by_hand(folder, command[1])
        up.until_says(f"{LOST} is back")
        step_of_return = up.learner_status().step
    up.until(lambda: serves(up), "the refit of the replica that came back")
    groups = up.until(lambda: rollout_status(up.members()[LOST]).groups_sampled, "its groups")

    with up.paused():
        again.send_signal(signal.SIGTERM)
        status = again.wait(PATIENCE_SECONDS)
        members = set(up.members())
    up.wait(0)
    return Story(up, engine, step_of_return, groups, status, members, processes_in(folder))


def serves(up: Up) -> bool:
    """Whether the learner vouches for what the replica serves."""
    return up.learner_status().replicas.get(LOST, "").startswith("serves")


def test_training_goes_on_without_a_replica_that_was_killed(story: Story) -> None:
    assert [row["step"] for row in story.up.steps] == list(range(1, NUM_STEPS + 1))
    alone = [row for row in story.up.steps if set(row["replica_groups"]) == {"rollout-0"}]
    assert alone
    assert f"warning: {LOST} was killed by SIGKILL" in story.up.printed
    assert "training goes on without it" in story.up.printed
    assert story.up.errors == ""


def test_a_dead_replica_holds_no_publication_up(story: Story) -> None:
    timeout_seconds = load_run(story.up.run / "run.toml").weights.timeout_seconds
    assert max(row["publish_seconds"] for row in story.up.steps) < timeout_seconds / 2


def test_the_engine_of_a_killed_replica_dies_with_it(story: Story) -> None:
    assert story.engine
    assert story.left == []


def test_a_replica_started_by_the_printed_command_samples_again(story: Story) -> None:
    assert story.groups_after_return > 0
    after = [row for row in story.up.steps if row["step"] > story.step_of_return]
    assert any(LOST in row["replica_groups"] for row in after)


def test_a_replica_that_is_told_to_end_finishes_its_groups_and_gives_its_lease_back(
    story: Story,
) -> None:
    assert story.status_of_drained == 0
    assert LOST not in story.members_after_drain
    assert story.members_after_drain == {"learner", "rollout-0", "verifier-0"}


def test_what_the_killed_replica_held_is_trained_on_once_all_the_same(story: Story) -> None:
    places = positions(story.up.trained)
    assert len(places) == len(set(places)) == NUM_STEPS * GROUPS_PER_BATCH


def test_a_synchronous_run_trains_on_tokens_of_the_very_version_it_updates(story: Story) -> None:
    for row in story.up.steps:
        assert set(row["staleness_counts"]) == {"0"}
        assert row["groups_over_max_staleness"] == 0


def test_sampler_and_learner_agree_on_the_probability_of_each_token(story: Story) -> None:
    for row in story.up.steps:
        assert row["mismatch_abs_max"] <= LARGEST_MISMATCH, row["step"]
        assert row["mismatch_abs_mean"] > 0, "compared with itself"
