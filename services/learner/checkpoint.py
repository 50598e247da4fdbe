"""Checkpoints: whole or not there.

    checkpoints/step-000020/  engine/...  state.json  manifest.json

Everything is written to a temporary sibling and synced, the manifest (sizes and CRCs) last, then
the folder is renamed. A folder whose manifest does not fit is damaged, and is never loaded.

All of this may run in a thread beside the training: what it writes is a snapshot.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoint_names import PATTERN, checkpoint_name, place_of
from shared.errors import CheckpointError
from shared.new_folder import sync

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
    temporary = _hidden(final)
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
        remedy = "make room or fix the folder"
        if isinstance(error, _UnseenError):
            remedy = "put run.directory on a file system that all ranks share"
        raise CheckpointError(
            f"checkpoint of step {step} not written to {root}: {error}; {remedy}"
        ) from error
    return final


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root`, or None if there is none; reads every byte of it.

    Raises:
        CheckpointError: the newest one is damaged; names the file and the remedy.
    """
    folders = _folders(root)
    return read_checkpoint(folders[-1]) if folders else None


def read_checkpoint(
    folder: Path,
    *,
    is_needed: Callable[[str], bool] = lambda name: True,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """The checkpoint in `folder`, once its files were read and seen to be as they were written.

    Args:
        is_needed: by a file's name below `folder`; of the others the sizes alone are compared.
        on_read: is told now and then how many bytes were read, and of how many.
    Raises:
        CheckpointError: it is damaged; names the file and the remedy.
    """
    try:
        listed = dict(json.loads((folder / MANIFEST).read_text("utf8")))
        # The size first: what is no file of the checkpoint may have no end.
        for name, (size, _) in listed.items():
            path = folder / name
            _check(_is_within(folder, path) and path.stat().st_size == size, name)
        _check_contents(folder, {name: listed[name] for name in listed if is_needed(name)}, on_read)
        state = json.loads((folder / STATE).read_text("utf8"))
        return Checkpoint(folder, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); delete it to go back to the checkpoint before it"
        ) from None


def _check_contents(
    folder: Path, listed: Mapping[str, Fingerprint], on_read: Callable[[int, int], None]
) -> None:
    done, total = 0, sum(size for size, _ in listed.values())

    def count(size: int) -> None:
        nonlocal done
        done += size
        on_read(done, total)

    for name, (size, crc) in listed.items():
        _check(fingerprint(folder / name, on_read=count) == (size, crc), name)


def prune_checkpoints(
    root: Path, *, keep: int, keep_best: int = 0, scores: Mapping[int, float] | None = None
) -> None:
    """Delete all but the newest and the best, and what crashes left half written.

    Of a step that has several folders only the newest can stay.

    Args:
        keep: newest steps that stay.
        keep_best: of those that have a score, so many with the highest stay as well.
        scores: evaluation score by step; of equal ones the newer is the better.
    """
    folders, known = _folders(root), scores or {}
    newest = {_place(folder)[0]: folder for folder in folders}
    best = sorted((step for step in newest if step in known), key=lambda step: (known[step], step))
    kept = {newest[step] for step in [*list(newest)[-keep:], *best[::-1][:keep_best]]}
    for folder in folders:
        if folder not in kept:
            # Whoever reads it meanwhile finds all of it or nothing, and so does whoever comes
            # after a crash.
            shutil.rmtree(_hidden(folder), ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rename(_hidden(folder))
    for folder in root.glob(".step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Those under `root`, oldest first; what somebody named otherwise is none."""
    found = root.glob(PATTERN) if root.is_dir() else ()
    return sorted((each for each in found if place_of(each.name)), key=_place)


def _place(folder: Path) -> tuple[int, int]:
    """The step, and which of the step's folders it is."""
    place = place_of(folder.name)
    assert place is not None, "one of `_folders`"
    return place


def _hidden(folder: Path) -> Path:
    """Where it is as long as it is not whole."""
    return folder.with_name(f".{folder.name}.tmp")


def _free_name(root: Path, step: int) -> Path:
    """A second checkpoint of one step stands beside the first until it is there: replacing it
    would leave a moment with neither."""
    numbers = [number for of, number in map(_place, _folders(root)) if of == step]
    return root / checkpoint_name(step, max(numbers, default=0) + 1)


def _check(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is not as it was written")


def _is_within(folder: Path, path: Path) -> bool:
    """Whether it is a file of the checkpoint's own."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


class _UnseenError(OSError):
    """A rank wrote where this one does not see it."""


def _write_manifest(folder: Path, written: Mapping[str, Fingerprint]) -> None:
    """List `written`, which is on the disk, and every other file, which is brought there."""
    unseen = [name for name in written if not (folder / name).is_file()]
    if unseen:
        raise _UnseenError(f"{unseen[0]} was written by another rank and is not seen by rank 0")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    rest = {name: path for name, path in files.items() if name not in written}
    listed = {**written, **{name: fingerprint(path) for name, path in rest.items()}}
    for path in [*rest.values(), *{path.parent for path in files.values()}]:
        sync(path)
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(listed.items()))), "utf8")
    sync(folder / MANIFEST)
    sync(folder)


def fingerprint(path: Path, *, on_read: Callable[[int], None] = lambda size: None) -> Fingerprint:
    """Size and CRC-32 of a file, by reading it.

    Args:
        on_read: is told the size of each part that was read.
    """
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            on_read(len(chunk))
    return size, crc
