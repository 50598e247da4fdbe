"""The output embedding's products in float32, under a bfloat16 model on real DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM

from services.learner.engine import LearnerEngine
from shared.errors import ConfigError
from tests.forked import Forked
from tests.integration.test_learner_engine import (
    ALONE,
    model,
    run_config,
    scored_groups,
    snapshot,
)

__all__ = ["model"]

pytestmark = pytest.mark.integration

TOKEN_IDS = [3, 1, 4, 1, 5, 9, 2, 6]
BFLOAT16 = {"path": "x", "dtype": "bfloat16"}


def start(head_dtype: str, model: Path) -> LearnerEngine:
    """Under ZeRO-3, where the head's weight is whole in the head alone."""
    learner = {"head_dtype": head_dtype, "zero_stage": 3, "learning_rate": 1e-2}
    return LearnerEngine.start(run_config(model=BFLOAT16, learner=learner), str(model), ALONE)


def float32_head(model: Path) -> torch.Tensor:
    """Log-probs of all but the first, by products in float32 with bfloat16 hidden states."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    token_ids = torch.tensor([TOKEN_IDS])
    with torch.no_grad():
        hidden = whole.base_model(token_ids).last_hidden_state[0, :-1]
        logits: torch.Tensor = hidden.float() @ whole.get_output_embeddings().weight.float().T
    return logits.log_softmax(-1).gather(-1, token_ids[0, 1:, None])[:, 0]


def test_the_key_takes_the_rounding_out_of_the_logits_and_training_goes_on(model: Path) -> None:
    errors = {}
    for head_dtype in ("model", "float32"):
        engine = start(head_dtype, model)
        scores = torch.tensor(engine.score_tokens(TOKEN_IDS))
        errors[head_dtype] = float((scores - float32_head(model)).abs().max())
        before = snapshot(engine)
        engine.train(scored_groups(0), step=1, policy_version=0)
        after = snapshot(engine)
        engine.close()
        assert all(weight.dtype is torch.bfloat16 for weight in after.values())
        assert all(bool(weight.isfinite().all()) for weight in after.values())
        assert any(not torch.equal(after[name], before[name]) for name in after)
    assert errors["float32"] < 1e-5 < 1e-3 < errors["model"]


def start_without_a_compiler(model: Path, scratch: Path) -> None:
    """In a process of its own: torch looks for a compiler once."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
    inductor.cpp.cxx = (None, str(scratch / "none"))
    config = run_config(learner={"head_work": "compiled"})
    with pytest.raises(
        ConfigError, match=r"learner.head_work: .* cannot be compiled .*C\+\+"
    ) as told:
        LearnerEngine.start(config, str(model), ALONE)
    assert str(told.value).endswith('install a C++ compiler, or set it to "in_place"')
    print("was told")


def test_a_compiler_that_is_missing_is_told_at_the_start_with_the_way_without(
    model: Path, tmp_path: Path
) -> None:
    process = Forked(tmp_path / "printed", start_without_a_compiler, model, tmp_path)
    try:
        assert process.ended(seconds=240.0) == 0, process.printed
    finally:
        process.close()
    assert process.printed.endswith("was told\n")
