from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.learner.checkpoint import fingerprint
from services.learner.snapshot import HostFiles, Snapshot, Writing, host_copy, write_file
from shared.errors import EngineError
from tests.learner.fakes import ONE_RANK

LAYOUT = {"num_ranks": 1, "zero_stage": 0}


def test_a_copy_stays_what_it_was_when_training_moves_on() -> None:
    weight, groups = torch.ones(3), [{"lr": 0.1, "betas": (0.9, 0.95)}]
    copied = host_copy({"weight": weight, "groups": groups, "moments": [weight[:2]]}, {})
    weight += 1
    groups[0]["lr"] = 0.5
    assert copied["weight"].tolist() == [1, 1, 1]
    assert copied["moments"][0].tolist() == [1, 1]
    assert copied["groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}]


def test_tied_weights_are_copied_once_and_a_view_without_what_it_is_a_view_of() -> None:
    whole = torch.arange(1000.0)
    state = OrderedDict(embedding=whole[:10], head=whole[:10], other=whole[10:20])
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    copied = host_copy(state, {})
    assert copied["embedding"] is copied["head"]
    assert copied["other"].tolist() == list(range(10, 20))
    assert copied["other"].untyped_storage().nbytes() == 40
    assert copied._metadata == {"version": 1}


def test_empty_tensors_keep_their_shapes() -> None:
    copied = host_copy([torch.zeros(0, 2), torch.zeros(3, 0)], {})
    assert [tuple(each.shape) for each in copied] == [(0, 2), (3, 0)]


@pytest.mark.parametrize("copies", [True, False])
def test_what_is_written_is_what_was_given_to_save_and_the_fingerprint_is_right(
    tmp_path: Path, copies: bool
) -> None:
    files, weight = HostFiles(Path("/nowhere"), copies=copies), torch.arange(5000.0)
    files.save({"weight": weight}, "/nowhere/state/model.pt")
    with Snapshot(files.files, ONE_RANK, LAYOUT) as snapshot:
        written = snapshot.write(tmp_path)
    path = tmp_path / "state/model.pt"
    assert written == {"state/model.pt": fingerprint(path)}
    read: dict[str, Tensor] = torch.load(path)
    assert torch.equal(read["weight"], weight)
    assert not files.files


@pytest.mark.parametrize("num_weights", [1, 2**20])
def test_a_disk_that_is_full_is_named_as_such(tmp_path: Path, num_weights: int) -> None:
    path = tmp_path / "model.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_file(path, {"weight": torch.zeros(num_weights)})


def test_a_disk_that_takes_half_a_file_is_named_as_such(tmp_path: Path) -> None:
    """torch then raises an error of its own, of a place where it did not expect to be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(tmp_path / "model.pt", [torch.zeros(2**17) for _ in range(8)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_hangs_is_not_waited_for_without_end() -> None:
    disk, written, writing = threading.Event(), [], Writing()
    writing.end()  # nothing has begun

    def follow() -> None:
        disk.wait(30.0)
        written.append(1)

    writing.begin(follow)
    with pytest.raises(EngineError, match="the disk hangs"):
        writing.end(seconds=0.01)
    disk.set()
    writing.end()
    assert written == [1]
