"""The folder of a run: its files, its lock, which one is the newest.

<run.directory>/<run id>/
  run.toml  logs/<service>.log  redis/  redis-url*  metrics.jsonl  ledger.jsonl  checkpoints/
  model/  plots/  report.html
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.config import RunConfig
from shared.errors import ConfigError, StartError
from shared.run_file import NAME, keep_run_file, unwritable

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the files of one run are."""

    path: Path

    @property
    def run_id(self) -> str:
        """Names the folder and the run's keys in Redis."""
        return self.path.name

    @property
    def run_file(self) -> Path:
        """The run file that the services read."""
        return self.path / NAME

    @property
    def logs(self) -> Path:
        """One file a service."""
        return self.path / "logs"

    @property
    def redis(self) -> Path:
        """Data of the embedded Redis."""
        return self.path / "redis"

    @property
    def redis_url_file(self) -> Path:
        """There while the run runs."""
        return self.path / "redis-url"

    @property
    def metrics(self) -> Path:
        """One JSON object a step, written by the learner."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON object a step, written by the learner: how places of the prompt order ended."""
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder each, written by the learner."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face form, written at the end."""
        return self.path / "model"

    @property
    def plots(self) -> Path:
        """The report's figures."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """The report, in one file."""
        return self.path / "report.html"

    def log_of(self, name: str) -> Path:
        """What the service called `name` printed."""
        return self.logs / f"{name}.log"

    def redis_url_file_of(self, role: str) -> Path:
        """There while the run runs: for a service of that role that a person starts."""
        return self.path / f"redis-url-{role}"

    def write_redis_url(self, url: str, *, by_role: Mapping[str, str] | None = None) -> None:
        """Tell `isentrope status` and a person where Redis is; URLs may hold passwords."""
        _write_secret(self.redis_url_file, url)
        for role, its_url in (by_role or {}).items():
            _write_secret(self.redis_url_file_of(role), its_url)

    def forget_redis_url(self) -> None:
        """The run has ended."""
        for path in self.path.glob("redis-url*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Be the only launcher of this run; gives the lock's descriptor.

        Raises:
            StartError: another launcher, or what is left of one, still runs.
        """
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StartError(
                    f"run {self.run_id!r} is running or still ending; stop its `isentrope up`"
                    " first, or give another --run-id"
                ) from None
            yield file.fileno()


def new_run(config: RunConfig, run_file: Path, run_id: str | None) -> RunFolder:
    """Make the folder of a run that starts now.

    Raises:
        ConfigError: the id cannot be one, or is taken.
        StartError: the folder cannot be made.
    """
    name = _checked(run_id) or f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = RunFolder(Path(config.run.directory) / name)
    if folder.path.exists():
        raise ConfigError(
            f"--run-id {name}: {folder.path} exists; go on with it by --resume, or give another id"
        )
    _put_run_file(folder, run_file)
    return folder


def resumed_run(config: RunConfig, run_file: Path, run_id: str | None) -> RunFolder:
    """The folder of an earlier run, with this run file from now on.

    Raises:
        ConfigError: there is none.
        StartError: the folder cannot be written.
    """
    directory, name = Path(config.run.directory), _checked(run_id)
    if name is None:
        earlier = _runs_called(config.run.name, directory)
        if not earlier:
            raise ConfigError(
                f"--resume: no run named {config.run.name!r} in {directory}; leave --resume out to"
                " start one"
            )
        folder = earlier[-1]
    else:
        folder = RunFolder(directory / name)
        if not folder.run_file.is_file():
            raise ConfigError(
                f"--resume --run-id {name}: no run in {folder.path}; leave --resume out to start"
                " one"
            )
    _put_run_file(folder, run_file)
    return folder


def existing_run(path: Path) -> RunFolder:
    """The run in the folder at `path`.

    Raises:
        ConfigError: it is not the folder of a run.
    """
    folder = RunFolder(path.resolve())
    if not (folder.run_file.is_file() or folder.metrics.is_file()):
        raise ConfigError(f"{path}: not the folder of a run (neither run.toml nor metrics.jsonl)")
    return folder


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")


def _checked(run_id: str | None) -> str | None:
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"--run-id {run_id!r}: use at most 100 letters, digits, dots, dashes and underscores"
        )
    return run_id


def _runs_called(name: str, directory: Path) -> list[RunFolder]:
    """Runs of that name, the last started or resumed last."""
    found = [RunFolder(path.parent) for path in directory.glob("*/run.toml")]
    named = [folder for folder in found if _name_in(folder.run_file) == name]
    return sorted(named, key=lambda folder: (folder.run_file.stat().st_mtime_ns, folder.run_id))


def _name_in(run_file: Path) -> str | None:
    try:
        return str(tomllib.loads(run_file.read_text("utf8"))["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put_run_file(folder: RunFolder, run_file: Path) -> None:
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.path, error) from None
    keep_run_file(folder.path, run_file)
