"""What a step minimises: the run file's choices, made into one function of a micro-batch.

    loss = aggregate(weight * surrogate) - coefficient * aggregate(entropy)

Denominators are those of the whole optimiser mini-batch on all ranks, so that the losses (and
gradients) of micro-batches add up to those of the mini-batch. Values per token are [B, C], mask
True on sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shared.config.algorithm import EntropyConfig, OffPolicyConfig, PolicyLossConfig
from shared.rl.covariance import select_clip_cov, select_kl_cov, token_covariance
from shared.rl.entropy import TokenStatistics
from shared.rl.loss import (
    aggregate,
    clip_cov_surrogate,
    clipped_surrogate,
    kl_cov_surrogate,
    ppo_clipped,
)
from shared.rl.offpolicy import masked_weights, sequence_masked_weights, truncated_weights


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss knows of tokens before the forward pass; all [B, C].

    Attributes:
        proximal_logprobs: of the learner's weights at the batch's start.
        keys: int64, from `token_keys`.
    """

    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    proximal_logprobs: Tensor
    keys: Tensor

    def rows(self, rows: list[int], width: int) -> TokenInputs:
        """The given rows, cut to their first `width` tokens."""
        return TokenInputs(
            self.mask[rows, :width],
            self.advantages[rows, :width],
            self.behaviour_logprobs[rows, :width],
            self.proximal_logprobs[rows, :width],
            self.keys[rows, :width],
        )


class Totals(NamedTuple):
    """Size of an optimiser mini-batch on all ranks."""

    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, mask: Tensor) -> Totals:
        """Of the whole mini-batch's mask [R, C]."""
        return cls(int(mask.sum()), int(mask.any(-1).sum()))


class Loss(NamedTuple):
    """A micro-batch's share of the mini-batch's loss; `policy` and `entropy` have no gradient.

    `entropy` is None where the loss has no entropy term.
    """

    total: Tensor
    policy: Tensor
    entropy: Tensor | None


Surrogate = Callable[[PolicyLossConfig, Tensor, TokenInputs, Tensor | None], Tensor]
Selector = Callable[[PolicyLossConfig, Tensor, Tensor, TokenInputs], Tensor]


class LossMode(NamedTuple):
    """How a `policy_loss.loss_mode` works.

    Attributes:
        surrogate: (config, target_logprobs, inputs, selected) to losses per token.
        selector: (config, covariance, target_logprobs, inputs) to a bool mask, or None.
        selected_ratio: share of the tokens that the selector may select.
        is_clipped: whether PPO's clip is part of the surrogate.
    """

    surrogate: Surrogate
    selector: Selector | None
    selected_ratio: Callable[[PolicyLossConfig], float]
    is_clipped: bool


class Objective:
    """The loss of a run, and the selection of tokens that goes with it."""

    def __init__(
        self, policy_loss: PolicyLossConfig, entropy: EntropyConfig, off_policy: OffPolicyConfig
    ) -> None:
        """Look the choices up; numbers are checked by the run file."""
        self._config = policy_loss
        self._mode = LOSS_MODES[policy_loss.loss_mode]
        self._weigh = OFF_POLICY_WEIGHTS[off_policy.method]
        self._off_policy = off_policy
        self._entropy_term = ENTROPY_TERMS[entropy.method]
        self.clamp_p = entropy.clamp_p if entropy.method == "aent" else None
        self.has_entropy_term = entropy.method != "none"
        self.is_clipped = self._mode.is_clipped
        self.is_weighted = off_policy.method != "none"
        self.selects = self._mode.selector is not None
        self.selects_globally = self.selects and policy_loss.scope == "global"

    def select(self, target_logprobs: Tensor, inputs: TokenInputs) -> Tensor:
        """The tokens that the covariance method acts on, among exactly those given.

        Given a whole mini-batch the means, the quota and the draw are the mini-batch's, and
        the answer depends on no split or order of it.

        Args:
            target_logprobs: [B, C] of the current weights.
        """
        assert self._mode.selector is not None, "vanilla PPO selects no tokens"
        target_logprobs = target_logprobs.detach()
        covariance = token_covariance(target_logprobs, inputs.advantages, inputs.mask)
        return self._mode.selector(self._config, covariance, target_logprobs, inputs)

    def quota(self, num_tokens: int) -> int:
        """Tokens that one `select` over num_tokens may select."""
        return max(1, math.floor(self._mode.selected_ratio(self._config) * num_tokens + 1e-9))

    def weights(self, inputs: TokenInputs) -> Tensor:
        """The off-policy weight of each token, without gradient; 1 where there is none."""
        return self._weigh(
            self._off_policy, inputs.proximal_logprobs, inputs.behaviour_logprobs, inputs.mask
        )

    def clipped(self, target_logprobs: Tensor, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
        """Where PPO's clip binds, (low, high)."""
        return _ppo_clipped(self._config, target_logprobs, inputs)

    def loss(
        self,
        statistics: TokenStatistics,
        inputs: TokenInputs,
        selected: Tensor | None,
        *,
        totals: Totals,
        coefficient: float,
    ) -> Loss:
        """This micro-batch's share of the mini-batch's loss.

        Args:
            statistics: of the current weights, [B, C] each.
            selected: from `select`; None for a loss mode that selects nothing.
            totals: of the mini-batch on all ranks.
            coefficient: of the entropy term.
        """
        token_loss = self._mode.surrogate(self._config, statistics.logprob, inputs, selected)
        policy = self._aggregate(token_loss * self.weights(inputs), inputs.mask, totals)
        token_entropy = self._entropy_term(statistics)
        if token_entropy is None:
            return Loss(policy, policy.detach(), None)
        entropy = -coefficient * self._aggregate(token_entropy, inputs.mask, totals)
        return Loss(policy + entropy, policy.detach(), entropy.detach())

    def stand_in(self, statistics: TokenStatistics, slope: float) -> Tensor:
        """A loss through every path of the real one, with this slope, 0 or NaN, everywhere.

        ZeRO-3 exchanges weights as the backward pass meets them, so all ranks must pass the
        same way, also one that has nothing to say.
        """
        entropy = self._entropy_term(statistics)
        total = statistics.logprob.sum()
        return (total if entropy is None else total + entropy.sum()) * slope

    def _aggregate(self, values: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        mode = self._config.loss_agg_mode
        count = totals.num_tokens if mode == "token-mean" else totals.num_sequences
        return aggregate(values, mask, mode=mode, denominator=count)


def _vanilla(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, _: Tensor | None
) -> Tensor:
    return clipped_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        dual_clip=config.clip_ratio_c,
    )


def _clip_cov(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs, selected: Tensor | None
) -> Tensor:
    assert selected is not None
    return clip_cov_surrogate(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        selected=selected,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
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
    low, high = _ppo_clipped(config, target_logprobs, inputs)
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


def _ppo_clipped(
    config: PolicyLossConfig, target_logprobs: Tensor, inputs: TokenInputs
) -> tuple[Tensor, Tensor]:
    return ppo_clipped(
        target_logprobs,
        inputs.proximal_logprobs,
        inputs.advantages,
        inputs.mask,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
    )


def _unweighted(_: OffPolicyConfig, proximal: Tensor, behaviour: Tensor, mask: Tensor) -> Tensor:
    return torch.ones_like(proximal)


def _truncated(
    config: OffPolicyConfig, proximal: Tensor, behaviour: Tensor, mask: Tensor
) -> Tensor:
    return truncated_weights(proximal, behaviour, mask, cap=config.cap)


def _bounded(
    weigh: Callable[..., Tensor],
    config: OffPolicyConfig,
    proximal: Tensor,
    behaviour: Tensor,
    mask: Tensor,
) -> Tensor:
    return weigh(proximal, behaviour, mask, lower=config.lower, upper=config.upper)


LOSS_MODES: dict[str, LossMode] = {
    "vanilla": LossMode(_vanilla, None, lambda config: 0.0, is_clipped=True),
    "clip_cov": LossMode(
        _clip_cov, _select_clip_cov, lambda config: config.clip_cov_ratio, is_clipped=True
    ),
    "kl_cov": LossMode(
        _kl_cov, _select_kl_cov, lambda config: config.kl_cov_ratio, is_clipped=False
    ),
}

OFF_POLICY_WEIGHTS: dict[str, Callable[[OffPolicyConfig, Tensor, Tensor, Tensor], Tensor]] = {
    "none": _unweighted,
    "truncate": _truncated,
    "mask": partial(_bounded, masked_weights),
    "sequence_mask": partial(_bounded, sequence_masked_weights),
}

ENTROPY_TERMS: dict[str, Callable[[TokenStatistics], Tensor | None]] = {
    "none": lambda statistics: None,
    "bonus": lambda statistics: statistics.entropy,
    "aent": lambda statistics: statistics.clamped_entropy,
}
