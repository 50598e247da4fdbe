"""The model of a checkpoint, against the one that the learner itself writes at that moment."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.cli.__main__ import main
from services.learner.checkpoint import write_checkpoint
from services.learner.engine import LearnerEngine
from services.learner.export import export_checkpoint
from shared.config import RunConfig
from shared.errors import CheckpointError, ConfigError, StartError
from tests.forked import FORKED
from tests.integration.rank_processes import ADAPTER_PACKAGES
from tests.integration.test_learner_engine import (
    ALONE,
    run_config,
    save,
    save_model,
    scored_groups,
    wide_model,
)
from tests.integration.test_lora import adapter_packages
from tests.learner.test_checkpoint import die_at

__all__ = ["adapter_packages", "wide_model"]

pytestmark = pytest.mark.integration

RUN_FILE = """
[run]
name = "t"
num_steps = 9
[model]
path = {path}
[learner]
groups_per_batch = 4
zero_stage = 1
"""


def config_of(model: Path, stage: int, dtype: str, *, lora: bool = False) -> RunConfig:
    learner: dict[str, Any] = {"zero_stage": stage, "learning_rate": 1e-2}
    if lora:
        learner["lora"] = {"rank": 4, "alpha": 16}
    return run_config(model={"path": str(model), "dtype": dtype}, learner=learner)


def train(config: RunConfig, root: Path, *, steps: int = 1) -> list[Path]:
    """The checkpoint of each step; beside them what the learner itself exports."""
    engine = LearnerEngine.start(config, config.model_path, ALONE)
    written = []
    for step in range(1, steps + 1):
        engine.train(scored_groups(step), step=step, policy_version=step)
        written.append(
            write_checkpoint(
                root, step=step, state={}, save_engine=lambda folder: save(engine, folder)
            )
        )
        engine.export(root / f"exported-{step}")
    engine.close()
    return written


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): load_file(path) for path in found}


def same(left: Path, right: Path) -> bool:
    """The same files with the same weights, bit for bit."""
    ours, theirs = tensors(left), tensors(right)
    assert listing(left).keys() == listing(right).keys()
    assert ours.keys() == theirs.keys()
    return all(
        ours[name].keys() == theirs[name].keys()
        and all(torch.equal(each, theirs[name][key]) for key, each in ours[name].items())
        for name in ours
    )


def listing(folder: Path) -> Mapping[str, int]:
    """Every file and when it was written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [
        (0, "float32", False),
        (1, "bfloat16", False),
        (2, "float32", True),
        (3, "bfloat16", False),
        (3, "bfloat16", True),
    ],
)
def test_a_checkpoint_s_model_is_the_learner_s_bit_for_bit(
    stage: int, dtype: str, lora: bool, wide_model: Path, tmp_path: Path
) -> None:
    config = config_of(wide_model, stage, dtype, lora=lora)
    (checkpoint,) = train(config, tmp_path)
    before = listing(checkpoint)
    told: list[str] = []
    export_checkpoint(config, checkpoint, tmp_path / "out", report=told.append)
    assert same(tmp_path / "out", tmp_path / "exported-1")
    assert (tmp_path / "out/adapter/adapter_config.json").exists() == lora
    assert listing(checkpoint) == before
    assert told[0].startswith("checks step-000001: ")
    assert told[-1] == f"writes {tmp_path / 'out'}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_of(model, 3, "float32"), tmp_path_factory.mktemp("written"))[0]


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints" / written.name)


def test_the_command_finds_the_best_checkpoint_and_leaves_the_run_as_it_was(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "runs/t-1", tmp_path / "models/best"
    train(config_of(model, 1, "float32"), run / "checkpoints", steps=2)
    (run / "run.toml").write_text(RUN_FILE.format(path=json.dumps(str(model))))
    rows = [{"eval_policy_version": at, "eval_score": score} for at, score in ((1, 0.9), (2, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = listing(tmp_path)
    assert main(["export", str(run), str(out), "--checkpoint", "best"]) == 0
    said = capfd.readouterr()
    assert same(out, run / "checkpoints/exported-1")
    assert not same(out, run / "checkpoints/exported-2")
    assert before == {name: at for name, at in listing(tmp_path).items() if "models" not in name}
    assert os.listdir(out.parent) == ["best"]
    assert said.out.splitlines()[-1] == str(out)
    assert "reads the weights of step-000001" in said.err


def test_a_checkpoint_that_is_damaged_is_not_exported(
    checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    (path,) = (checkpoint / "engine/state").glob("*optim_states.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        export_checkpoint(
            config_of(model, 3, "float32"), checkpoint, tmp_path / "out", report=lambda line: None
        )
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_called_damaged(
    checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    def delete(line: str) -> None:
        if line.startswith("checks"):
            shutil.rmtree(checkpoint)

    with pytest.raises(CheckpointError, match=r"deleted it meanwhile; take a newer one"):
        export_checkpoint(
            config_of(model, 3, "float32"), checkpoint, tmp_path / "out", report=delete
        )


def test_a_disk_that_is_full_leaves_nothing_behind(
    checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(StartError, match=r"out: not written \(.*File too large.*make room"):
            export_checkpoint(
                config_of(model, 3, "float32"), checkpoint, tmp_path / "out", report=print
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_another_model_than_the_run_s_is_named_with_the_remedy(
    checkpoint: Path, model: Path, wide_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the run file has another model"):
        export_checkpoint(
            config_of(wide_model, 3, "float32"), checkpoint, tmp_path / "out", report=print
        )
    gone = config_of(tmp_path / "nowhere", 3, "float32")
    with pytest.raises(StartError, match=r"nowhere.* export where the run was started"):
        export_checkpoint(gone, checkpoint, tmp_path / "out", report=print)


DEATHS = {
    "amid the weights": ("", -signal.SIGXFSZ),
    "before the tokenizer": ("open .model.new.tmp/tokenizer_config.json 1", -signal.SIGKILL),
    "amid the adapters": ("open adapter/adapter_config.json 1", -signal.SIGKILL),
}
"""As in test_checkpoint. The weights are written by what Python does not see: the kernel kills at a
file's first byte after so many, and nothing is cleared up then either."""

MAX_FILE_BYTES = 2**16


def export_and_die(config: RunConfig, folder: Path, death: str) -> None:
    """In a process of its own."""
    sys.path.append(str(ADAPTER_PACKAGES))
    engine = LearnerEngine.start(config, config.model_path, ALONE)
    engine.train(scored_groups(2), step=2, policy_version=2)
    if death == "amid the weights":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    else:
        event, end, count = DEATHS[death][0].split()
        die_at(event, end, int(count))
    engine.export(folder)


@pytest.mark.parametrize(
    ("lora", "deaths"),
    [(False, ("amid the weights", "before the tokenizer")), (True, ("amid the adapters",))],
    ids=["full", "lora"],
)
def test_a_learner_killed_amid_its_export_leaves_the_model_before_it(
    lora: bool, deaths: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run/model", config_of(model, 1, "float32", lora=lora)
    engine = LearnerEngine.start(config, config.model_path, ALONE)
    engine.export(folder)
    before, weights = listing(folder), tensors(folder)
    for death in deaths:
        process = FORKED.Process(target=export_and_die, args=(config, folder, death), daemon=True)
        process.start()
        process.join(120.0)
        assert process.exitcode == DEATHS[death][1]
        assert sorted(os.listdir(folder.parent)) == [".model.new.tmp", "model"]
        assert listing(folder) == before
    engine.train(scored_groups(1), step=1, policy_version=1)
    engine.export(folder)
    engine.export(tmp_path / "another")
    engine.close()
    assert os.listdir(folder.parent) == ["model"]
    assert same(folder, tmp_path / "another")
    assert not all(
        torch.equal(each, weights["model.safetensors"][name])
        for name, each in tensors(folder)["model.safetensors"].items()
    )


def test_whoever_may_read_the_config_may_read_the_weights(model: Path, tmp_path: Path) -> None:
    engine = LearnerEngine.start(config_of(model, 1, "float32", lora=True), str(model), ALONE)
    engine.export(tmp_path / "model")
    engine.close()
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1
    assert len([path for path in files if path.suffix == ".safetensors"]) == 2
