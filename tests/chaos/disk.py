"""A disk of a few MiB for the folder of a run, which can be filled: ENOSPC from a real file system.

A tmpfs mounted in a mount namespace of this process and its children, so that nobody else sees
it and nothing is left mounted whatever happens. Without the right to mount there is none.
"""

from __future__ import annotations

import ctypes
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
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


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


def leave_for_namespace() -> bool:
    """Move this process, which must have one thread, to a mount namespace of its own, if it may."""
    user = os.geteuid()
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)) != 0:
        return False
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    may = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0
    os.environ[_IN_NAMESPACE] = "yes" if may else "no"
    return may


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A file system of its own at `folder`."""

    folder: Path

    @contextmanager
    def full(self, *, room_bytes: int = 0) -> Iterator[None]:
        """With no more room than this, until the context ends."""
        # Seen from another namespace, the folder is on the machine's own disk.
        size = shutil.disk_usage(self.folder).total
        assert size <= SIZE_MIB * 2**20, f"{self.folder} is on a disk of {size} bytes"
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
