"""The rows of metrics.jsonl: reading them, also while the learner writes.

A row is what the learner measured in one step; any key may be missing or null. Numbers that are
not finite are read as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class RowReader:
    """Reads the file again only where it grew; a resumed learner replaces it by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id: tuple[int, int] | None = None
        self._offset = 0
        self.rows: list[Row] = []

    def read(self) -> list[Row]:
        """All rows so far; nothing if there is no file yet."""
        try:
            with self._path.open("rb") as file:
                self._read_from(file)
        except FileNotFoundError:
            self.rows, self._offset, self._file_id = [], 0, None
        return self.rows

    def _read_from(self, file: Any) -> None:
        status = self._path.stat()
        file_id = (status.st_dev, status.st_ino)
        if file_id != self._file_id or status.st_size < self._offset:
            self.rows, self._offset, self._file_id = [], 0, file_id
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # being written
            self._offset += len(line)
            row = _parse(line)
            if row is not None:
                self.rows.append(row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a finished file; unreadable lines are left out."""
    return RowReader(path).read()


def number(row: Row, key: str) -> float | None:
    """A finite number, or None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def series(rows: Sequence[Row], key: str, *, by: str = "step") -> tuple[list[float], list[float]]:
    """The rows that have both `by` and `key`: their values of `by`, their values of `key`."""
    pairs = [(number(row, by), number(row, key)) for row in rows]
    complete = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in complete], [y for _, y in complete]


def values(rows: Sequence[Row], key: str) -> list[float]:
    """The values of `key` in the rows that have one."""
    return [value for row in rows if (value := number(row, key)) is not None]


def latest(rows: Sequence[Row], key: str) -> float | None:
    """The newest value of `key`."""
    return next((found for row in reversed(rows) if (found := number(row, key)) is not None), None)


def first(rows: Sequence[Row], key: str) -> float | None:
    """The oldest value of `key`."""
    return next((found for row in rows if (found := number(row, key)) is not None), None)


def profile(row: Row, key: str) -> list[float | None]:
    """A list of numbers in a fixed order, None where one is missing; [] if there is no list."""
    given = row.get(key)
    if not isinstance(given, list):
        return []
    return [number({key: value}, key) for value in given]


def numbered(rows: Sequence[Row], prefix: str) -> list[tuple[float, str]]:
    """Keys such as covariance_p99_8 that have a value, with their numbers, rising."""
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    found = []
    for key in keys:
        try:
            found.append((float(key.removeprefix(prefix).replace("_", ".")), key))
        except ValueError:
            continue
    return sorted((value, key) for value, key in found if values(rows, key))


def is_step(row: Row) -> bool:
    """Whether a row is of a training step; an evaluation may have a row of its own."""
    return any(number(row, key) is not None for key in ("seconds", "tokens", "reward_mean"))


def merged(rows: Sequence[Row]) -> Row:
    """The newest value of every key that has a number."""
    return {key: row[key] for row in rows for key in row if number(row, key) is not None}


def staleness_counts(row: Row) -> dict[int, int]:
    """Completions by staleness in a row; {"0": 128} and [[0, 128]] are both read."""
    given = row.get("staleness_counts", row.get("staleness"))
    pairs: Any = given.items() if isinstance(given, Mapping) else given
    try:
        return {int(age): int(count) for age, count in pairs or ()}
    except (TypeError, ValueError):
        return {}


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
