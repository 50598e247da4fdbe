"""What a Hugging Face model must be like to be trained here, as far as its parts tell.

What they do not tell, `services.learner.zero` finds by comparing log-probs at the start.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from services.learner.balance import PassCost
from shared.errors import ConfigError

LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)
"""Keys of a model's configuration under which it changes logits after its head, as far as they are
known."""


def pass_cost(model: Any, head_weight: Tensor) -> PassCost:
    """Multiplications and additions of a forward pass; of all experts where there are several.

    Raises:
        ConfigError: the model is not described by one number of heads, one width and so on.
    """
    shape = model.config.get_text_config()
    try:
        matrices = sum(each.numel() for each in model.base_model.parameters() if each.dim() > 1)
        num_heads = getattr(shape, "num_attention_heads", 0) or 0
        head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // max(1, num_heads)
        return PassCost(
            per_token=2 * (matrices - model.get_input_embeddings().weight.numel()),
            per_prediction=2 * head_weight.numel(),
            per_pair=4 * shape.num_hidden_layers * num_heads * head_dim,
        )
    # A key that differs from layer to layer is a RuntimeError.
    except (AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{named(model)}: it is not built like a language model of one kind of layer ({error});"
            " choose another model.path"
        ) from error


def head_weight(model: Any) -> nn.Parameter:
    """Of a head that is a plain product, and the last that is done to the logits.

    Raises:
        ConfigError: it is not; names what is in the way.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{named(model)}: its output embedding has a bias or is missing; models with a plain"
            " linear head are supported"
        )
    for key in LOGIT_TRANSFORMS:
        for config in (model.config, model.config.get_text_config()):
            value = getattr(config, key, None)
            if value not in (None, 1.0):
                raise ConfigError(
                    f"{named(model)}: {key} = {value} changes logits after the head; models"
                    " without it are supported"
                )
    weight: nn.Parameter = head.weight
    return weight


def named(model: Any) -> str:
    """What messages call a model that cannot be trained."""
    return f"model of type {type(model).__name__}"
