"""A disk of a few MiB for the folder of a run, which can be filled: ENOSPC from a real file system.

A tmpfs mounted in a mount namespace of this process and its children, so that nobody else sees
it and nothing is left mounted whatever happens. Without the right to mount there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SIZE_MIB = 128
ROOM_BYTES = 2**20
"""What a nearly full disk still takes: a checkpoint begins, and is cut short."""

_IN_NAMESPACE = "ISENTROPE_CHAOS_MAY_MOUNT"
_CHUNK_BYTES = 2**16


def enter_namespace(arguments: list[str]) -> None:
    """Become the same program in a mount namespace of its own, where this user may have one."""
    if _IN_NAMESPACE in os.environ:
        return
    wrapper = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    can = shutil.which(wrapper[0]) is not None
    may = can and subprocess.run([*wrapper, "true"], capture_output=True).returncode == 0
    os.environ[_IN_NAMESPACE] = "yes" if may else "no"
    if may:
        os.execvp(wrapper[0], [*wrapper, sys.executable, "-m", "tests.chaos", *arguments])


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A file system of its own at `folder`."""

    folder: Path

    @contextmanager
    def full(self, *, room_bytes: int = 0) -> Iterator[None]:
        """With no more room than this, until the context ends."""
        filler = self.folder / ".filler"
        try:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(_CHUNK_BYTES))
            os.truncate(filler, filler.stat().st_size - room_bytes)
            yield
        finally:
            filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk | None]:
    """Mount one at `folder`, None if that is not allowed; what it holds at the end is kept."""
    if os.environ.get(_IN_NAMESPACE) != "yes":
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={SIZE_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)], check=True)
    try:
        yield SmallDisk(folder)
    finally:
        with tempfile.TemporaryDirectory(dir=folder.parent) as kept:
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            subprocess.run(["umount", str(folder)], check=True)
            shutil.copytree(kept, folder, dirs_exist_ok=True)
