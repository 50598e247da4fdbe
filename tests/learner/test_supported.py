from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.learner.policy import Policy
from services.learner.supported import LOGIT_TRANSFORMS
from shared.errors import ConfigError

SHAPE: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def gemma4(**changed: Any) -> Any:
    """Its keys stand in a configuration of their own, for the text alone."""
    text = Gemma4TextConfig(
        **SHAPE,
        head_dim=16,
        vocab_size_per_layer_input=20,
        hidden_size_per_layer_input=8,
        **changed,
    )
    whole = Gemma4Config(text_config=text.to_dict(), vision_config=None, audio_config=None)
    return AutoModelForCausalLM.from_config(whole)


@pytest.mark.parametrize("key", LOGIT_TRANSFORMS)
def test_a_model_that_says_how_it_changes_its_logits_is_refused(key: str) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    setattr(model.config, key, 1.0)
    Policy(model, chunk=16)
    setattr(model.config, key, 30.0)
    with pytest.raises(ConfigError, match=rf"Qwen2ForCausalLM: {key} = 30.0 changes logits"):
        Policy(model, chunk=16)


def test_a_model_that_says_so_of_its_text_alone_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"Gemma4.*: final_logit_softcapping = 3.0 changes"):
        Policy(gemma4(final_logit_softcapping=3.0), chunk=16)


def test_a_model_whose_layers_differ_in_shape_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"Gemma4.*head_dim.*choose another model\.path"):
        Policy(gemma4(final_logit_softcapping=None), chunk=16)


def test_a_head_with_a_bias_is_refused() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(20))
    with pytest.raises(ConfigError, match="has a bias"):
        Policy(model, chunk=16)
