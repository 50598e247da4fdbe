"""The copy of the run file in the folder of its run, which `status`, `audit` and others read."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from shared.errors import StartError

NAME = "run.toml"


def keep_run_file(folder: Path, run_file: Path) -> None:
    """Copy the run file in; one that it replaces and that differs is kept beside it.

    The time of the copy says when the run was last started.

    Raises:
        StartError: the folder cannot be written.
    """
    kept = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            if run_file.samefile(kept) or run_file.read_bytes() == kept.read_bytes():
                os.utime(kept)
                return
            os.replace(kept, folder / f"run-until-{time.strftime('%Y%m%d-%H%M%S')}.toml")
        # Whoever looks in between finds no file or a whole one.
        new = folder / f".{NAME}.new"
        shutil.copyfile(run_file, new)
        os.replace(new, kept)
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> StartError:
    """What there is to say of a run folder that refuses a file."""
    return StartError(
        f"run.directory: {folder} cannot be written ({error}); make it writable or choose another"
    )
