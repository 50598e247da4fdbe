"""The copy of the run file in the folder of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import StartError
from shared.run_file import keep_run_file


def test_the_run_file_is_kept_with_the_run_and_one_that_it_replaces_beside_it(
    tmp_path: Path,
) -> None:
    given, folder = tmp_path / "mounted.toml", tmp_path / "runs" / "a"
    for text in ("first", "first", "second"):
        given.write_text(text)
        keep_run_file(folder, given)
    keep_run_file(folder, folder / "run.toml")
    assert (folder / "run.toml").read_text() == "second"
    [earlier] = folder.glob("run-until-*.toml")
    assert earlier.read_text() == "first"
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "run.toml").write_text("x")
    with pytest.raises(StartError, match=r"run\.directory: .*runs/a cannot be written"):
        keep_run_file(tmp_path / "runs" / "a", tmp_path / "run.toml")
