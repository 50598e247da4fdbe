"""Which tokens and completions count for more: selection by entropy, weights on the advantage.

Per-token tensors are [B, T], or a flat [N] where nothing is said of rows; mask is True on sampled
tokens, and what other positions hold is never read. A statistic runs over the tokens that are
given: to take it over ranks, gather them, call the function on the whole, and keep your own part
of the answer. Nothing here carries a gradient.
"""

import math

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

OUTLIER_IQRS = 1.5
"""Interquartile ranges outside the quartiles from which a perplexity is an outlier."""

MIN_PERPLEXITY_STD = 1e-6
"""In nats; a group whose log-perplexities spread less is taken to have a deviation of 1."""

MIN_FACTOR, MAX_FACTOR = 0.8, 1.2

MAX_POSITION_SHARE = 0.5
"""Of a token's |advantage|: the most that its position adds."""

ENTROPY_EPSILON = 1e-8

RANK_TOLERANCE = 1e-9
"""A rank this near to an integer is that integer: in floats 0.29 * 100 lies just below 29."""


def top_entropy_mask(entropy: Tensor, mask: Tensor, *, quantile: float) -> Tensor:
    """The tokens of highest entropy: at or above the (1 - quantile) quantile over mask.

    The 20 % of forking tokens of https://arxiv.org/abs/2506.01939. The quantile is linearly
    interpolated, as torch.quantile's and so TRL's, which refuses more than 2**24 tokens: a
    value interpolated between two neighbours in order lets in the upper one and not the
    lower, so the upper one is the threshold. Tokens equal to it are all let in; so are those
    whose entropy is NaN, for the loss to show it.

    Args:
        entropy: over the full vocabulary, under the policy being trained.
        quantile: share of the tokens to keep, in (0, 1]; the paper's is 0.2, and 1 gives mask.
    Returns:
        bool, same shape, within mask.
    Raises:
        ValueError: the shapes disagree, or quantile is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is the share of tokens to keep, in (0, 1], got {quantile}")
    check_same_shape(entropy=entropy, mask=mask)
    mask = mask.bool()
    values = entropy.detach()[mask]
    if values.numel() == 0:
        return mask
    from_top = math.floor(quantile * (values.numel() - 1) + RANK_TOLERANCE)
    threshold = values.kthvalue(values.numel() - from_top).values
    return mask & ~(entropy.detach() < threshold)


def perplexity_factors(
    mean_logprobs: Tensor, *, alpha: float, valid: Tensor | None = None
) -> Tensor:
    """Factors of the advantage that weigh a group's likely completions more.

        f_i = clip(1 - alpha w_i, 0.8, 1.2),    w_i = (log PPL_i - mean) / std

    The perplexity form of https://arxiv.org/abs/2508.02260, log PPL_i being minus the mean
    log-probability of the completion's tokens. As in its release, mean and (biased) std leave
    out the values beyond 1.5 interquartile ranges from the quartiles, and a std below 1e-6 is 1.

    Args:
        mean_logprobs: [..., group_size], a group in the last axis.
        alpha: at least 0; the paper's is 0.01.
        valid: bool, same shape. A completion that is not valid counts in no mean or std and
            gets 1, whatever it holds.
    Returns:
        Shape and dtype of mean_logprobs. Exactly 1 for alone completions and for equal ones.
    Raises:
        ValueError: the shapes disagree, a group is empty, a valid mean is not finite, or alpha
            is negative or not finite.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    if mean_logprobs.ndim == 0 or mean_logprobs.shape[-1] == 0:
        raise ValueError(f"a group needs a completion, got shape {tuple(mean_logprobs.shape)}")
    valid = torch.ones_like(mean_logprobs, dtype=torch.bool) if valid is None else valid.bool()
    check_same_shape(mean_logprobs=mean_logprobs, valid=valid)
    log_perplexity = torch.where(valid, -mean_logprobs.detach().double(), 0.0)
    if not bool(log_perplexity.isfinite().all()):
        raise ValueError("a mean log-probability is not finite; mark its completion as not valid")
    factors = (1 - alpha * _standardised(log_perplexity, valid)).clamp(MIN_FACTOR, MAX_FACTOR)
    return torch.where(valid, factors, 1.0).to(mean_logprobs.dtype)


def position_shaped(advantages: Tensor, mask: Tensor, *, gamma: float, steepness: float) -> Tensor:
    """Advantages made larger towards the end of the completion.

        A_t + sign(A_t) min(b_t, |A_t| / 2)
        b_t = gamma * sigmoid(steepness * (rho_t - 1/2)),    rho_t = (t - 1) / L

    The position form of https://arxiv.org/abs/2508.02260, t counting the row's L tokens in mask
    from 1. No sign changes, and an advantage of 0 stays 0.

    Args:
        advantages, mask: [B, T], a completion a row.
        gamma: at least 0, in units of the advantage; the paper's is 0.1.
        steepness: at least 0; the paper's is 15.
    Returns:
        [B, T], float32 or wider; 0 outside mask.
    Raises:
        ValueError: the shapes disagree, or gamma or steepness is negative.
    """
    if not (gamma >= 0 and steepness >= 0):
        raise ValueError(f"need gamma and steepness of at least 0, got {gamma} and {steepness}")
    check_same_shape(advantages=advantages, mask=mask)
    mask = mask.bool()
    dtype = torch.promote_types(advantages.dtype, torch.float32)
    kept = torch.where(mask, advantages.detach().to(dtype), 0.0)
    num_before = (mask.cumsum(-1) - 1).to(dtype)
    position = num_before / mask.sum(-1, keepdim=True).clamp(min=1)
    bonus = gamma * torch.sigmoid(steepness * (position - 0.5))
    return kept + kept.sign() * torch.minimum(bonus, MAX_POSITION_SHARE * kept.abs())


def overlong_penalty(
    num_tokens: int, *, max_tokens: int, buffer_tokens: int, factor: float
) -> float:
    """What a completion's reward loses for coming near the length at which it is cut off.

        0                                             up to max - buffer tokens
        factor * (max - buffer - num_tokens) / buffer inside the buffer
        -factor                                       from max on

    DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476), there with a maximum of
    20480, a buffer of 4096 and a factor of 1. With a buffer of 0, only what is longer than the
    maximum loses anything.

    Returns:
        To be added to the reward; in [-factor, 0].
    Raises:
        ValueError: not 0 <= buffer_tokens <= max_tokens, or factor is negative.
    """
    if not (0 <= buffer_tokens <= max_tokens and factor >= 0):
        raise ValueError(
            "need 0 <= buffer_tokens <= max_tokens and factor >= 0, got "
            f"{buffer_tokens}, {max_tokens} and {factor}"
        )
    excess = num_tokens - (max_tokens - buffer_tokens)
    if excess <= 0:
        return 0.0
    return -factor * min(1.0, excess / buffer_tokens) if buffer_tokens else -factor


def entropy_ratio_kept(
    entropy: Tensor, old_entropy: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The tokens at which the entropy has moved little since the old policy.

        1 - clip_low < rho < 1 + clip_high,    rho = (H + 1e-8) / (H_old + 1e-8)

    Entropy-ratio clipping, ERC (https://arxiv.org/abs/2512.05591), there with 0.05 on both
    sides. A token outside stays in loss and denominator, without its gradient. An entropy of
    NaN is outside.

    Args:
        entropy, old_entropy: over the full vocabulary, at the same temperature.
    Returns:
        bool, same shape.
    Raises:
        ValueError: the shapes disagree, or a bound is not above 0.
    """
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(f"both bounds must be above 0, got {clip_low} and {clip_high}")
    check_same_shape(entropy=entropy, old_entropy=old_entropy)
    # In float64, where 1e-8 does not vanish beside 1. Rounding can leave an entropy below 0.
    now = entropy.detach().double().clamp(min=0) + ENTROPY_EPSILON
    ratio = now / (old_entropy.detach().double().clamp(min=0) + ENTROPY_EPSILON)
    return (ratio > 1 - clip_low) & (ratio < 1 + clip_high)


def _standardised(values: Tensor, valid: Tensor) -> Tensor:
    """(v - mean) / std of the valid ones, outliers out of both; exactly 0 for equal values."""
    shifted = values - values.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    ordered = shifted.masked_fill(~valid, torch.inf).sort(-1).values
    num_valid = valid.sum(-1, keepdim=True)
    lower, upper = (_quantile(ordered, num_valid, at) for at in (0.25, 0.75))
    margin = OUTLIER_IQRS * (upper - lower)
    usual = valid & (shifted >= lower - margin) & (shifted <= upper + margin)
    count = usual.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(usual, shifted, 0.0).sum(-1, keepdim=True) / count
    deviations = shifted - mean
    std = (torch.where(usual, deviations, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    return deviations / torch.where(std < MIN_PERPLEXITY_STD, 1.0, std)


def _quantile(ordered: Tensor, count: Tensor, at: float) -> Tensor:
    """Linearly interpolated quantile of each row's first count [..., 1] values."""
    rank = at * (count - 1).clamp(min=0)
    below = ordered.gather(-1, rank.floor().long())
    above = ordered.gather(-1, rank.ceil().long())
    return below + (above - below) * rank.frac()
