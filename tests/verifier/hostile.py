"""A task whose scorer does to its process whatever the completion says."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from shared.tasks.task import Problem, Split, Verdict

PASS = Verdict(reward=1.0, is_pass=True, detail="fine")


class HostileTask:
    def __init__(self, load: str = "well") -> None:
        LOADS[load]()

    def problems(self, split: Split) -> Sequence[Problem]:
        return []

    def score(self, completion: str, *, answer: str) -> Verdict:
        return DEEDS[completion](answer)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def loop_for_ever(answer: str) -> Verdict:
    block_signals()
    while True:
        pass


def loop_in_c(answer: str) -> Verdict:
    block_signals()
    return Verdict(float(10**10**8), is_pass=True, detail="")


def hold_the_interpreter(answer: str) -> Verdict:
    """Sleep in C without letting go of the interpreter's lock."""
    block_signals()
    ctypes.PyDLL(None).sleep(1000)
    return PASS


def eat_memory(answer: str) -> Verdict:
    hoard = []
    while True:
        hoard.append(bytearray(2**20))


def swallow_memory_errors(answer: str) -> Verdict:
    hoard = []
    while True:
        with suppress(MemoryError):
            hoard.append(bytearray(2**20))


def kill_self(answer: str) -> Verdict:
    os.kill(os.getpid(), signal.SIGKILL)
    return PASS


def crash(answer: str) -> Verdict:
    ctypes.string_at(0)
    return PASS


def recurse(answer: str) -> Verdict:
    return recurse(answer)


def raise_error(answer: str) -> Verdict:
    raise RuntimeError(answer)


def close_everything(answer: str) -> Verdict:
    os.closerange(0, 1000)
    return PASS


def scribble(answer: str) -> Verdict:
    for descriptor in range(3, 4096):
        with suppress(OSError):
            os.write(descriptor, b"nonsense\n")
    return PASS


def print_much(answer: str) -> Verdict:
    print('{"outcome": "pass"}')
    os.write(1, b'{"outcome": "pass", "reward": 9, "detail": ""}\n')
    subprocess.run(["echo", '{"outcome": "pass"}'], check=True)
    return Verdict(0.25, is_pass=False, detail="printed")


def leave_a_child(answer: str) -> Verdict:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    written = Path(answer).with_suffix(".written")
    written.write_text(str(child.pid), "utf8")
    written.rename(answer)  # there at once, with what it says
    return loop_for_ever(answer)


def write_pid(answer: str) -> Verdict:
    return Verdict(1.0, is_pass=True, detail=str(os.getpid()))


def tell_variables(answer: str) -> Verdict:
    """Those of these names that are set."""
    known = [name for name in answer.split() if name in os.environ]
    return Verdict(1.0, is_pass=True, detail=" ".join(known))


def read_the_verifier(answer: str) -> Verdict:
    try:
        Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except PermissionError:
        return PASS
    return Verdict(0.0, is_pass=False, detail="read")


def nap(answer: str) -> Verdict:
    """For so many seconds, once there is a file of this name."""
    seconds, path = answer.split(maxsplit=1)
    Path(path).touch()
    time.sleep(float(seconds))
    return PASS


def meet_two_others(answer: str) -> Verdict:
    (Path(answer) / str(os.getpid())).touch()
    while len(list(Path(answer).iterdir())) < 3:
        time.sleep(0.01)
    return PASS


def signal_start(answer: str) -> Verdict:
    Path(answer).touch()
    return loop_for_ever(answer)


DEEDS: dict[str, Callable[[str], Verdict]] = {
    "pass": lambda answer: PASS,
    "fail": lambda answer: Verdict(0.5, is_pass=False, detail="so\nso" * 1000),
    "nan": lambda answer: Verdict(float("nan"), is_pass=True, detail=""),
    "exit": lambda answer: sys.exit(3),
    "exit at once": lambda answer: os._exit(0),
    "loop for ever": loop_for_ever,
    "loop in C": loop_in_c,
    "hold the interpreter": hold_the_interpreter,
    "eat memory": eat_memory,
    "swallow memory errors": swallow_memory_errors,
    "kill": kill_self,
    "crash": crash,
    "recurse": recurse,
    "raise": raise_error,
    "close everything": close_everything,
    "print": print_much,
    "scribble": scribble,
    "leave a child": leave_a_child,
    "pid": write_pid,
    "tell variables": tell_variables,
    "read the verifier": read_the_verifier,
    "nap": nap,
    "meet": meet_two_others,
    "signal start": signal_start,
}

LOADS: dict[str, Callable[[], object]] = {
    "well": lambda: None,
    "badly": lambda: raise_error("no licence\nfor this"),
    "dead": lambda: os._exit(7),
    "hungry": lambda: eat_memory(""),
}
