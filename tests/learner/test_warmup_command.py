"""`python -m services.learner.warmup` as a cluster runs it before the learner."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.learner import warmup
from shared.config import parse_run

RUN = """
[run]
name = "test"
num_steps = 1
[model]
max_length = 64
[rollout]
max_completion_tokens = 32
[warmup]
num_steps = 1
batch_size = 2
hidden_size = 32
num_layers = 1
num_heads = 1
intermediate_size = 32
"""


def test_without_a_folder_it_makes_the_run_s_own_model_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN, "utf8")
    folder = Path(parse_run(RUN).model_path)
    assert warmup.main(["--config", "run.toml"]) == 0
    made = (folder / "config.json").stat().st_mtime_ns
    assert warmup.main(["--config", "run.toml"]) == 0
    assert (folder / "config.json").stat().st_mtime_ns == made
    assert f"{folder} is there already" in capsys.readouterr().out
