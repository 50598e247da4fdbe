from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from services.cli.checkpoints import checkpoints_text
from services.cli.measurements import read_rows
from services.cli.observer import View
from services.cli.report import make_report
from services.cli.run_folder import RunFolder
from services.cli.status import _print

LISTED = (
    "step-000010 (score 0.700, best), step-000040 (score 0.500), step-000050,"
    " step-000050-002 (newest)"
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Evaluated every ten steps up to the 40th; the last checkpoint has a twin."""
    for name in ("step-000050", "step-000010", "step-000050-002", "step-000040", ".step-60.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    scores = [(10, 0.7), (20, 0.9), (40, 0.5)]
    rows = [
        {"step": at + 2, "eval_policy_version": at, "eval_score": score} for at, score in scores
    ]
    lines = [json.dumps(row) + "\n" for row in [{"step": 1, "loss": 0.1}, *rows]]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return RunFolder(tmp_path)


def test_the_kept_ones_are_listed_with_their_scores_and_the_best_of_them(folder: RunFolder) -> None:
    assert checkpoints_text(folder, read_rows(folder.metrics)) == LISTED


def test_of_equal_scores_the_newer_is_the_best(folder: RunFolder) -> None:
    rows = [{"eval_policy_version": at, "eval_score": 0.5} for at in (10, 40)]
    assert "step-000040 (score 0.500, best)" in checkpoints_text(folder, rows)


def test_without_checkpoints_nothing_is_said(tmp_path: Path) -> None:
    assert checkpoints_text(RunFolder(tmp_path), []) == ""


def test_status_and_report_show_them(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    _print(View(None, (), []), checkpoints_text(folder, read_rows(folder.metrics)))
    assert f"{'checkpoints':<20}{LISTED}" in capsys.readouterr().out.splitlines()
    page = make_report(folder).read_text("utf8")
    assert LISTED in re.sub(r"<[^>]*>", "\n", page).splitlines()
