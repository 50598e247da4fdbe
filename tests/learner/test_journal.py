from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.learner.journal import Journal
from shared.errors import StartError
from shared.metrics.learner import LEARNER_ROWS_LOST, LEARNER_ROWS_REFUSED


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
    journal.sync()
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


@contextmanager
def disk_with_room_for(num_bytes: int) -> Iterator[None]:
    """The kernel takes no file beyond this length, and of a write what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(path: Path) -> list[object]:
    return [row["step"] for row in read(path)]


def test_rows_that_a_full_disk_refuses_are_counted_and_written_in_order_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, refused = tmp_path / "metrics.jsonl", LEARNER_ROWS_REFUSED.labels(file="metrics")
    journal, before = Journal(path), refused._value.get()
    journal.write({"step": 1})
    with disk_with_room_for(path.stat().st_size + 5):
        for step in (2, 3, 4):
            journal.write({"step": step})
        assert path.read_text() == '{"step": 1}\n{"ste'
    assert refused._value.get() - before == 3
    assert "takes no row" in caplog.text and "make room" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    journal.write({"step": 5})
    assert steps(path) == [1, 2, 3, 4, 5]
    assert "has the 3 rows that came late" in caplog.text
    journal.close()


def test_a_checkpoint_on_another_disk_keeps_the_rows_that_this_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.write({"step": 1})
    with disk_with_room_for(path.stat().st_size + 5):
        journal.write({"step": 2})
        journal.sync()
        num_bytes, kept = journal.num_bytes, journal.kept
        journal.write({"step": 3})
        assert num_bytes < path.stat().st_size
        journal.close()
    resumed = Journal(path)
    resumed.cut_to(num_bytes, kept)
    resumed.write({"step": 3, "again": True})
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    resumed.sync()
    assert (resumed.num_bytes, resumed.kept) == (path.stat().st_size, [])
    resumed.close()


def test_memory_for_rows_is_bounded_and_what_finds_no_room_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, lost = tmp_path / "metrics.jsonl", LEARNER_ROWS_LOST.labels(file="metrics")
    journal, before = Journal(path, max_kept_bytes=100), lost._value.get()
    for step in range(20):
        journal.write({"step": step})
    assert lost._value.get() == before
    assert sum(map(len, journal.kept)) <= 100
    with disk_with_room_for(path.stat().st_size):
        for step in range(20, 40):
            journal.write({"step": step})
        assert sum(map(len, journal.kept)) <= 100
    num_lost = int(lost._value.get() - before)
    assert 0 < num_lost < 20
    journal.write({"step": 40})
    assert steps(path) == [*range(40 - num_lost), 40]
    journal.close()


def test_rows_that_the_disk_never_took_are_told_of_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    with disk_with_room_for(0):
        journal.write({"step": 1})
        journal.close()
    assert "never took its last 1 rows" in caplog.text


def test_a_folder_that_cannot_be_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"run\.directory"):
        Journal(tmp_path / "file" / "metrics.jsonl")
