"""A folder that takes another's place, by a process that is killed at any moment of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shared.errors import StartError
from shared.new_folder import new_folder, replaced_folder
from tests.forked import FORKED
from tests.learner.test_checkpoint import die_at

MOMENTS = {
    "before anything is written": ("os.mkdir .model.new.tmp 1", "old"),
    "amid a file": ("open weights 1", "old"),
    "before a file is synced": ("open weights 2", "old"),
    "before the older one is taken away": ("os.rename model 1", "old"),
    "before the newer one is there": ("os.rename .model.new.tmp 1", "nothing"),
    "before the older one is deleted": ("open run 1", "new"),
}
"""As in test_checkpoint; and what is then to be found."""


def write(folder: Path, content: str) -> None:
    with replaced_folder(folder) as new:
        (new / "part").mkdir()
        (new / "config").write_text(content)
        with (new / "part/weights").open("w") as file:
            file.write(content)


def content(folder: Path) -> str:
    """Of both files, if they are of one writing."""
    if not folder.exists():
        return "nothing"
    found = {(folder / name).read_text() for name in ("config", "part/weights")}
    assert len(found) == 1, found
    return found.pop()


def write_and_die(folder: Path, event: str) -> None:
    """In a process of its own."""
    name, end, count = event.split()
    die_at(name, end, int(count))
    write(folder, "new")


def killed(folder: Path, moment: str) -> None:
    process = FORKED.Process(target=write_and_die, args=(folder, MOMENTS[moment][0]), daemon=True)
    process.start()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_one_of_both_or_nothing_and_the_next_one_clears_up(
    moment: str, folder: Path
) -> None:
    write(folder, "old")
    killed(folder, moment)
    assert content(folder) == MOMENTS[moment][1]
    write(folder, "next")
    assert content(folder) == "next"
    assert os.listdir(folder.parent) == ["model"]


def test_what_was_taken_away_comes_back_if_nothing_can_take_its_place(folder: Path) -> None:
    write(folder, "old")
    killed(folder, "before the newer one is there")
    with pytest.raises(UnicodeError, match="surrogates"):
        write(folder, "\ud800")  # cannot be written
    assert content(folder) == "old"
    assert os.listdir(folder.parent) == ["model"]


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "disk/model", "old")
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "disk/model")
    write(folder, "new")
    assert folder.is_symlink()
    assert content(tmp_path / "disk/model") == "new"
    assert [os.listdir(each) for each in (folder.parent, tmp_path / "disk")] == [["model"]] * 2


def test_what_a_killed_process_of_the_same_number_left_is_in_nobody_s_way(folder: Path) -> None:
    left = folder.with_name(f".model.{os.getpid()}.tmp")
    left.mkdir(parents=True)
    (left / "half").touch()
    with new_folder(folder) as new:
        (new / "config").touch()
    assert os.listdir(folder) == ["config"]
    with pytest.raises(StartError, match=r"model: not written \(.*make room"), new_folder(folder):
        """There is one by now."""
    assert os.listdir(folder.parent) == ["model"]
