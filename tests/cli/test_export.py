from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli.__main__ import main
from services.cli.run_folder import RunFolder
from tests.cli.test_commands import run_folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Steps 10 and 20, of which 10 has the better score; the last has a twin."""
    folder = run_folder(tmp_path / "demo-1")
    for name in ("step-000010", "step-000020", "step-000020-002", ".step-000030.tmp"):
        (folder.checkpoints / name).mkdir(parents=True)
    return folder


def evaluate(folder: RunFolder, scores: dict[int, float]) -> None:
    rows = [{"step": at, "eval_policy_version": at, "eval_score": scores[at]} for at in scores]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def error_of(
    folder: RunFolder, wanted: str, capsys: pytest.CaptureFixture[str], *, to: str = "out"
) -> str:
    """What is said of a checkpoint that cannot be exported; nothing is started."""
    assert main(["export", str(folder.path), str(folder.path.parent / to), "--checkpoint", wanted])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(folder, {10: 0.7, 20: 0.5})
    error = error_of(folder, "step-000030", capsys)
    assert "--checkpoint step-000030: no such checkpoint" in error
    assert "step-000010 (score 0.700, best), step-000020 (score 0.500), step-000020-002" in error


def test_the_best_of_none_that_was_evaluated_is_refused(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--checkpoint best: none was evaluated" in error_of(folder, "best", capsys)


def test_a_run_without_a_checkpoint_is_told_when_one_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = run_folder(tmp_path / "demo-2")
    assert "checkpoint.every_steps" in error_of(empty, "last", capsys)


def test_a_destination_that_is_there_is_refused_before_anything_is_read(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists; give a folder" in error_of(folder, "last", capsys, to="demo-1")


def test_without_a_checkpoint_s_name_an_unfinished_run_names_the_way_to_one(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder.path), str(folder.path.parent / "out")]) == 2
    assert "--checkpoint best, last or a name" in capsys.readouterr().err


def test_a_model_that_is_replaced_while_it_is_copied_is_not_mixed_with_the_new_one(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    out = folder.path.parent / "out"
    replacements = [folder.path / "newer"]

    def replace(event: str, args: tuple[Any, ...]) -> None:
        if event == "shutil.copytree" and args[0] == folder.model and replacements:
            newer = replacements.pop()
            newer.mkdir()
            (newer / "config.json").write_text("{}")
            folder.model.rename(folder.path / "older")
            newer.rename(folder.model)

    sys.addaudithook(replace)
    assert main(["export", str(folder.path), str(out)]) == 1
    assert "was replaced while it was copied; try again" in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(folder.path), str(out)]) == 0
    assert (out / "config.json").is_file()
