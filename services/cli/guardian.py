"""Ends a run's processes when the launcher is gone, even if it was killed.

A process of its own, because a killed launcher can end nobody. The launcher writes a line per
started and ended process to this one's standard input:

    + STAGE PID     started, leader of its own process group
    - PID           ended

End of file means that the launcher has ended. Whatever still runs is ended then, lower stages
first, and the folder of Redis' socket is removed. Only the standard library is
imported: one of these runs beside every launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

_POLL_SECONDS = 0.05


def main() -> None:
    """Watch standard input.

    Arguments: the seconds each stage gets to end by itself; a folder to remove, or nothing.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    running = read_running(sys.stdin)
    for stage in sorted(set(running.values())):
        leaders = [pid for pid, of in running.items() if of == stage]
        end_groups(leaders, grace_seconds=float(sys.argv[1]))
    for folder in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)


def read_running(lines: Iterable[str]) -> dict[int, int]:
    """The stage of each process that was started and has not ended, at the end of `lines`."""
    running: dict[int, int] = {}
    for line in lines:
        match line.split():
            case ["+", stage, pid]:
                running[int(pid)] = int(stage)
            case ["-", pid]:
                running.pop(int(pid), None)
    return running


def end_groups(leaders: Collection[int], *, grace_seconds: float) -> None:
    """SIGTERM each leader, wait, then SIGKILL what is left of each group."""
    for pid in leaders:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while any(map(is_running, leaders)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for pid in leaders:
        kill_group(pid)


def kill_group(leader: int) -> None:
    """SIGKILL every process of the group that `leader` leads or led."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether it has not ended; one that ended and was not waited for has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True


if __name__ == "__main__":
    main()
