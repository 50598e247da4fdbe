"""Policy losses, a value per token, and the ways to add them up.

A surrogate returns a loss (to be minimised) with the shape of its inputs, usually [B, T], and
knows no mask; `aggregate` applies the mask. Between them stands one convention: a token with a
NaN or infinite input has the loss NaN and no gradient. Where the mask hides it, neither value
nor gradient ever sees it; where the mask shows it, the loss is NaN and cannot be overlooked.

old_logprobs are those of the policy that the ratio is taken against: the learner's weights at
the batch's start (proximal). Gradients flow into logprobs only.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: exp(800) would make the loss inf and every
gradient NaN, while a ratio beyond exp(20) carries no information."""

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
Penalty = Literal["abs", "k2", "k3"]


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped loss of each token, with separate bounds.

        L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),    r = exp(logp - old)
        L = min(L, -A dual_clip)  where A < 0

    PPO (https://arxiv.org/abs/1707.06347) with equal bounds, clip-higher
    (https://arxiv.org/abs/2503.14476) with clip_high > clip_low; the second line is dual clip
    (https://arxiv.org/abs/1912.09729), left out when dual_clip is None.

    Args:
        logprobs, old_logprobs, advantages: one shape; the gradient reaches logprobs only.
        clip_low: in [0, 1]. clip_high: >= 0. dual_clip: > 1.
    Raises:
        ValueError: the shapes disagree or a bound is out of range.
    """
    _check_clip(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    losses = _clipped(_exp(log_ratio), advantages, clip_low, clip_high)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -advantages * dual_clip)
        losses = torch.where(advantages < 0, bounded, losses)
    return torch.where(defined, losses, torch.nan)


def clip_cov_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    selected: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Clip-Cov: the clipped loss, and exactly 0 (no gradient) on the selected tokens.

    Eq. 11-12 of https://arxiv.org/abs/2505.22617. The authors' runs use clip_low = clip_high = 1,
    that is r in [0, 2], so that the selection takes the place of PPO's clip. The selected
    tokens stay in the denominator of `aggregate`.

    Args:
        selected: bool, same shape, from `select_clip_cov`.
    Raises:
        ValueError: as in clipped_surrogate.
    """
    check_same_shape(logprobs=logprobs, selected=selected)
    losses = clipped_surrogate(
        logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    return torch.where(selected.bool(), 0.0, losses)


def kl_cov_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    selected: Tensor,
    kl_coef: float,
    penalty: Penalty,
) -> Tensor:
    """KL-Cov: the unclipped loss, plus a penalty on the selected tokens.

        L = -A r                              elsewhere
        L = -A r + kl_coef * D(logp - old)    on the selected tokens

    Eq. 13-14 of https://arxiv.org/abs/2505.22617. D(x) by penalty:
    abs |x|, what the reference code does; its gradient does not shrink with x, so noise in old
    becomes a push of full strength. k2 x^2 / 2. k3 exp(x) - 1 - x, whose mean over tokens sampled
    from old is KL(old || current). On policy (x = 0) all three have no gradient.

    Args:
        selected: bool, same shape, from `select_kl_cov`.
        kl_coef: >= 0.
    Raises:
        ValueError: the shapes disagree, kl_coef < 0, or penalty is none of the three.
    """
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be at least 0, got {kl_coef}")
    if penalty not in _PENALTIES:
        raise ValueError(f"penalty must be one of {sorted(_PENALTIES)}, got {penalty!r}")
    check_same_shape(logprobs=logprobs, selected=selected)
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    losses = -advantages * _exp(log_ratio)
    penalised = losses + kl_coef * _PENALTIES[penalty](log_ratio)
    return torch.where(defined, torch.where(selected.bool(), penalised, losses), torch.nan)


def ppo_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """The tokens whose clip binds: (low, high), two disjoint bool masks inside mask.

        low  = A < 0 and r < 1 - clip_low        high = A > 0 and r > 1 + clip_high

    These are the tokens where clipped_surrogate has no gradient. Clip-Cov leaves their union
    out of its selection, as the reference does; their shares are the clip fractions.

    Raises:
        ValueError: the shapes disagree or a bound is out of range.
    """
    _check_clip(clip_low, clip_high)
    check_same_shape(logprobs=logprobs, mask=mask)
    log_ratio, advantages, defined = _log_ratio(logprobs.detach(), old_logprobs, advantages)
    ratio = _exp(log_ratio)
    counted = mask.bool() & defined
    low = counted & (advantages < 0) & (ratio < 1 - clip_low)
    high = counted & (advantages > 0) & (ratio > 1 + clip_high)
    return low, high


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    *,
    mode: Aggregation,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One number from the losses of the tokens in mask.

        token-mean            sum of all tokens            / number of tokens
        seq-mean-token-sum    sum over rows of row sums    / number of rows
        seq-mean-token-mean   sum over rows of row means   / number of rows

    The names are verl's. A row without a token in mask is not counted. An empty mask gives 0
    with a gradient of 0. What token_loss holds outside mask, NaN and inf included, reaches
    neither the value nor the gradient.

    Args:
        token_loss: [B, T]. mask: bool, same shape.
        denominator: replaces the number of tokens (or rows) of this call, so that losses of
            micro-batches and ranks add up to the loss of the whole mini-batch; > 0.
    Raises:
        ValueError: the shapes disagree, mode is unknown, or denominator is not above 0.
    """
    check_same_shape(token_loss=token_loss, mask=mask)
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    mask = mask.bool()
    kept = torch.where(mask, token_loss, 0.0)
    if mode == "token-mean":
        total, count = kept.sum(), mask.sum()
    elif mode in ("seq-mean-token-sum", "seq-mean-token-mean"):
        num_tokens = mask.sum(-1)
        rows = kept.sum(-1)
        if mode == "seq-mean-token-mean":
            rows = rows / num_tokens.clamp(min=1)
        total, count = rows.sum(), (num_tokens > 0).sum()
    else:
        raise ValueError(f"unknown aggregation {mode!r}; use one of verl's three modes")
    return total / (count.clamp(min=1) if denominator is None else denominator)


def _log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logp - old and A, both 0 where an input is not finite, and where they are finite.

    The zeros stand in before any arithmetic: masking a NaN afterwards cleans the value, but its
    gradient is 0 * NaN.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    defined = logprobs.isfinite() & old_logprobs.isfinite() & advantages.isfinite()
    log_ratio = torch.where(defined, logprobs - old_logprobs, 0.0)
    return log_ratio, torch.where(defined, advantages, 0.0), defined


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def _k2(log_ratio: Tensor) -> Tensor:
    return log_ratio.square() / 2


def _k3(log_ratio: Tensor) -> Tensor:
    # Clamped in both terms: with exp alone clamped, the gradient beyond +20 would change sign.
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return bounded.expm1() - bounded


_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"abs": torch.abs, "k2": _k2, "k3": _k3}


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
