"""`make monitor` beside a real run, where there is a Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.end_to_end.real_run import POLL_SECONDS, RUN_ID, Up
from tests.observability.answered import Answers, answers
from tests.observability.test_monitor import MONITOR, free_port
from tests.security.identities import secure_machine

PROMETHEUS = shutil.which(os.environ.get("PROMETHEUS", "prometheus"))
NO_PROMETHEUS = "no prometheus on the path; on Debian: apt-get install prometheus"

ANSWER_SECONDS = 90.0
END_SECONDS = 60.0


class Monitor:
    """The process that `make monitor` is, and the Prometheus that it started."""

    def __init__(self, up: Up) -> None:
        self._run, self._log = up.run, up.folder / "monitor.log"
        self.port = free_port()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(MONITOR), str(up.run), f"--port={self.port}"],
                env={**os.environ, **secure_machine(up.folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def targets(self) -> list[Mapping[str, Any]]:
        """Whom it told Prometheus to scrape."""
        told: list[Mapping[str, Any]] = json.loads(
            (self._run / "prometheus" / "targets.json").read_text()
        )
        return told

    def until_answered(self, members: set[str]) -> Answers:
        """Answers where nothing is missing of a run of these services; in vain, the last ones."""
        deadline = time.monotonic() + ANSWER_SECONDS
        found: Answers | None = None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._log.read_text("utf8")
            found = self._ask()
            if found is not None and found.is_whole and found.scraped == members:
                return found
            time.sleep(POLL_SECONDS)
        assert found is not None, self._log.read_text("utf8")
        return found

    def _ask(self) -> Answers | None:
        """None while it starts."""
        try:
            return answers(f"http://127.0.0.1:{self.port}", RUN_ID)
        except OSError:
            return None

    def end(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        finally:
            self.process.kill()

    def listens(self) -> bool:
        """Whether Prometheus is still there."""
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def monitored(up: Up) -> Iterator[Monitor | None]:
    """None where there is no Prometheus; its processes end with the context."""
    if PROMETHEUS is None:
        yield None
        return
    monitor = Monitor(up)
    try:
        yield monitor
    finally:
        monitor.end()
