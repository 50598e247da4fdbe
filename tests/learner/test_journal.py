from __future__ import annotations

import json
import math
from pathlib import Path

from services.learner.journal import Journal


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_the_disk_when_write_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1, "loss": 0.5})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    journal.close()


def test_a_resumed_run_forgets_later_steps_and_a_torn_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write({"step": step})
    journal.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    resumed = Journal(path)
    resumed.cut_after(2)
    resumed.write({"step": 3, "again": True})
    resumed.close()
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_nan_becomes_null_since_json_has_no_nan(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1, "loss": math.nan, "grad": math.inf})
    journal.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad": None}]
