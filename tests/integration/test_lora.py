"""Adapters on real DeepSpeed: what is trained, published, exported, saved, at every ZeRO stage."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from services.learner.batch import build_batch, collate
from services.learner.engine import LearnerEngine
from shared.config import RunConfig
from shared.errors import CheckpointError, ConfigError
from tests.integration.rank_processes import ADAPTER_PACKAGES, RankProcesses
from tests.integration.test_learner_engine import (
    ALONE,
    PAIR_BATCHES,
    STAGES,
    Weights,
    distance,
    logprobs_of,
    lora_config,
    model,
    processes,
    run_config,
    save,
    scored_groups,
    snapshot,
    trained,
    wide_model,
)

__all__ = ["model", "processes", "wide_model"]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def adapter_packages() -> Iterator[None]:
    sys.path.append(str(ADAPTER_PACKAGES))
    yield
    sys.path.remove(str(ADAPTER_PACKAGES))


TOKEN_IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def start(config: RunConfig, model: Path) -> LearnerEngine:
    return LearnerEngine.start(config, str(model), ALONE)


def train(engine: LearnerEngine, *steps: int) -> None:
    for step in steps:
        engine.train(scored_groups(step), step=step, policy_version=step)


@pytest.fixture(scope="module")
def expected(wide_model: Path) -> Weights:
    return trained(lora_config(0), wide_model)


def test_new_adapters_change_nothing(model: Path) -> None:
    engine = start(lora_config(0), model)
    scores, weights = engine.score_tokens(TOKEN_IDS), snapshot(engine)
    engine.close()
    assert scores == pytest.approx(logprobs_of(model, TOKEN_IDS), abs=1e-6)
    assert distance(weights, dict(Qwen2ForCausalLM.from_pretrained(model).named_parameters())) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_merged_model_is_what_is_trained_published_and_exported(
    stage: int, wide_model: Path, tmp_path: Path, expected: Weights
) -> None:
    engine = start(lora_config(stage), wide_model)
    before = snapshot(engine)
    train(engine, 0, 1)
    weights, names = snapshot(engine), [spec.name for spec in engine.manifest()]
    scores = engine.score_tokens(TOKEN_IDS)
    engine.export(tmp_path)
    engine.close()
    assert names == list(before) == list(weights)
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == {name for name in names if "_proj.weight" in name}
    assert distance(weights, expected) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(wide_model)
    peft = importlib.import_module("peft")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert distance(weights, dict(merged.named_parameters())) == 0
    # Of the exported folder, and so of the merged weights, by Hugging Face's own forward pass.
    assert scores == pytest.approx(logprobs_of(tmp_path, TOKEN_IDS), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_the_adapters_alone_and_resumes_bit_for_bit(
    stage: int, wide_model: Path, tmp_path: Path
) -> None:
    engine = start(lora_config(stage), wide_model)
    train(engine, 0)
    save(engine, tmp_path / "saved")
    train(engine, 1)
    straight = snapshot(engine)
    engine.close()
    engine = start(lora_config(stage), wide_model)
    engine.load(tmp_path / "saved")
    train(engine, 1)
    resumed = snapshot(engine)
    engine.close()
    assert distance(resumed, straight) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file())
    whole = sum(weight.numel() * weight.element_size() for weight in straight.values())
    assert size < whole / 2


@pytest.mark.parametrize("other", [None, {"targets": ["q_proj"]}])
def test_a_checkpoint_of_other_weights_is_refused(
    other: dict[str, Any] | None, model: Path, tmp_path: Path
) -> None:
    engine = start(run_config() if other is None else lora_config(0, **other), model)
    save(engine, tmp_path / "saved")
    engine.close()
    engine = start(lora_config(0), model)
    with pytest.raises(CheckpointError):
        engine.load(tmp_path / "saved")
    engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_the_model_without_its_adapters(stage: int, model: Path) -> None:
    config = lora_config(stage)
    config = config.model_copy(
        update={"reference_kl": config.reference_kl.model_copy(update={"coef": 0.1})}
    )
    engine = start(config, model)
    train(engine, 0)
    batch = build_batch(scored_groups(0), config, policy_version=0)
    rows = collate(batch, range(4))
    reference = engine._model.reference_logprobs(rows, temperature=1.0)
    before, again = snapshot(engine), engine.score_tokens(TOKEN_IDS)
    train(engine, 1)
    after = snapshot(engine)
    engine.close()
    plain = start(run_config(), model)
    expected = plain._model.forward(rows, temperature=1.0).logprob.detach()
    base = plain.score_tokens(TOKEN_IDS)
    plain.close()
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-5)
    assert again != pytest.approx(base, abs=1e-4)
    assert distance(before, after) > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpointed_activations_train_the_same_adapters(
    stage: int, wide_model: Path, expected: Weights
) -> None:
    config = lora_config(stage)
    learner = config.learner.model_copy(update={"activation_checkpointing": True})
    config = config.model_copy(update={"learner": learner})
    assert distance(trained(config, wide_model), expected) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_adapters_are_trained(stage: int, model: Path) -> None:
    learner = lora_config(stage).learner.model_dump()
    config = run_config(model={"path": "x", "dtype": "bfloat16"}, learner=learner)
    engine = start(config, model)
    before = snapshot(engine)
    train(engine, 0)
    after = snapshot(engine)
    assert {spec.dtype for spec in engine.manifest()} == {"bfloat16"}
    engine.close()
    assert distance(before, after) > 0


def test_two_ranks_train_the_adapters_of_one_which_goes_on_from_their_checkpoint(
    wide_model: Path, tmp_path: Path, processes: RankProcesses
) -> None:
    processes.run("lora3", tmp_path, wide_model, num_ranks=2)
    together = torch.load(tmp_path / "trained.pt")
    assert distance(together, trained(lora_config(0), wide_model, PAIR_BATCHES)) < 1e-5
    parts = load_file(tmp_path / "export/adapter/adapter_model.safetensors")
    assert all(bool(each.any()) for each in parts.values())
    engine = start(lora_config(3), wide_model)
    engine.load(tmp_path / "checkpoint")
    engine.train(PAIR_BATCHES[1], step=1, policy_version=1)
    alone = snapshot(engine)
    engine.close()
    assert distance(together, alone) < 1e-5


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "nothing"])
def test_targets_that_cannot_be_trained_so_are_refused(target: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.lora\.targets"):
        start(lora_config(0, targets=[target]), model)
