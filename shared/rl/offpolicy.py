"""Correction for tokens sampled by another policy than the one that the ratio starts from.

The weight of a token is w = exp(proximal - behaviour): the learner's weights at the batch's start
over the engine that sampled it, so it holds staleness and numerical mismatch together. It
multiplies the token's loss and carries no gradient. Tensors are [B, T], mask True on sampled
tokens; outside it weights are 0 whatever the inputs hold. Tokens of weight 0 stay in the
denominator of `shared.rl.loss.aggregate`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.loss import MAX_LOG_RATIO
from shared.rl.shapes import check_same_shape

LOG_BOUND_TOLERANCE = 1e-6
"""A log-weight this near to a bound lies on it, and so inside the closed interval."""


class Mismatch(NamedTuple):
    """How far behaviour is from proximal, over the tokens in mask; 0-dim, 0 for an empty mask."""

    kl: Tensor
    """Estimate of KL(behaviour || proximal), nats per token, >= 0."""
    mean_abs: Tensor
    """Mean |proximal - behaviour| of the log-probabilities."""
    max_abs: Tensor
    """Largest |proximal - behaviour|."""


def truncated_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Importance weights, cut off at a cap: min(w, cap).

    Truncated importance sampling, TIS (https://fengyao.notion.site/off-policy-rl); 2 is common.

    Raises:
        ValueError: the shapes disagree, or cap is not above 0.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    log_weight = _log_weight(proximal_logprobs, behaviour_logprobs, mask)
    return torch.where(mask.bool(), log_weight.exp().clamp(max=cap), 0.0)


def masked_weights(
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    *,
    lower: float,
    upper: float,
) -> Tensor:
    """Importance weights inside a closed interval, 0 for the others.

        w if lower <= w <= upper else 0

    IcePop (https://arxiv.org/abs/2510.18855), there with [0.5, 5].

    Raises:
        ValueError: the shapes disagree, or not 0 <= lower <= upper.
    """
    _check_bounds(lower, upper)
    log_weight = _log_weight(proximal_logprobs, behaviour_logprobs, mask)
    kept = mask.bool() & _within(log_weight, lower, upper)
    return torch.where(kept, log_weight.exp(), 0.0)


def sequence_masked_weights(
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    *,
    lower: float,
    upper: float,
) -> Tensor:
    """The completion's geometric-mean weight on all its tokens, 0 where it is out of bounds.

        s = exp(mean over the completion's tokens of proximal - behaviour)
        s if lower <= s <= upper else 0

    One improbable token then rejects or keeps the completion as a whole. A row without a
    token in mask has weights 0.

    Args:
        proximal_logprobs, behaviour_logprobs, mask: [B, T], a completion a row.
    Raises:
        ValueError: the shapes disagree, or not 0 <= lower <= upper.
    """
    _check_bounds(lower, upper)
    log_weight = _log_weight(proximal_logprobs, behaviour_logprobs, mask)
    mask = mask.bool()
    num_tokens = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = log_weight.sum(-1, keepdim=True) / num_tokens
    return torch.where(mask & _within(mean, lower, upper), mean.exp(), 0.0)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Number of equally weighted tokens that would give the same variance.

        (sum of w)^2 / sum of w^2        (Kish)

    Returns:
        0-dim, from 0 (no weight at all) to the number of tokens in mask (equal weights).
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(weights=weights, mask=mask)
    kept = torch.where(mask.bool(), weights.detach(), 0.0).double()
    squares = kept.square().sum()
    return torch.where(squares > 0, kept.sum().square() / squares, 0.0)


def mismatch_kl(proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor) -> Mismatch:
    """Divergence of the sampler from the learner, from the sampled tokens alone.

        kl = mean over mask of exp(x) - 1 - x,    x = proximal - behaviour

    The k3 estimator (http://joschu.net/blog/kl-approx.html): unbiased for tokens sampled from
    behaviour, and never negative.

    Raises:
        ValueError: the shapes disagree.
    """
    log_weight = _log_weight(proximal_logprobs, behaviour_logprobs, mask)
    count = mask.bool().sum().clamp(min=1)
    distance = log_weight.abs()
    max_abs = distance.amax() if distance.numel() else distance.sum()
    kl = (log_weight.expm1() - log_weight).sum() / count
    return Mismatch(kl=kl, mean_abs=distance.sum() / count, max_abs=max_abs)


def _log_weight(proximal: Tensor, behaviour: Tensor, mask: Tensor) -> Tensor:
    """proximal - behaviour within +-MAX_LOG_RATIO, 0 outside mask, without a gradient."""
    check_same_shape(proximal_logprobs=proximal, behaviour_logprobs=behaviour, mask=mask)
    difference = proximal.detach() - behaviour.detach()
    return torch.where(mask.bool(), difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0)


def _within(log_weight: Tensor, lower: float, upper: float) -> Tensor:
    log_lower = math.log(lower) if lower > 0 else -math.inf
    low = log_weight >= log_lower - LOG_BOUND_TOLERANCE
    return low & (log_weight <= math.log(upper) + LOG_BOUND_TOLERANCE)


def _check_bounds(lower: float, upper: float) -> None:
    if not (0 <= lower <= upper and upper > 0):
        raise ValueError(f"need 0 <= lower <= upper with upper above 0, got [{lower}, {upper}]")
