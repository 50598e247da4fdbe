from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from services.learner.checkpoint import (
    MANIFEST,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from services.learner.snapshot import Snapshot
from shared.errors import CheckpointError
from tests.forked import FORKED
from tests.learner.fakes import ONE_RANK


def save_engine(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 1000)


def write(root: Path, step: int) -> Path:
    return write_checkpoint(root, step=step, state={"law": [step]}, save_engine=save_engine)


def test_the_newest_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 10)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["law"]) == (10, [10])
    assert (found.engine_folder / "weights").read_bytes() == b"w" * 1000


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_second_checkpoint_of_a_step_does_not_replace_the_first(tmp_path: Path) -> None:
    first, second = write(tmp_path, 2), write(tmp_path, 2)
    assert first != second
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.folder == second
    assert first.exists()


@pytest.mark.parametrize("name", ["engine/weights", "state.json", MANIFEST])
def test_a_flipped_byte_anywhere_is_found_before_anything_is_loaded(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, 3) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-000003 is damaged .*delete it"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["engine/weights", "state.json", MANIFEST])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    (write(tmp_path, 3) / name).unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        newest_checkpoint(tmp_path)


def test_a_disk_that_refuses_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def full(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(tmp_path, step=2, state={}, save_engine=full)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_only_the_newest_are_kept_and_half_written_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".step-000004.tmp").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({1: 0.2, 2: 0.9, 3: 0.1, 5: 0.3}, [2, 5]),
        ({1: 0.2, 2: 0.2}, [2, 5]),  # of equal ones the newer
        ({5: 0.9, 3: 0.1}, [5]),  # the newest is the best
        ({9: 0.9}, [5]),  # one that is not there
    ],
)
def test_the_best_is_kept_besides(
    tmp_path: Path, scores: dict[int, float], kept: list[int]
) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, keep=1, keep_best=1, scores=scores)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-{step:06d}" for step in kept]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_second_checkpoint_of_a_step_takes_no_older_step_s_place(tmp_path: Path) -> None:
    for step in (160, 180, 200, 200):
        write(tmp_path, step)
        prune_checkpoints(tmp_path, keep=2, keep_best=2, scores={160: 0.3, 180: 0.1, 200: 0.36})
    assert names(tmp_path) == ["step-000160", "step-000180", "step-000200-002"]


def test_a_third_checkpoint_of_a_step_is_newer_than_the_second_that_is_left(tmp_path: Path) -> None:
    for _ in range(3):
        latest = write(tmp_path, 200)
        prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == [latest.name] == ["step-000200-003"]


def test_steps_are_ordered_as_numbers_and_foreign_folders_left_alone(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    (tmp_path / "step-best-so-far").mkdir()
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step-1000000", "step-best-so-far"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_who_reads_a_checkpoint_that_is_deleted_never_finds_half_of_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    process = FORKED.Process(target=prune_and_die, args=(tmp_path,), daemon=True)
    process.start()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [".step-000001.tmp", "step-000002"]
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000002"]


def prune_and_die(root: Path) -> None:
    """In a process of its own: the first file of the older one is gone."""
    die_at("os.remove", "", 2)
    prune_checkpoints(root, keep=1)


def test_files_of_a_rank_that_rank_0_does_not_see_are_no_checkpoint(tmp_path: Path) -> None:
    def elsewhere(folder: Path) -> dict[str, tuple[int, int]]:
        save_engine(folder)
        return {"weights": (1000, 7), "optimizer-of-rank-1": (1000, 7)}

    with pytest.raises(CheckpointError, match=r"engine/optimizer-of-rank-1.*that all ranks share"):
        write_checkpoint(tmp_path, step=1, state={}, save_engine=elsewhere)
    assert names(tmp_path) == []


def test_what_is_not_needed_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    told: list[tuple[int, int]] = []
    (folder / "engine/weights").write_bytes(b"x" * 1000)
    read_checkpoint(
        folder,
        is_needed=lambda name: name == "state.json",
        on_read=lambda done, total: told.append((done, total)),
    )
    size = (folder / "state.json").stat().st_size
    assert told == [(size, size)]
    with pytest.raises(CheckpointError, match="engine/weights is not as it was written"):
        read_checkpoint(folder)


def test_what_the_engine_has_listed_is_not_read_again_and_is_checked(tmp_path: Path) -> None:
    def listed(folder: Path) -> dict[str, tuple[int, int]]:
        save_engine(folder)
        return {"weights": (1000, 7)}

    write_checkpoint(tmp_path, step=1, state={}, save_engine=listed)
    with pytest.raises(CheckpointError, match="engine/weights is not as it was written"):
        newest_checkpoint(tmp_path)


class Deadly:
    """Kills the process that serialises it."""

    def __reduce__(self) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return "nobody reads it"


def die_at(event: str, end: str, count: int) -> None:
    def listen(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if name == event and str(args[0]).endswith(end):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)


def save_and_die(root: Path, moment: str) -> None:
    """In a process of its own."""
    weights: dict[str, Any] = {"weights": torch.zeros(1000)}
    files = {"state/second": dict(weights), "state/first": dict(weights)}
    if moment == "serialising":
        files["state/second"]["deadly"] = Deadly()
    else:
        event, end, count = moment.split()
        die_at(event, end, int(count))
    with Snapshot(files, ONE_RANK, {"num_ranks": 1, "zero_stage": 0}) as snapshot:
        write_checkpoint(root, step=2, state={}, save_engine=snapshot.write)


MOMENTS = {
    "before anything is written": ("os.mkdir .step-000002.tmp 1", 1),
    "before the first file": ("open state/first 1", 1),
    "amid a file": ("serialising", 1),
    "before a file is synced": ("open state/second 2", 1),
    "before the list of parts": ("open parts.json 1", 1),
    "before the run's state": ("open state.json 1", 1),
    "before the manifest": ("open manifest.json 1", 1),
    "before the manifest is synced": ("open manifest.json 2", 1),
    "before the rename": ("os.rename .step-000002.tmp 1", 1),
    "after the rename": ("open checkpoints 1", 2),
}
"""Moments of a save by the event, the end of the path and the how-manieth time it is, as Python's
audit hooks tell them; and the step that is then the newest."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_of_a_save_leaves_one_that_can_be_loaded(
    moment: str, tmp_path: Path
) -> None:
    root, (event, newest) = tmp_path / "checkpoints", MOMENTS[moment]
    write(root, 1)
    process = FORKED.Process(target=save_and_die, args=(root, event), daemon=True)
    process.start()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    found = newest_checkpoint(root)
    assert found is not None
    assert found.step == newest
    after = write(root, 3)
    prune_checkpoints(root, keep=1)
    assert list(root.iterdir()) == [after]


def test_state_is_plain_json_that_a_person_can_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text()) == {"law": [1], "step": 1}
    assert time.time() - folder.stat().st_mtime < 60
