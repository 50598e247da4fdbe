"""A run that `isentrope up` did not start says where its Redis is by its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.run_folder import RunFolder
from services.cli.status import redis_url_of


def test_without_a_file_the_environment_says_where_redis_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:secret@redis:6379/0")
    assert redis_url_of(RunFolder(tmp_path)) == "redis://:secret@redis:6379/0"


def test_what_up_wrote_down_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    RunFolder(tmp_path).write_redis_url("unix:///here")
    assert redis_url_of(RunFolder(tmp_path)) == "unix:///here"
