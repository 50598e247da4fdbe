"""What a person can get wrong: each has its message, and nothing is started or lost.

The run file's own mistakes are in `test_config.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.learner.checkpoint import newest_checkpoint, write_checkpoint
from shared.errors import CheckpointError, StartError
from shared.metrics.process import serve_metrics
from shared.rpc import serve

RUN = """
[run]
name = "bad"
num_steps = 2
directory = "{directory}"
{rest}
"""


def up(
    tmp_path: Path, rest: str, *more: str, redis_url: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`isentrope up` on a run file with these sections."""
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(directory=tmp_path / "runs", rest=rest))
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    if redis_url is not None:
        environment["REDIS_URL"] = redis_url
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "up", str(run_file), *more],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


def assert_refused(
    ended: subprocess.CompletedProcess[str], status: int, message: str, tmp_path: Path
) -> None:
    assert ended.returncode == status
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_a_missing_model_folder(tmp_path: Path) -> None:
    ended = up(tmp_path, '[model]\npath = "/nowhere/model"')
    assert_refused(ended, 1, "model.path = '/nowhere/model': no such model folder; give", tmp_path)


def test_a_redis_that_cannot_be_reached(tmp_path: Path) -> None:
    rest = "[warmup]\n[network]\ncall_timeout_seconds = 1.0"
    ended = up(tmp_path, rest, redis_url="redis://:secret@127.0.0.1:1/0")
    assert_refused(ended, 1, "redis.url = 'redis://:***@127.0.0.1:1/0': no answer", tmp_path)


def test_a_task_that_does_not_exist(tmp_path: Path) -> None:
    ended = up(tmp_path, '[warmup]\n[task]\nname = "countdwn"')
    assert_refused(ended, 2, "task.name = 'countdwn': no such task; known: countdown", tmp_path)


def test_an_unknown_key(tmp_path: Path) -> None:
    ended = up(tmp_path, "[warmup]\n[learner]\nlearnig_rate = 1e-3")
    assert_refused(
        ended, 2, "learner.learnig_rate = 0.001: unknown key; did you mean learning_rate?", tmp_path
    )


def test_a_group_of_one(tmp_path: Path) -> None:
    ended = up(tmp_path, "[warmup]\n[rollout]\ngroup_size = 1")
    assert_refused(ended, 2, "rollout.group_size = 1: grpo compares completions", tmp_path)


def test_a_run_that_is_not_there_to_be_resumed(tmp_path: Path) -> None:
    ended = up(tmp_path, "[warmup]", "--resume")
    assert ended.returncode != 0
    assert "error: " in ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def taken_port() -> Iterator[int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port: int = listener.getsockname()[1]
    yield port
    listener.close()


async def test_a_taken_grpc_port_is_an_error_and_not_a_second_listener(taken_port: int) -> None:
    with pytest.raises(StartError, match=f"network.rollout_port = {taken_port}: taken on 127"):
        async with serve(
            host="127.0.0.1",
            port=taken_port,
            port_key="network.rollout_port",
            services=[],
            add=lambda server: None,
        ):
            pass


def test_a_taken_metrics_port(taken_port: int) -> None:
    with pytest.raises(StartError, match=f"network.metrics_port = {taken_port}: taken on 127"):
        serve_metrics(host="127.0.0.1", port=taken_port)


def test_a_corrupt_checkpoint_is_named_with_the_way_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, step=4, state={}, save_engine=Path.mkdir)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "step": 5}))
    with pytest.raises(CheckpointError) as refused:
        newest_checkpoint(tmp_path)
    assert str(folder) in str(refused.value)
    assert "delete it to go back to the checkpoint before it" in str(refused.value)
