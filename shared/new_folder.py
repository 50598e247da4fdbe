"""A folder that is made whole or not at all."""

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
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(destination)
    except OSError as error:
        raise StartError(
            f"{destination}: not written ({error}); make room or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
