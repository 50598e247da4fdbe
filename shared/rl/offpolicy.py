"""Correction for tokens sampled by another policy than the one that the ratio starts from.

The weight of a token is w = exp(proximal - behaviour): the learner's weights at the batch's start
over the engine that sampled it, so it holds staleness and numerical mismatch together. It
multiplies the token's loss and carries no gradient. Tensors are [B, T], a completion a row, mask
True on sampled tokens; outside it weights are 0 whatever the inputs hold. Tokens of weight 0 stay
in the denominator of `shared.rl.loss.aggregate`. Weights lie within exp(+-MAX_LOG_RATIO).
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
    _check_cap(cap)
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


def capped_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Importance weights up to a cap, 0 for the tokens above it.

        w if w <= cap else 0

    The behaviour weight of decoupled PPO (https://arxiv.org/abs/2505.24298), there with cap 5:
    truncation keeps what is above the cap, this drops it.

    Raises:
        ValueError: the shapes disagree, or cap is not above 0.
    """
    _check_cap(cap)
    return masked_weights(proximal_logprobs, behaviour_logprobs, mask, lower=0.0, upper=cap)


def sequence_truncated_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """The completion's weight on all its tokens, cut off at a cap.

        min(W, cap),    W = exp(sum over the completion's tokens of proximal - behaviour)

    W is the importance weight of the completion as one action, TRL's `sequence_truncate`. Its
    logarithm grows with the completion: a mismatch that no token shows is large in W.

    Raises:
        ValueError: the shapes disagree, or cap is not above 0.
    """
    _check_cap(cap)
    log_weight, dtype = _log_product(proximal_logprobs, behaviour_logprobs, mask)
    return torch.where(mask.bool(), _exp(log_weight).clamp(max=cap), 0.0).to(dtype)


def sequence_masked_weights(
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    *,
    lower: float,
    upper: float,
) -> Tensor:
    """The completion's weight on all its tokens, 0 where it is out of bounds.

        W if lower <= W <= upper else 0,    W as in `sequence_truncated_weights`

    TRL's `sequence_mask`, there without a lower bound and with upper 3.

    Raises:
        ValueError: the shapes disagree, or not 0 <= lower <= upper.
    """
    _check_bounds(lower, upper)
    log_weight, dtype = _log_product(proximal_logprobs, behaviour_logprobs, mask)
    kept = mask.bool() & _within(log_weight, lower, upper)
    return torch.where(kept, _exp(log_weight), 0.0).to(dtype)


def geometric_masked_weights(
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

    One improbable token then rejects or keeps the completion as a whole, and its length does
    not matter. A row without a token in mask has weights 0.

    Raises:
        ValueError: the shapes disagree, or not 0 <= lower <= upper.
    """
    _check_bounds(lower, upper)
    log_weight = _log_weight(proximal_logprobs, behaviour_logprobs, mask)
    mask = mask.bool()
    num_tokens = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = log_weight.sum(-1, keepdim=True) / num_tokens
    return torch.where(mask & _within(mean, lower, upper), mean.exp(), 0.0)


def interpolated_proximal(
    target_logprobs: Tensor, behaviour_logprobs: Tensor, staleness: Tensor
) -> Tensor:
    """Proximal log-probabilities without the forward pass that would measure them.

        log prox = alpha * log behaviour + (1 - alpha) * log target
        alpha = 1 / d for staleness d >= 1,    0 for d = 0

    A-3PO (https://arxiv.org/abs/2512.06547): the weights at the batch's start are one update behind
    the ones being trained and d behind the sampler's. At d = 1 it is the behaviour policy, and
    the weight exp(proximal - behaviour) is 1. No gradient.

    Args:
        target_logprobs: [B, T] under the weights being trained.
        staleness: in versions, >= 0; [B, 1] or [B, T].
    Returns:
        [B, T]; each token depends on its own inputs alone, and with d = 0 on the target alone.
    Raises:
        ValueError: the shapes disagree, or a staleness is negative.
    """
    shape = check_same_shape(target_logprobs=target_logprobs, behaviour_logprobs=behaviour_logprobs)
    # A staleness of [B] would broadcast along the tokens, unseen where B = T.
    if len(staleness.shape) != len(shape) or any(
        size not in (1, full) for size, full in zip(staleness.shape, shape, strict=True)
    ):
        raise ValueError(
            f"need a staleness a row or a token of {tuple(shape)}, got {tuple(staleness.shape)}"
        )
    if (staleness < 0).any():
        raise ValueError(f"a staleness must not be negative, got {float(staleness.min())}")
    target, behaviour = target_logprobs.detach(), behaviour_logprobs.detach()
    alpha = 1 / staleness.clamp(min=1).to(torch.promote_types(target.dtype, torch.float32))
    mixed = alpha * behaviour + (1 - alpha) * target
    # Taken whole at the ends: 0 * -inf would be NaN.
    mixed = torch.where(staleness == 1, behaviour, mixed)
    return torch.where(staleness == 0, target, mixed)


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


def _log_product(proximal: Tensor, behaviour: Tensor, mask: Tensor) -> tuple[Tensor, torch.dtype]:
    """Each row's sum of proximal - behaviour, [B, 1], float64, unbounded; and the inputs' dtype."""
    check_same_shape(proximal_logprobs=proximal, behaviour_logprobs=behaviour, mask=mask)
    difference = torch.where(mask.bool(), proximal.detach() - behaviour.detach(), 0.0)
    return difference.double().sum(-1, keepdim=True), difference.dtype


def _exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _within(log_weight: Tensor, lower: float, upper: float) -> Tensor:
    log_lower = math.log(lower) if lower > 0 else -math.inf
    low = log_weight >= log_lower - LOG_BOUND_TOLERANCE
    return low & (log_weight <= math.log(upper) + LOG_BOUND_TOLERANCE)


def _check_cap(cap: float) -> None:
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")


def _check_bounds(lower: float, upper: float) -> None:
    if not (0 <= lower <= upper and upper > 0):
        raise ValueError(f"need 0 <= lower <= upper with upper above 0, got [{lower}, {upper}]")
