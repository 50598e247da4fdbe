"""A run that `isentrope up` did not start says where its Redis is by its environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.cli.__main__ import main
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


def test_without_a_run_file_or_a_redis_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path}/nobody.sock")
    assert main(["status", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nothing runs (Redis does not answer" in said
    assert "the learner makes run.toml there when it starts" in said
    assert main(["dead-letters", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*run\.toml.*\n", capsys.readouterr().err)
