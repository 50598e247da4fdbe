"""Checkpoints: whole or not there.

    checkpoints/step-000020/  engine/...  state.json  manifest.json

Everything is written to a temporary sibling and synced, the manifest (sizes and CRCs) last, then
the folder is renamed. A folder whose manifest does not fit is damaged, and is never loaded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
ENGINE = "engine"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed its checks."""

    folder: Path
    step: int
    state: dict[str, Any]

    @property
    def engine_folder(self) -> Path:
        """What `LearnerEngine.load` reads."""
        return self.folder / ENGINE


def write_checkpoint(
    root: Path, *, step: int, state: dict[str, Any], save_engine: Callable[[Path], None]
) -> Path:
    """Write the checkpoint of `step` under `root`; its folder once it is safely there.

    Raises:
        CheckpointError: the disk refused; nothing is left behind.
    """
    final = _free_name(root, step)
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_engine(temporary / ENGINE)
        (temporary / STATE).write_text(json.dumps({**state, "step": step}), "utf8")
        _write_manifest(temporary)
        os.rename(temporary, final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} not written to {root}: {error}; make room or fix the"
            " folder, training goes on"
        ) from error
    return final


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root`, or None if there is none.

    Raises:
        CheckpointError: the newest one is damaged; names the file and the remedy.
    """
    folders = sorted(root.glob("step-*")) if root.is_dir() else []
    return _read(folders[-1]) if folders else None


def prune_checkpoints(root: Path, *, keep: int) -> None:
    """Delete all but the `keep` newest, and what crashes left half written."""
    for folder in [*sorted(root.glob("step-*"))[:-keep], *root.glob(".step-*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def _free_name(root: Path, step: int) -> Path:
    """A second checkpoint of one step stands beside the first: replacing it would leave a moment
    with neither."""
    final, number = root / f"step-{step:06d}", 1
    while final.exists():
        number += 1
        final = root / f"step-{step:06d}-{number:03d}"
    return final


def _read(folder: Path) -> Checkpoint:
    try:
        listed = dict(json.loads((folder / MANIFEST).read_text("utf8")))
        for name, (size, crc) in listed.items():
            path = folder / name
            # The size first: what is no file of the checkpoint may have no end.
            if not _is_within(folder, path) or path.stat().st_size != size:
                raise ValueError(f"{name} is not as it was written")
            if _fingerprint(path) != (size, crc):
                raise ValueError(f"{name} is not as it was written")
        state = json.loads((folder / STATE).read_text("utf8"))
        return Checkpoint(folder, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); delete it to go back to the checkpoint before it"
        ) from None


def _is_within(folder: Path, path: Path) -> bool:
    """Whether it is a file of the checkpoint's own."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    for path in [*files, *{path.parent for path in files}]:
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps(listed), "utf8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _fingerprint(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
