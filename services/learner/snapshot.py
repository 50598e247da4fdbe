"""A copy of the engine's state in host memory, and the threads that bring it to the disk.

Training waits for the copy alone. Then each rank writes its own files in a thread of its own; rank
0's thread tells the others where, and hears from all how it went. What they say to each other goes
through a process group that nothing else uses, so that it cannot meet a collective of training.

A copy takes as much host memory as its files take on the disk, on each rank for its own, until
each file is written: 16 bytes a parameter over all ranks together (18 with bfloat16 weights under
their float32 master), of which the weights themselves are on rank 0 below ZeRO-3.
"""

from __future__ import annotations

import copy
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, Any, BinaryIO, Self, cast

import torch
from torch import Tensor

from services.learner.checkpoint import Fingerprint
from services.learner.parts import write_parts
from services.learner.ranks import COLLECTIVE_TIMEOUT, Ranks, reason_of
from shared.errors import EngineError
from shared.new_folder import sync

logger = logging.getLogger(__name__)

Files = dict[str, Any]
"""What each file will hold, by its name below the engine's folder."""

WRITING_TIMEOUT = 2 * COLLECTIVE_TIMEOUT
"""Bounds a rank's part of a checkpoint: the wait for rank 0's word, and for the slowest disk."""


class HostFiles:
    """Stands where DeepSpeed has its checkpoint engine, and keeps what it is given to write.

    Args:
        root: what DeepSpeed was told to write to; nothing is written there.
        copies: False keeps the live tensors, which must then not move until they are written.
    """

    def __init__(self, root: Path, *, copies: bool) -> None:
        self.files: Files = {}
        self._root = root
        self._copies = copies

    def create(self, info: object) -> None:
        """A save begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made when files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a file's content."""
        content = host_copy(state_dict, {}) if self._copies else state_dict
        self.files[str(Path(path).relative_to(self._root))] = content

    def commit(self, info: object) -> bool:
        """The save has ended."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Weights that all ranks have are one rank's to write."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """DeepSpeed has nothing to wait for."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether a view would be kept with all that it is a view of."""
        return not self._copies


class Snapshot:
    """One rank's part of the engine's state at one moment; a context, which lets it go.

    Args:
        layout: what the engine that reads it must agree with.
    """

    def __init__(self, files: Files, ranks: Ranks, layout: Mapping[str, int]) -> None:
        self._files = files
        self._ranks = ranks
        self._layout = layout
        self._is_awaited = ranks.world_size > 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Rank 0 tells the others that nothing is to be written, if it has not told them where."""
        self._files.clear()
        if self._is_awaited and self._ranks.rank == 0:
            with _rank_failures():
                self._tell(b"")

    def write(self, folder: Path) -> dict[str, Fingerprint]:
        """Have all ranks write to `folder`, which must not exist; for rank 0, in any thread.

        Returns:
            the files below `folder` that the disk has.
        Raises:
            OSError: a rank could not write.
            EngineError: a rank is gone.
        """
        with _rank_failures():
            self._tell(str(folder).encode())
            written = self._write(folder)
        write_parts(folder, {name: size for name, (size, _) in written.items()}, self._layout)
        return written

    def follow(self) -> None:
        """Write where rank 0 says, if it says so; for every other rank, in a thread beside."""
        with self:
            try:
                folder = self._tell(b"")
                if folder:
                    self._write_and_tell(Path(folder.decode()))
            except RuntimeError as error:
                logger.error("amid a checkpoint %s", reason_of(error))

    def _tell(self, folder: bytes) -> bytes:
        self._is_awaited = False
        return self._ranks.tell_writers(folder)

    def _write(self, folder: Path) -> dict[str, Fingerprint]:
        outcomes = self._write_and_tell(folder)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        if errors:
            raise OSError("; ".join(errors))
        return {name: (size, crc) for files, _ in outcomes for name, (size, crc) in files.items()}

    def _write_and_tell(self, folder: Path) -> list[tuple[dict[str, Fingerprint], str]]:
        """What each rank wrote, or why it could not."""
        written: dict[str, Fingerprint] = {}
        reason = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while self._files:
                name, content = self._files.popitem()
                written[name] = write_file(folder / name, content)
                del content
        except OSError as error:
            reason = str(error)
        outcome = json.dumps([written, reason]).encode()
        return [json.loads(each) for each in self._ranks.gather_writers(outcome)]


class Writing:
    """The thread in which a rank other than 0 writes, one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread: Thread | None = None

    def begin(self, follow: Callable[[], None]) -> None:
        """Let a snapshot follow rank 0, beside the training."""
        # A disk that hangs must not keep the process from ending.
        self._thread = Thread(target=follow, name="checkpoint", daemon=True)
        self._thread.start()

    def end(self, *, seconds: float = WRITING_TIMEOUT.total_seconds()) -> None:
        """Wait until it has followed.

        Raises:
            EngineError: it has not after so many seconds.
        """
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise EngineError(f"a checkpoint is not written after {seconds:.0f} s: the disk hangs")
        self._thread = None


@contextmanager
def _rank_failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"amid a checkpoint {reason_of(error)}") from error


def host_copy(value: Any, seen: dict[Any, Tensor]) -> Any:
    """The same containers with every tensor copied to the host, packed; what is one stays one."""
    if isinstance(value, Tensor):
        place = (value.untyped_storage().data_ptr(), value.storage_offset())
        key = (*place, value.dtype, value.shape, value.stride())
        if value.numel() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: host_copy(each, seen) for key, each in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(host_copy(each, seen) for each in value)
    return copy.deepcopy(value)


def write_file(path: Path, content: Any) -> Fingerprint:
    """Bring one file of a checkpoint to the disk.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        counted = _Counted(file)
        try:
            torch.save(content, cast(IO[bytes], counted))
        except RuntimeError as error:
            # torch says where it stood, not what the disk said.
            raise counted.refusal or OSError(str(error)) from error
    sync(path)
    sync(path.parent)
    return counted.size, counted.crc


class _Counted:
    """A file that knows its size and CRC, and what the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.crc = 0
        self.refusal: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        """All of it."""
        try:
            self._file.write(data)
        except OSError as error:
            self.refusal = error
            raise
        view = memoryview(data)
        self.size += view.nbytes
        self.crc = zlib.crc32(view, self.crc)
        return view.nbytes

    def flush(self) -> None:
        """What torch asks at the end."""
        self._file.flush()
