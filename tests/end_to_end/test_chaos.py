"""The short form of `make chaos`: each part of a run is lost once, and nothing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.__main__ import SHORT

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 800.0


@pytest.fixture(scope="module")
def told(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the campaign tells of itself."""
    folder = tmp_path_factory.mktemp("chaos") / "run"
    command = [
        sys.executable, "-m", "tests.chaos", "--short",
        "--folder", str(folder), "--model", str(model),
    ]  # fmt: skip
    printed = folder.with_suffix(".log")
    with printed.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name != "REDIS_URL"},
        )
    try:
        process.wait(PATIENCE_SECONDS)
    finally:
        # The guardian of the services ends them if they are still there.
        process.kill()
        process.wait()
    result = folder / "chaos.json"
    assert result.exists(), printed.read_text("utf8")
    told: dict[str, Any] = json.loads(result.read_text("utf8"))
    assert told["trouble"] == "", printed.read_text("utf8")
    assert process.returncode == (0 if told["is_good"] else 1)
    return told


def test_each_kind_of_fault_is_injected_and_a_step_comes_after_it(told: dict[str, Any]) -> None:
    assert sorted(each["kind"] for each in told["faults"]) == sorted(SHORT)
    for each in told["faults"]:
        assert each["next_step"] is not None, each


def test_no_service_ends_by_itself(told: dict[str, Any]) -> None:
    assert told["exits"] == []


def test_nothing_is_lost_and_nothing_is_done_twice_or_left_over(told: dict[str, Any]) -> None:
    assert len(told["findings"]) > 8
    assert [each for each in told["findings"] if not each["holds"]] == []
