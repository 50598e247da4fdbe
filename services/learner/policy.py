"""A causal language model of Hugging Face form, as the learner needs it: log-probs, not logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared.errors import ConfigError, StartError
from shared.rl.entropy import TokenStatistics, fused_logprob_entropy

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Keys of a model's configuration under which it changes logits after its head."""


class FusedHead(nn.Module):
    """The output embedding, applied chunk by chunk; it owns no weight.

    Under ZeRO-3 the weight is registered as an external parameter of this module: it is whole
    while this forward (and its recomputation in the backward pass) runs, and at no other time.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self._chunk = chunk

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        clamp_p: float | None,
        with_mean_pull: bool,
    ) -> tuple[Tensor, ...]:
        """As `Policy.forward`, from the hidden states [N, D] of the predicting positions."""
        statistics = fused_logprob_entropy(
            hidden,
            weight,
            targets,
            temperature=temperature,
            clamp_p=clamp_p,
            chunk=self._chunk,
            with_mean_pull=with_mean_pull,
        )
        return tuple(each for each in statistics if each is not None)


class Policy(nn.Module):
    """The language model and the head that reads token statistics off its hidden states.

    Parameters are named `model.<Hugging Face name>`; a tied head is the embedding itself.
    """

    def __init__(self, model: Any, *, chunk: int) -> None:
        """Wrap a causal language model.

        Args:
            chunk: tokens whose logits exist at a time.
        Raises:
            ConfigError: the model does more to its logits than a product with a weight.
        """
        super().__init__()
        self.model = model
        self.head = FusedHead(chunk)
        # In a tuple, because as an attribute it would be registered as a parameter twice; and
        # not looked up in forward, where ZeRO-3 gathers every parameter that is looked at.
        self._head_weight = (_head_weight(model),)
        # Dropout would make the ratio of two passes differ from 1 without any update.
        self.eval()

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype, chunk: int) -> Policy:
        """From a local folder or a hub name.

        Raises:
            StartError: there is no such model, or it cannot be read.
            ConfigError: as the constructor.
        """
        # A progress bar in a service's log is noise.
        disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StartError(f"model.path = {path}: cannot be loaded ({reason})") from None
        return cls(model, chunk=chunk)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the embedding's own where they are tied."""
        return self._head_weight[0]

    def forward(
        self,
        input_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> tuple[Tensor, ...]:
        """The fields of TokenStatistics that are there, in their order, each [N].

        A plain tuple, because DeepSpeed looks for the tensors in it; `statistics` names them.

        Args:
            input_ids: [B, T], padded on the right.
            predictors: [N], positions in the flattened [B * T].
            targets: [N], the token that follows each of them.
            clamp_p: as `shared.rl.entropy.clamped_entropy`; None leaves out the clamped entropy
                and the removed mass.
            with_mean_pull: whether `mean_pull` is there.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1)[predictors]
        outputs: tuple[Tensor, ...] = self.head(
            chosen, self.head_weight, targets, temperature, clamp_p, with_mean_pull
        )
        return outputs


def statistics(outputs: Sequence[Tensor], *, is_clamped: bool) -> TokenStatistics:
    """The outputs of `Policy.forward` by name.

    Args:
        is_clamped: whether there was a clamp_p.
    """
    logprob, entropy, *rest = outputs
    clamped, removed = rest[:2] if is_clamped else (None, None)
    pull = rest[2 * is_clamped :]
    return TokenStatistics(logprob, entropy, clamped, removed, pull[0] if pull else None)


def _head_weight(model: Any) -> nn.Parameter:
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"model of type {type(model).__name__}: its output embedding has a bias or is"
            " missing; models with a plain linear head are supported"
        )
    for key in LOGIT_TRANSFORMS:
        value = getattr(model.config, key, None)
        if value not in (None, 1.0):
            raise ConfigError(
                f"model of type {type(model).__name__}: {key} = {value} changes logits after the"
                " head; models without it are supported"
            )
    weight: nn.Parameter = head.weight
    return weight
