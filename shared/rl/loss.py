"""Policy losses, a value per token, and the ways to add them up.

A surrogate returns a loss (to be minimised) with the shape of its inputs, usually [B, T], and
knows no mask (but GSPO's, whose ratio is a whole row's); `aggregate` applies the mask. Between
them stands one convention: a token with a NaN or infinite input has the loss NaN and no
gradient. Where the mask hides it, neither value nor gradient ever sees it; where the mask shows
it, the loss is NaN and cannot be overlooked.

old_logprobs are those of the policy that the ratio is taken against: the learner's weights at
the batch's start (proximal). Gradients flow into logprobs only.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: exp(800) would make the loss inf and every
gradient NaN, while a ratio beyond exp(20) carries no information."""

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]
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


def unclipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The importance-weighted policy gradient of each token: L = -A r, r = exp(logp - old).

    What KL-Cov does outside its selection; the control that has no clip.

    Raises:
        ValueError: the shapes disagree.
    """
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    return torch.where(defined, -advantages * _exp(log_ratio), torch.nan)


def cispo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """CISPO: clips the weight of a token, never its gradient.

        L = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp,    r = exp(logp - old)

    https://arxiv.org/abs/2506.13585, which clips from above only (clip_low = 1). The gradient is
    -clip(r) A on every token, also where PPO's would be 0. Only the gradient means something:
    the value is no estimate of the objective.

    Raises:
        ValueError: as in clipped_surrogate.
    """
    _check_clip(clip_low, clip_high)
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    weights = _exp(log_ratio.detach()).clamp(1 - clip_low, 1 + clip_high)
    return torch.where(defined, -weights * advantages * logprobs, torch.nan)


def gspo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """GSPO: PPO's clipped loss with one ratio for all tokens of a completion.

        s = exp(mean over the row's mask of (logp - old))
        L = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)),    ds/dlogp = s on each token

    GSPO-token, https://arxiv.org/abs/2507.18071; with one advantage a row, the mean of L over
    the row has GSPO's value and gradient, so aggregate with seq-mean-token-mean. s is near 1
    however long the row is: the paper's bounds are 3e-4 and 4e-4.

    Args:
        mask: bool, same shape, rows along the last axis. Tokens outside it, and tokens with an
            input that is not finite, do not enter the row's mean.
    Raises:
        ValueError: as in clipped_surrogate.
    """
    _check_clip(clip_low, clip_high)
    check_same_shape(logprobs=logprobs, mask=mask)
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    fixed, counted = log_ratio.detach(), mask.bool() & defined
    row_sum = torch.where(counted, fixed, 0.0).sum(-1, keepdim=True)
    row_mean = row_sum / counted.sum(-1, keepdim=True).clamp(min=1)
    ratio = _exp(row_mean + (log_ratio - fixed))
    return torch.where(defined, _clipped(ratio, advantages, clip_low, clip_high), torch.nan)


def high_probability_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, threshold: float
) -> Tensor:
    """EntroPIC's lever on entropy: pushes likely tokens up, whatever the sign of A.

        L = -r |A| where exp(old) > threshold, else 0,    r = exp(logp - old)

    https://arxiv.org/abs/2511.15248. Times a coefficient > 0 it lowers entropy, times one < 0
    it raises it; the coefficient is `EntropyPIController`'s.

    Args:
        threshold: a probability, in [0, 1].
    Raises:
        ValueError: the shapes disagree or threshold is out of range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability, got {threshold}")
    log_ratio, advantages, defined = _log_ratio(logprobs, old_logprobs, advantages)
    losses = torch.where(
        old_logprobs.detach().exp() > threshold, -advantages.abs() * _exp(log_ratio), 0.0
    )
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
    scale: float | None = None,
) -> Tensor:
    """One number from the losses of the tokens in mask.

        token-mean               sum of all tokens            / number of tokens
        token-sum                sum of all tokens
        seq-mean-token-sum       sum over rows of row sums    / number of rows
        seq-mean-token-sum-norm  sum over rows of row sums    / number of rows / scale
        seq-mean-token-mean      sum over rows of row means   / number of rows

    The names are verl's; -norm is Dr. GRPO (https://arxiv.org/abs/2503.20783). A row without a
    token in mask is not counted. An empty mask gives 0 with a gradient of 0. What token_loss
    holds outside mask, NaN and inf included, reaches neither the value nor the gradient.

    Args:
        token_loss: [B, T]. mask: bool, same shape.
        denominator: replaces the number of tokens (or rows) of this call, and token-sum's 1, so
            that losses of micro-batches and ranks add up to that of the mini-batch; > 0.
        scale: a number of tokens, the same for all rows; for -norm, and for it only; > 0.
    Raises:
        ValueError: the shapes disagree, mode is unknown, denominator or scale is not above 0, or
            scale is missing or has no use.
    """
    check_same_shape(token_loss=token_loss, mask=mask)
    _check_divisors(mode, denominator, scale)
    mask = mask.bool()
    num_tokens = mask.sum(-1)
    rows = torch.where(mask, token_loss, 0.0).sum(-1)
    if mode == "seq-mean-token-mean":
        rows = rows / num_tokens.clamp(min=1)
    if scale is not None:
        rows = rows / scale
    if denominator is None and mode != "token-sum":
        counted = num_tokens if mode == "token-mean" else num_tokens > 0
        denominator = counted.sum().clamp(min=1)
    return rows.sum() if denominator is None else rows.sum() / denominator


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


def _check_divisors(
    mode: Aggregation, denominator: float | Tensor | None, scale: float | None
) -> None:
    if mode not in get_args(Aggregation):
        raise ValueError(f"unknown aggregation {mode!r}; use one of {get_args(Aggregation)}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    if (scale is not None) != (mode == "seq-mean-token-sum-norm"):
        raise ValueError(f"scale is for seq-mean-token-sum-norm alone, got {scale} with {mode}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
