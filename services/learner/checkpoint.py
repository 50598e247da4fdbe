"""Checkpoints: whole or not there.

    checkpoints/step-000020/  engine/...  state.json  manifest.json

Everything is written to a temporary sibling and synced, the manifest (sizes and CRCs) last, then
the folder is renamed. A folder whose manifest does not fit is damaged, and is never loaded.

All of this may run in a thread beside the training: what it writes is a snapshot.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
ENGINE = "engine"
_CHUNK_BYTES = 2**20

Fingerprint = tuple[int, int]
"""Size and CRC-32 of a file."""

Written = Mapping[str, Fingerprint] | None
"""Files below the engine's folder that are synced already, by whoever wrote them."""


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
    root: Path, *, step: int, state: dict[str, Any], save_engine: Callable[[Path], Written]
) -> Path:
    """Write the checkpoint of `step` under `root`; its folder once it is safely there.

    Args:
        save_engine: what it does not list is read again, and synced here.
    Raises:
        CheckpointError: the disk refused; nothing is left behind.
    """
    final = _free_name(root, step)
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        written = save_engine(temporary / ENGINE) or {}
        (temporary / STATE).write_text(json.dumps({**state, "step": step}), "utf8")
        _write_manifest(temporary, {f"{ENGINE}/{name}": each for name, each in written.items()})
        os.rename(temporary, final)
        sync(root)
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


def prune_checkpoints(
    root: Path, *, keep: int, keep_best: int = 0, scores: Mapping[int, float] | None = None
) -> None:
    """Delete all but the newest and the best, and what crashes left half written.

    Args:
        keep: newest ones that stay.
        keep_best: of those that have a score, so many with the highest stay as well.
        scores: evaluation score by step; of equal ones the newer is the better.
    """
    folders, known = sorted(root.glob("step-*")), scores or {}
    scored = [folder for folder in folders if _step_of(folder) in known]
    best = sorted(scored, key=lambda folder: (known[_step_of(folder)], folder.name))[::-1]
    kept = {*folders[-keep:], *best[:keep_best]}
    for folder in [*(each for each in folders if each not in kept), *root.glob(".step-*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def _step_of(folder: Path) -> int:
    """By the folder's name; -1 if somebody named it otherwise."""
    number = folder.name.split("-")[1]
    return int(number) if number.isdecimal() else -1


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
            is_whole = _is_within(folder, path) and path.stat().st_size == size
            if not is_whole or fingerprint(path) != (size, crc):
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


def _write_manifest(folder: Path, written: Mapping[str, Fingerprint]) -> None:
    """List `written`, which is on the disk, and every other file, which is brought there."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    rest = {name: path for name, path in files.items() if name not in written}
    listed = {**written, **{name: fingerprint(path) for name, path in rest.items()}}
    for path in [*rest.values(), *{path.parent for path in files.values()}]:
        sync(path)
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(listed.items()))), "utf8")
    sync(folder / MANIFEST)
    sync(folder)


def fingerprint(path: Path) -> Fingerprint:
    """Size and CRC-32 of a file, by reading it."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
