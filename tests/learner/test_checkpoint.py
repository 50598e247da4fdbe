from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.learner.checkpoint import (
    MANIFEST,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from shared.errors import CheckpointError


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


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 1)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from services.learner.checkpoint import write_checkpoint\n"
        "def save(folder):\n"
        "    folder.mkdir(); (folder / 'weights').write_bytes(b'half'); print('here', flush=True)\n"
        "    time.sleep(60)\n"
        f"write_checkpoint(Path({str(tmp_path)!r}), step=2, state={{}}, save_engine=save)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_state_is_plain_json_that_a_person_can_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text()) == {"law": [1], "step": 1}
    assert time.time() - folder.stat().st_mtime < 60
