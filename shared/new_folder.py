"""A folder that is made whole or not at all, on the disk before it has its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import ConfigError, StartError


def check_free(destination: Path) -> None:
    """Raises ConfigError if there is something of this name."""
    if destination.exists():
        raise ConfigError(f"{destination}: exists; give a folder that does not exist yet")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Where to write what becomes `destination` in the end, and is gone if that does not come.

    Raises:
        StartError: the disk refused.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    # In a container the next process may have the number of the one that was killed.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_all(temporary)
        temporary.rename(destination)
        sync(destination.parent)
    except OSError as error:
        raise StartError(
            f"{destination}: not written ({error}); make room or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_folder(destination: Path) -> Iterator[Path]:
    """Where to write what takes the place of `destination`, which stays as it is until then.

    For one process at a time: what a killed one left is removed, or put back if it had just been
    taken away. Between the two renames nothing has the name.

    Raises:
        OSError: the disk refused.
    """
    # A link stays one; what it leads to is replaced.
    whole = destination.resolve()
    new, old = (whole.with_name(f".{whole.name}.{which}.tmp") for which in ("new", "old"))
    _tidy(whole, new, old)
    try:
        new.mkdir(parents=True)
        yield new
        _sync_all(new)
        if whole.exists():
            whole.rename(old)
        new.rename(whole)
        sync(whole.parent)
    finally:
        _tidy(whole, new, old)


def _tidy(whole: Path, new: Path, old: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not whole.exists():
        old.rename(whole)
    shutil.rmtree(old, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
