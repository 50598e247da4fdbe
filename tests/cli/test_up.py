"""`isentrope up` as a process, with stand-ins for the services and the real embedded Redis."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cli.guardian import is_running, kill_group
from services.cli.run_folder import RunFolder
from shared.errors import StartError

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("drive_up.py")
RUN_FILE = """
[run]
name = "stand"
num_steps = 3
[model]
path = "stand/in"
[network]
call_timeout_seconds = 60.0
start_timeout_seconds = 120.0
"""
IMPATIENT = RUN_FILE.replace("call_timeout_seconds = 60.0", "call_timeout_seconds = 1.0")
EVERYBODY = {
    "verifier-0": "",
    "rollout-0": "",
    "rollout-1": "",
    "learner": "steps=3 all=4 asked=2",
}
"""The launcher's second look after all are up sees all of them, before the first step."""

PATIENCE_SECONDS = 120.0
ENDLESS = "steps=10000 all=4 seconds=0.1"


class Launcher:
    """A running `up`; `wait` gives what it printed."""

    def __init__(self, folder: Path, behaviours: dict[str, str], *arguments: str) -> None:
        self.runs = folder / "runs"
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(behaviours), "up", "run.toml", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def folder(self) -> Path:
        return next(path.parent for path in self.runs.glob("*/run.toml"))

    def events(self) -> list[str]:
        return [
            line for path in self.runs.glob("*/events") for line in path.read_text().splitlines()
        ]

    def until(self, what: Callable[[list[str]], bool]) -> None:
        """Wait for an event; fails after long patience or when the launcher ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what(self.events()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, self.events()
            time.sleep(0.05)

    def wait(self, status: int) -> tuple[str, str]:
        output, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == status, output + errors
        return output, errors

    def left(self) -> list[int]:
        """Processes of the run that still run."""
        pids = [int(line.split()[1]) for line in self.events() if line.startswith("pid ")]
        return [pid for pid in pids if is_running(pid)]

    def until_nobody_is_left(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.left() == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    (tmp_path / "run.toml").write_text(RUN_FILE)
    started: list[Launcher] = []

    def one(behaviours: dict[str, str], *arguments: str) -> Launcher:
        started.append(Launcher(tmp_path, behaviours, *arguments))
        return started[-1]

    yield one
    for launcher in started:
        launcher.process.kill()
        launcher.process.communicate()
        for pid in launcher.left():
            kill_group(pid)


def is_training(events: list[str]) -> bool:
    """Whether everybody is up and a step was made."""
    return sum(line.startswith("up ") for line in events) == 4 and "row" in events


def test_a_run_goes_from_start_to_closing_table(start: Callable[..., Launcher]) -> None:
    launcher = start(EVERYBODY)
    output, errors = launcher.wait(0)
    assert errors == ""
    assert "all services are up" in output
    assert [f"step {step}/3" in output for step in (1, 2, 3)] == [True] * 3
    assert "+0.100, +7.1 standard errors (unpaired)" in output
    assert re.search(r"mixed-version completions +rollout-0 7, rollout-1 7", output)
    assert re.search(r"trajectories over max_staleness +0 of 36", output)
    assert launcher.events().index("end learner") < launcher.events().index("end rollout-0")
    assert (launcher.folder / "report.html").stat().st_size > 10_000
    assert (launcher.folder / "run.toml").read_text() == RUN_FILE
    assert {path.name for path in (launcher.folder / "logs").iterdir()} == {
        f"{name}.log" for name in [*EVERYBODY, "redis"]
    }
    assert launcher.left() == []
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(steps) == 3
    assert all(line.isascii() for line in steps)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output), "control characters"


def test_a_replica_that_dies_only_degrades_and_is_welcomed_back(
    start: Callable[..., Launcher],
) -> None:
    launcher = start({**EVERYBODY, "rollout-0": "die=3 all=4", "learner": ENDLESS})
    launcher.until(lambda events: "end rollout-0" in events)
    folder = launcher.folder
    again = subprocess.Popen(
        [sys.executable, str(DRIVER.with_name("stand_in.py")), "rollout", "rollout-0", str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "REDIS_URL": (folder / "redis-url-rollout").read_text().strip(),
        },
    )
    try:
        output = launcher.process.stdout
        assert output is not None
        said = []
        for line in output:
            said.append(line)
            if "rollout-0 is back" in line:
                break
        url = r'REDIS_URL="\$\(cat \S+/redis-url-rollout\)"'
        command = url + r" \S+ -m services.rollout --config \S+run.toml --run-id \S+"
        assert re.search(command + " --name rollout-0", "".join(said))
        assert "warning: rollout-0 exited with status 3; training goes on" in "".join(said)
        status = subprocess.run(
            [sys.executable, "-m", "services.cli", "status", str(folder)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "doing               training" in status.stdout
        assert "rollout-0" in status.stdout
        assert {path.name for path in folder.glob("redis-url*")} == {
            "redis-url", "redis-url-learner", "redis-url-rollout", "redis-url-verifier",
        }  # fmt: skip
        assert {path.stat().st_mode & 0o777 for path in folder.glob("redis-url*")} == {0o600}
        assert "@" not in "".join(said), "a password is printed"
    finally:
        launcher.process.send_signal(signal.SIGTERM)
        again.terminate()
        again.wait(PATIENCE_SECONDS)
    launcher.wait(130)
    launcher.until_nobody_is_left()


def test_the_last_replica_of_a_role_ends_the_run_with_its_last_lines(
    start: Callable[..., Launcher],
) -> None:
    launcher = start({**EVERYBODY, "verifier-0": "die=3 all=4 child", "learner": ENDLESS})
    output, errors = launcher.wait(1)
    assert "line 15\n" in output
    assert "line 14\n" not in output
    assert "line 29\n" in output
    assert errors.startswith("error: verifier-0 exited with status 3; its log: runs/stand-")
    assert errors.count("\n") == 1
    assert launcher.left() == []


def test_a_killed_learner_ends_the_run_and_its_children(start: Callable[..., Launcher]) -> None:
    launcher = start({**EVERYBODY, "learner": ENDLESS + " child"})
    launcher.until(is_training)
    os.kill(pid_of(launcher, "learner"), signal.SIGKILL)
    _, errors = launcher.wait(1)
    assert errors.startswith("error: learner was killed by SIGKILL")
    assert launcher.left() == []


def test_a_refused_configuration_is_one_line_and_status_2(start: Callable[..., Launcher]) -> None:
    output, errors = start({**EVERYBODY, "rollout-1": "refuse"}).wait(2)
    assert errors == "error: model.path = 'none': no such model\n"
    assert "starting" not in output


def test_ctrl_c_ends_the_learner_first_and_says_how_to_go_on(
    start: Callable[..., Launcher],
) -> None:
    launcher = start({**EVERYBODY, "rollout-0": "child", "learner": ENDLESS})
    launcher.until(is_training)
    launcher.process.send_signal(signal.SIGINT)
    output, errors = launcher.wait(130)
    events = launcher.events()
    assert events.index("checkpoint") < events.index("end learner") < events.index("end rollout-0")
    assert output.splitlines()[-1] == (
        f"stopped. To go on: isentrope up run.toml --resume --run-id {launcher.folder.name}"
    )
    assert errors == ""
    assert not list(launcher.folder.glob("redis-url*"))
    assert launcher.left() == []


def test_a_second_ctrl_c_kills_at_once(start: Callable[..., Launcher], tmp_path: Path) -> None:
    patient = RUN_FILE.replace("call_timeout_seconds = 60.0", "call_timeout_seconds = 200.0")
    (tmp_path / "run.toml").write_text(patient)
    launcher = start({**EVERYBODY, "rollout-0": "child stubborn", "learner": ENDLESS})
    launcher.until(is_training)
    launcher.process.send_signal(signal.SIGINT)
    launcher.until(lambda events: "end learner" in events)
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait(130)
    assert launcher.left() == []


def test_a_process_that_ignores_sigterm_is_killed_after_the_deadline(
    start: Callable[..., Launcher], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(IMPATIENT)
    launcher = start({**EVERYBODY, "rollout-0": "child stubborn", "learner": ENDLESS})
    launcher.until(is_training)
    launcher.process.send_signal(signal.SIGTERM)
    launcher.wait(130)
    assert launcher.left() == []


def test_a_killed_launcher_leaves_nobody_and_the_run_can_go_on(
    start: Callable[..., Launcher], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(IMPATIENT)
    launcher = start({**EVERYBODY, "rollout-0": "child stubborn", "learner": ENDLESS})
    launcher.until(is_training)
    _, errors = start({}, "--resume").wait(1)
    assert "is running or still ending" in errors
    guardian = guardian_of(launcher)
    os.kill(guardian, signal.SIGSTOP)  # or those left might be gone before anybody looks
    try:
        launcher.process.kill()
        launcher.process.wait()
        with pytest.raises(StartError, match="still ending"), RunFolder(launcher.folder).lock():
            pass
    finally:
        os.kill(guardian, signal.SIGCONT)
    launcher.until_nobody_is_left()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while list(tmp_path.glob("isentrope-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (launcher.folder / "events").unlink()
    rows = len((launcher.folder / "metrics.jsonl").read_text().splitlines())
    output, _ = start({**EVERYBODY, "learner": f"steps={rows + 2} all=4"}, "--resume").wait(0)
    assert f"step {rows + 1}/3" in output
    assert f"step {rows}/3" not in output
    assert list(tmp_path.glob("isentrope-*")) == []


def test_somebody_who_never_comes_up_is_named(
    start: Callable[..., Launcher], tmp_path: Path
) -> None:
    hasty = RUN_FILE.replace("start_timeout_seconds = 120.0", "start_timeout_seconds = 10.0")
    (tmp_path / "run.toml").write_text(hasty)
    launcher = start({**EVERYBODY, "rollout-1": "mute", "learner": "steps=3 all=5"})
    _, errors = launcher.wait(1)
    assert errors.startswith("error: rollout-1 (no lease): not up within")
    assert launcher.left() == []


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (RUN_FILE + "hots = 'x'\n", [], "network.hots = 'x': unknown key; did you mean host?"),
        (RUN_FILE + "rollout_port = 7000\n", [], "network.rollout_port = 7000: 2 rollout replicas"),
        (RUN_FILE + '[task]\nname = "chess"\n', [], "task.name = 'chess': no such task; known:"),
        (RUN_FILE, ["--resume"], "--resume: no run named 'stand' in runs; leave --resume out"),
        (RUN_FILE, ["--run-id", "a/b"], "--run-id 'a/b': use at most 100 letters"),
        (RUN_FILE, ["--resume", "--run-id", "x"], "--resume --run-id x: no run in runs/x"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    start: Callable[..., Launcher],
    tmp_path: Path,
    text: str,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "run.toml").write_text(text)
    output, errors = start(EVERYBODY, *arguments).wait(2)
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert output == ""
    assert not (tmp_path / "runs").exists()


def test_an_id_that_is_taken_is_refused(start: Callable[..., Launcher], tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    _, errors = start(EVERYBODY, "--run-id", "mine").wait(2)
    assert errors.startswith("error: --run-id mine: runs/mine exists; go on with it by --resume")


def test_a_redis_that_is_not_there_is_named(start: Callable[..., Launcher], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(IMPATIENT + '[redis]\nurl = "redis://:pw@127.0.0.1:1"\n')
    _, errors = start(EVERYBODY).wait(1)
    assert errors.startswith("error: redis.url = 'redis://:***@127.0.0.1:1': no answer")


def guardian_of(launcher: Launcher) -> int:
    """The process that ends the others when the launcher is gone."""
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children")
    [found] = [
        int(pid)
        for pid in children.read_text().split()
        if b"guardian" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def pid_of(launcher: Launcher, name: str) -> int:
    """The stand-in that said `pid N` just before it said that it is up."""
    line = next(line for line in launcher.events() if line.startswith(f"name {name} "))
    return int(line.split()[2])
