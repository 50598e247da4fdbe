"""A JSON-lines file with one row per step, which a resumed run cuts back to its checkpoint.

    disk      rows that it is known to hold, `num_bytes` of them
    memory    the rows after those: written, but not synced; or refused by the disk

A disk that takes no row does not end a run: its rows wait in memory, and are written in their order
once there is room. A checkpoint keeps `num_bytes` and the rows after it, so that none is missing
from a run that is resumed, whatever the disk had taken by then.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.metrics.learner import LEARNER_ROWS_LOST, LEARNER_ROWS_REFUSED
from shared.run_file import unwritable

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 64 * 2**20
"""Of rows in memory; one that the disk refuses and that has no room there is lost."""


class Journal:
    """Appends rows that carry a `step`.

    Each is on its way to the disk when `write` returns, or waits in memory until there is room.

    Args:
        max_kept_bytes: of the rows in memory.
    Raises:
        StartError: there cannot be such a file.

    Attributes:
        num_bytes: length of the file's beginning that the disk is known to hold.
    """

    def __init__(self, path: Path, *, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._path = path
        self._max_kept_bytes = max_kept_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(path.parent, error) from None
        self.num_bytes = path.stat().st_size
        self._rows: deque[bytes] = deque()
        self._num_kept_bytes = 0
        self._num_written = 0
        self._num_torn_bytes = 0
        self._num_late = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; NaN becomes null, which JSON has."""
        self._append(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")

    @property
    def kept(self) -> list[str]:
        """The rows after `num_bytes`, as lines."""
        return [row.decode() for row in self._rows]

    def sync(self) -> None:
        """Have the disk hold what was written, if it can; blocks, and nobody writes meanwhile."""
        self._write_what_waits()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.error("%s not synced: %s", self._path, error)
            return
        for _ in range(self._num_written):
            self._forget_oldest()

    def cut_to(self, num_bytes: int, kept: Iterable[str] = ()) -> None:
        """Forget what was written after the file had this length; then come the rows `kept`."""
        self._file.close()
        self.num_bytes = min(num_bytes, self._path.stat().st_size)
        os.truncate(self._path, self.num_bytes)
        self._file = self._path.open("ab", buffering=0)
        self._rows.clear()
        self._num_kept_bytes = self._num_written = self._num_torn_bytes = self._num_late = 0
        for line in kept:
            self._append(line)

    def close(self) -> None:
        """No more rows."""
        self._write_what_waits()
        self._file.close()
        if self._num_waiting:
            logger.error("%s never took its last %d rows", self._path, self._num_waiting)

    @property
    def _num_waiting(self) -> int:
        """Rows that the file does not have, or not to their end."""
        return len(self._rows) - self._num_written

    def _append(self, line: str) -> None:
        self._rows.append(line.encode())
        self._num_kept_bytes += len(self._rows[-1])
        self._write_what_waits()
        if self._num_waiting:
            LEARNER_ROWS_REFUSED.labels(file=self._path.stem).inc()
            self._num_late += 1
        while self._num_kept_bytes > self._max_kept_bytes and self._num_written:
            self._forget_oldest()
        # The first may have been begun in the file.
        if self._num_kept_bytes > self._max_kept_bytes and self._num_waiting > 1:
            self._num_kept_bytes -= len(self._rows.pop())
            LEARNER_ROWS_LOST.labels(file=self._path.stem).inc()

    def _write_what_waits(self) -> None:
        """Row by row, as many as the disk takes; of the first that it refuses perhaps a part."""
        try:
            while self._num_waiting:
                row = self._rows[self._num_written]
                while self._num_torn_bytes < len(row):
                    self._num_torn_bytes += self._file.write(row[self._num_torn_bytes :])
                self._num_written, self._num_torn_bytes = self._num_written + 1, 0
        except OSError as error:
            if not self._num_late:
                logger.error(
                    "%s takes no row (%s); make room: rows wait in memory, %d MiB of them at most",
                    self._path,
                    error,
                    self._max_kept_bytes // 2**20,
                )
            return
        if self._num_late:
            logger.warning("%s has the %d rows that came late", self._path, self._num_late)
        self._num_late = 0

    def _forget_oldest(self) -> None:
        """The file has it."""
        num_bytes = len(self._rows.popleft())
        self.num_bytes += num_bytes
        self._num_kept_bytes -= num_bytes
        self._num_written -= 1


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
