"""What a step minimises: the run file's choices, made into one function of a micro-batch.

    loss =   aggregate(weight * surrogate)         over the tokens that the top-entropy mask keeps
           - coefficient * aggregate(entropy term)
           + reference coefficient * aggregate(KL to the reference model)

Denominators are those of the whole optimiser mini-batch on all ranks, so that the losses (and
gradients) of micro-batches add up to those of the mini-batch. A token that a method takes out of
the loss stays in the denominator. Values per token are [B, C], mask True on sampled tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from services.learner.loss_modes import (
    ENTROPY_TERMS,
    LOSS_MODES,
    OFF_POLICY_WEIGHTS,
    TokenInputs,
)
from shared.config import RunConfig
from shared.rl.covariance import token_covariance
from shared.rl.entropy import TokenStatistics
from shared.rl.kl import reference_kl
from shared.rl.loss import aggregate
from shared.rl.offpolicy import interpolated_proximal
from shared.rl.shaping import entropy_ratio_kept, top_entropy_mask


class Totals(NamedTuple):
    """Size of an optimiser mini-batch on all ranks."""

    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, mask: Tensor) -> Totals:
        """Of the whole mini-batch's mask [R, C]."""
        return cls(int(mask.sum()), int(mask.any(-1).sum()))


class Choice(NamedTuple):
    """What was decided about tokens over a whole mini-batch, [B, C] bool; None is no choice.

    Attributes:
        selected: those that the covariance method acts on.
        kept: those whose entropy is high enough to have a policy loss.
    """

    selected: Tensor | None = None
    kept: Tensor | None = None

    def rows(self, rows: list[int], width: int) -> Choice:
        """The given rows, cut to their first `width` tokens."""
        return Choice(*(None if each is None else each[rows, :width] for each in self))


class Loss(NamedTuple):
    """A micro-batch's share of the mini-batch's loss; the parts have no gradient.

    `entropy` and `reference` are None where the loss has no such term.
    """

    total: Tensor
    policy: Tensor
    entropy: Tensor | None
    reference: Tensor | None


class Objective:
    """The loss of a run, and the choice of tokens that goes with it."""

    def __init__(self, config: RunConfig) -> None:
        """Look the choices up; numbers are checked by the run file."""
        self._run = config
        self._config = config.policy_loss
        self._mode = LOSS_MODES[config.policy_loss.loss_mode]
        self._weigh = OFF_POLICY_WEIGHTS[config.off_policy.method]
        self._entropy_term = ENTROPY_TERMS[config.entropy.method]
        self._interpolates = config.off_policy.proximal == "interpolated"
        self.keeps_top = config.policy_loss.top_entropy_quantile < 1
        self.clamp_p = config.entropy.clamp_p if config.entropy.method == "aent" else None
        self.has_entropy_term = config.entropy.method != "none"
        self.has_reference = config.reference_kl.coef > 0
        self.is_clipped = self._mode.clipped is not None
        self.is_weighted = config.off_policy.method != "none"
        self.clips_entropy_ratio = config.policy_loss.entropy_ratio_clip_low is not None
        self.selects = self._mode.selector is not None
        self.chooses = self.selects or self.keeps_top
        self.chooses_globally = self.chooses and config.policy_loss.scope == "global"
        self.chooses_by_current = config.policy_loss.selection_logprobs == "current"

    def choose(
        self, target_logprobs: Tensor, target_entropy: Tensor, inputs: TokenInputs
    ) -> Choice:
        """Which tokens the loss treats in another way, among exactly those given.

        Given a whole mini-batch the means, the quotas, the draw and the entropy threshold are
        the mini-batch's, and the answer depends on no split or order of it.

        Args:
            target_logprobs, target_entropy: [B, C] of the current weights.
        """
        kept = None
        if self.keeps_top:
            quantile = self._config.top_entropy_quantile
            kept = top_entropy_mask(target_entropy.detach(), inputs.mask, quantile=quantile)
        if self._mode.selector is None:
            return Choice(None, kept)
        target_logprobs = target_logprobs.detach()
        inputs = self.anchored(target_logprobs, inputs)
        covariance = token_covariance(target_logprobs, inputs.advantages, inputs.mask)
        selected = self._mode.selector(self._config, covariance, target_logprobs, inputs)
        return Choice(selected, kept)

    def quota(self, num_tokens: int) -> int:
        """Tokens that one `choose` over num_tokens may select."""
        return max(1, math.floor(self._mode.selected_ratio(self._config) * num_tokens + 1e-9))

    def anchored(self, target_logprobs: Tensor, inputs: TokenInputs) -> TokenInputs:
        """The inputs with the proximal log-probs that ratio and weight are taken against.

        Those measured at the batch's start or, where the run file says so, A-3PO's interpolation
        between behaviour and the present target.
        """
        if not self._interpolates:
            return inputs
        proximal = interpolated_proximal(
            target_logprobs.detach(), inputs.behaviour_logprobs, inputs.staleness
        )
        return replace(inputs, proximal_logprobs=proximal)

    def weights(self, inputs: TokenInputs) -> Tensor:
        """The off-policy weight of each token, without gradient; 1 where there is none."""
        return self._weigh(
            self._run.off_policy, inputs.proximal_logprobs, inputs.behaviour_logprobs, inputs.mask
        )

    def clipped(self, target_logprobs: Tensor, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
        """Where the surrogate's clip binds, (low, high)."""
        assert self._mode.clipped is not None, "the surrogate has no clip"
        return self._mode.clipped(self._config, target_logprobs, inputs)

    def entropy_ratio_kept(self, entropy: Tensor, inputs: TokenInputs) -> Tensor:
        """Where the entropy moved so little since the batch's start that the gradient stays."""
        low, high = self._config.entropy_ratio_clip_low, self._config.entropy_ratio_clip_high
        assert low is not None, "entropy-ratio clipping is off"
        assert high is not None
        return entropy_ratio_kept(
            entropy.detach(), inputs.proximal_entropy, clip_low=low, clip_high=high
        )

    def loss(
        self,
        statistics: TokenStatistics,
        inputs: TokenInputs,
        choice: Choice,
        *,
        totals: Totals,
        coefficient: float,
    ) -> Loss:
        """This micro-batch's share of the mini-batch's loss.

        Args:
            statistics: of the current weights, [B, C] each.
            choice: from `choose`, of these rows.
            totals: of the mini-batch on all ranks.
            coefficient: of the entropy term.
        """
        inputs = self.anchored(statistics.logprob, inputs)
        policy = self._aggregate(self._policy_loss(statistics, inputs, choice), inputs, totals)
        total, entropy, reference = policy, None, None
        token_entropy = self._entropy_term.values(self._run, statistics, inputs)
        if token_entropy is not None:
            entropy = -coefficient * self._aggregate(token_entropy, inputs, totals)
            total = total + entropy
        if inputs.reference_logprobs is not None:
            reference = self._reference_loss(statistics.logprob, inputs, totals)
            total = total + reference
        return Loss(total, policy.detach(), _detached(entropy), _detached(reference))

    def stand_in(self, statistics: TokenStatistics, slope: float) -> Tensor:
        """A loss through the paths of the real one, with this slope, 0 or NaN, everywhere.

        ZeRO-3 exchanges weights as the backward pass meets them, so all ranks must pass the
        same way, also one that has nothing to say: through each output that the real loss
        reads, and through no other.
        """
        total = statistics.logprob.sum()
        entropy = self._entropy_term.path(statistics)
        if entropy is not None:
            total = total + entropy.sum()
        return total * slope

    def _policy_loss(
        self, statistics: TokenStatistics, inputs: TokenInputs, choice: Choice
    ) -> Tensor:
        """Per token: surrogate, its gradient and value cut where the methods say so, weight."""
        losses = self._mode.surrogate(self._config, statistics.logprob, inputs, choice.selected)
        if self.clips_entropy_ratio:
            kept = self.entropy_ratio_kept(statistics.entropy, inputs)
            losses = torch.where(kept, losses, losses.detach())
        if choice.kept is not None:
            losses = torch.where(choice.kept, losses, 0.0)
        return losses * self.weights(inputs)

    def _reference_loss(
        self, target_logprobs: Tensor, inputs: TokenInputs, totals: Totals
    ) -> Tensor:
        assert inputs.reference_logprobs is not None
        term = self._run.reference_kl
        losses = reference_kl(target_logprobs, inputs.reference_logprobs, estimator=term.estimator)
        return term.coef * self._aggregate(losses, inputs, totals)

    def _aggregate(self, values: Tensor, inputs: TokenInputs, totals: Totals) -> Tensor:
        mode, scale = self._config.loss_agg_mode, None
        counts = {"token-mean": totals.num_tokens, "token-sum": 1}
        if mode == "seq-mean-token-sum-norm":
            scale = self._config.loss_scale_factor or self._run.rollout.max_completion_tokens
        count = counts.get(mode, totals.num_sequences)
        return aggregate(values, inputs.mask, mode=mode, denominator=count, scale=scale)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
