"""Models whose logits are not the product of hidden states and head, which nothing about them says.

They are found on real DeepSpeed, by comparing log-probs at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.learner.policy import Policy
from services.learner.ranks import Ranks
from services.learner.zero import ZeroModel
from shared.errors import ConfigError
from tests.integration.test_learner_engine import ALONE, run_config
from tests.learner.test_supported import SHAPE

pytestmark = pytest.mark.integration


class Sharpened(Qwen2ForCausalLM):  # type: ignore[misc]
    """Does more to its logits than its configuration tells."""

    factor = 1.5

    def forward(self, *args: Any, **named: Any) -> Any:
        outputs = super().forward(*args, **named)
        outputs.logits = outputs.logits * self.factor
        return outputs


class Untouched(Sharpened):
    factor = 1.0


def qwen2(kind: Callable[[Qwen2Config], Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return kind(Qwen2Config(**SHAPE, tie_word_embeddings=False, initializer_range=0.3)).to(dtype)


def start(model: Any, *, stage: int, dtype: torch.dtype = torch.float32) -> ZeroModel:
    config = run_config(
        model={"path": "x", "dtype": str(dtype).removeprefix("torch.")},
        learner={"zero_stage": stage},
    )
    return ZeroModel(Policy(model, chunk=16), None, Ranks.join(ALONE), config, local_rank=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_whose_own_log_probs_differ_is_refused(stage: int, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"type Sharpened: its own log-probs differ .* nats"):
        start(qwen2(Sharpened, dtype), stage=stage, dtype=dtype)
    assert not dist.is_initialized()
    start(qwen2(Untouched, dtype), stage=stage, dtype=dtype).leave()


def test_a_model_that_gives_no_hidden_states_is_refused_in_one_line() -> None:
    """Its `base_model` is itself."""
    shape = Llama4TextConfig(
        **SHAPE, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, pad_token_id=0
    )
    with pytest.raises(ConfigError, match=r"type Llama4ForCausalLM: it does not give hidden"):
        start(Llama4ForCausalLM(shape), stage=0)
