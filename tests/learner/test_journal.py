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


def test_a_resumed_run_forgets_what_came_after_its_checkpoint_and_a_torn_last_row(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.write({"step": 2})
    at_checkpoint = journal.num_bytes
    journal.write({"step": 2, "eval_score": 0.5})
    journal.write({"step": 3})
    journal.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    resumed = Journal(path)
    resumed.cut_to(at_checkpoint)
    resumed.write({"step": 3, "again": True})
    resumed.close()
    assert read(path) == [{"step": 2}, {"step": 3, "again": True}]


def test_nan_becomes_null_since_json_has_no_nan(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1, "loss": math.nan, "grad": math.inf})
    journal.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad": None}]


def test_nan_inside_a_list_becomes_null_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1, "entropy_by_position": [0.5, math.nan, [-math.inf, 1]]})
    journal.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "entropy_by_position": [0.5, None, [None, 1]]}
    ]
