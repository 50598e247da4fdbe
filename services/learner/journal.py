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

    def cut_after(self, step: int) -> None:
        """Forget rows of later steps, and a last row that a crash left unfinished."""
        self._file.close()
        kept = [line for line in self._path.read_text("utf8").splitlines() if _step(line) <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), "utf8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf8")

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
