"""A JSON-lines file with one row per step, which a resumed run cuts back to its checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends rows that carry a `step`; each row is on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; NaN becomes null, which JSON has."""
        self._file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    @property
    def num_bytes(self) -> int:
        """Length of the file; a checkpoint keeps it."""
        return self._path.stat().st_size

    def cut_to(self, num_bytes: int) -> None:
        """Forget what was written after the file had this length."""
        self._file.close()
        os.truncate(self._path, min(num_bytes, self.num_bytes))
        self._file = self._path.open("a", encoding="utf8")

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
