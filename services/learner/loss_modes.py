"""The run file's choices by name: surrogates, off-policy weights, entropy terms.

Each is a pure function of `shared.rl` with its numbers taken from the run file. A method is added
by a row in one of the tables at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.config import RunConfig
from shared.config.algorithm import OffPolicyConfig, PolicyLossConfig
from shared.rl.covariance import select_clip_cov, select_kl_cov
from shared.rl.entropy import TokenStatistics
from shared.rl.loss import (
    cispo_surrogate,
    clip_cov_surrogate,
    clipped_surrogate,
    gspo_surrogate,
    high_probability_surrogate,
    kl_cov_surrogate,
    ppo_clipped,
    unclipped_surrogate,
)
from shared.rl.offpolicy import (
    capped_weights,
    geometric_masked_weights,
    masked_weights,
    sequence_masked_weights,
    sequence_truncated_weights,
    truncated_weights,
)


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss knows of tokens before the forward pass; all [B, C].

    Attributes:
        proximal_logprobs, proximal_entropy: of the learner's weights at the batch's start.
        staleness: int32, of the version that sampled the token.
        keys: int64, from `token_keys`; None where the loss selects no tokens.
        reference_logprobs: of the frozen reference model; None without one.
    """

    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    proximal_logprobs: Tensor
    proximal_entropy: Tensor
    staleness: Tensor
    keys: Tensor | None
    reference_logprobs: Tensor | None = None

    def rows(self, rows: list[int], width: int) -> TokenInputs:
        """The given rows, cut to their first `width` tokens."""
        keys, reference = self.keys, self.reference_logprobs
        return TokenInputs(
            self.mask[rows, :width],
            self.advantages[rows, :width],
            self.behaviour_logprobs[rows, :width],
            self.proximal_logprobs[rows, :width],
            self.proximal_entropy[rows, :width],
            self.staleness[rows, :width],
            None if keys is None else keys[rows, :width],
            None if reference is None else reference[rows, :width],
        )


Surrogate = Callable[[PolicyLossConfig, Tensor, TokenInputs, Tensor | None], Tensor]
Selector = Callable[[PolicyLossConfig, Tensor, Tensor, TokenInputs], Tensor]
Clipped = Callable[[PolicyLossConfig, Tensor, TokenInputs], tuple[Tensor, Tensor]]


class LossMode(NamedTuple):
    """How a `policy_loss.loss_mode` works.

    Attributes:
        surrogate: (config, target_logprobs, inputs, selected) to losses per token.
        clipped: (config, target_logprobs, inputs) to where the clip binds, (low, high); None
            where the surrogate has no clip.
        selector: (config, covariance, target_logprobs, inputs) to a bool mask, or None.
        selected_ratio: share of the tokens that the selector may select.
    """

    surrogate: Surrogate
    clipped: Clipped | None = None
    selector: Selector | None = None
    selected_ratio: Callable[[PolicyLossConfig], float] = lambda config: 0.0


class EntropyTerm(NamedTuple):
    """What the loss has `- coefficient * aggregate(...)` of; nothing by default.

    Attributes:
        statistic: the field of TokenStatistics that is it.
        made_of_logprobs: or (config, statistics, inputs) to it, from the log-probs alone.
    """

    statistic: Literal["entropy", "clamped_entropy"] | None = None
    made_of_logprobs: Callable[[RunConfig, TokenStatistics, TokenInputs], Tensor] | None = None

    def values(
        self, config: RunConfig, statistics: TokenStatistics, inputs: TokenInputs
    ) -> Tensor | None:
        """Of each token; None where the loss has no such term."""
        if self.made_of_logprobs is not None:
            return self.made_of_logprobs(config, statistics, inputs)
        return self.path(statistics)

    def path(self, statistics: TokenStatistics) -> Tensor | None:
        """The output of the model that has a gradient from this term, beside the log-probs."""
        return None if self.statistic is None else getattr(statistics, self.statistic)


def _clip(config: PolicyLossConfig) -> dict[str, float]:
    return {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high}


def _vanilla(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, _: Tensor | None
) -> Tensor:
    return clipped_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        **_clip(config),
        dual_clip=config.clip_ratio_c,
    )


def _gspo(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, _: Tensor | None
) -> Tensor:
    return gspo_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        inputs.mask,
        **_clip(config),
    )


def _cispo(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, _: Tensor | None
) -> Tensor:
    return cispo_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        **_clip(config),
    )


def _unclipped(
    _: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, __: Tensor | None
) -> Tensor:
    return unclipped_surrogate(target_logprobs, inputs.proximal_logprobs, inputs.advantages)


def _clip_cov(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, selected: Tensor | None
) -> Tensor:
    assert selected is not None
    return clip_cov_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        selected=selected,
        **_clip(config),
    )


def _kl_cov(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, selected: Tensor | None
) -> Tensor:
    assert selected is not None
    return kl_cov_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        selected=selected,
        kl_coef=config.ppo_kl_coef,
        penalty=config.kl_cov_penalty,
    )


def _select_clip_cov(
    config: PolicyLossConfig, covariance: Tensor, target_logprobs: Tensor, inputs: TokenInputs
) -> Tensor:
    low, high = _clipped_tokens(config, target_logprobs, inputs)
    return select_clip_cov(
        covariance,
        inputs.mask,
        ratio=config.clip_cov_ratio,
        lower=config.clip_cov_lb,
        upper=config.clip_cov_ub,
        excluded=low | high,
        keys=inputs.keys,
    )


def _select_kl_cov(
    config: PolicyLossConfig, covariance: Tensor, _: Tensor, inputs: TokenInputs
) -> Tensor:
    return select_kl_cov(covariance, inputs.mask, ratio=config.kl_cov_ratio, keys=inputs.keys)


def _clipped_tokens(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs
) -> tuple[Tensor, Tensor]:
    return ppo_clipped(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        inputs.mask,
        **_clip(config),
    )


def _clipped_sequences(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs
) -> tuple[Tensor, Tensor]:
    """All tokens of the completions whose ratio is clipped."""
    difference = torch.where(inputs.mask, target_logprobs - inputs.proximal_logprobs, 0.0)
    lengths = inputs.mask.sum(-1, keepdim=True).clamp(min=1)
    mean = difference.sum(-1, keepdim=True) / lengths
    return _clipped_tokens(config, inputs.proximal_logprobs + mean, inputs)


def _unweighted(_: OffPolicyConfig, proximal: Tensor, behaviour: Tensor, mask: Tensor) -> Tensor:
    return torch.ones_like(proximal)


def _with_cap(
    weigh: Callable[..., Tensor],
    config: OffPolicyConfig,
    proximal: Tensor,
    behaviour: Tensor,
    mask: Tensor,
) -> Tensor:
    return weigh(proximal, behaviour, mask, cap=config.cap)


def _with_bounds(
    weigh: Callable[..., Tensor],
    config: OffPolicyConfig,
    proximal: Tensor,
    behaviour: Tensor,
    mask: Tensor,
) -> Tensor:
    return weigh(proximal, behaviour, mask, lower=config.lower, upper=config.upper)


def _high_probability(
    config: RunConfig, statistics: TokenStatistics, inputs: TokenInputs
) -> Tensor:
    """EntroPIC subtracts `coefficient * r |A|` from the loss: its surrogate is - r |A|."""
    return -high_probability_surrogate(
        statistics.logprob,
        inputs.proximal_logprobs,
        inputs.advantages,
        threshold=config.pi_entropy.high_probability,
    )


LOSS_MODES: dict[str, LossMode] = {
    "vanilla": LossMode(_vanilla, _clipped_tokens),
    "gspo": LossMode(_gspo, _clipped_sequences),
    "cispo": LossMode(_cispo, _clipped_tokens),
    "unclipped": LossMode(_unclipped),
    "clip_cov": LossMode(
        _clip_cov, _clipped_tokens, _select_clip_cov, lambda config: config.clip_cov_ratio
    ),
    "kl_cov": LossMode(_kl_cov, None, _select_kl_cov, lambda config: config.kl_cov_ratio),
}

OFF_POLICY_WEIGHTS: dict[str, Callable[[OffPolicyConfig, Tensor, Tensor, Tensor], Tensor]] = {
    "none": _unweighted,
    "truncate": partial(_with_cap, truncated_weights),
    "mask": partial(_with_bounds, masked_weights),
    "sequence_truncate": partial(_with_cap, sequence_truncated_weights),
    "sequence_mask": partial(_with_bounds, sequence_masked_weights),
    "geometric_mask": partial(_with_bounds, geometric_masked_weights),
    "decoupled": partial(_with_cap, capped_weights),
}

ENTROPY_TERMS: dict[str, EntropyTerm] = {
    "none": EntropyTerm(),
    "bonus": EntropyTerm("entropy"),
    "target": EntropyTerm("entropy"),
    "aent": EntropyTerm("clamped_entropy"),
    "pi": EntropyTerm(made_of_logprobs=_high_probability),
}
