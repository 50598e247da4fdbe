"""Which tokens drive the entropy down, and which of them to hold back.

Covariances, masks and keys have one shape: [B, T], or a flat [N] of the tokens gathered from
all ranks. Given keys, a selection depends on the set of tokens and on nothing else: not on
their order, the micro-batches or the ranks. To select over ranks, gather (covariance, mask,
keys), call the same function on the whole, and keep your own part of the answer.

Nothing here carries a gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

BOUND_TOLERANCE = 1e-6
"""A covariance this near to a bound lies on it, and so outside the open window. Without it,
rounding of the means (another number of ranks) would move a token across the bound."""

TOP_PERCENTS = (0.02, 0.2, 2.0, 20.0, 50.0, 100.0)
PERCENTILES = (50.0, 90.0, 99.0, 99.8, 100.0)


class CovariancePercentiles(NamedTuple):
    """How heavy the tail is. Both map a percentage to a covariance; NaN for an empty mask."""

    top_means: dict[float, float]
    """Mean over the top p percent of the tokens (at least one), p in TOP_PERCENTS."""
    percentiles: dict[float, float]
    """The p-th percentile, linearly interpolated, p in PERCENTILES."""


def token_covariance(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    mean_logprob: float | Tensor | None = None,
    mean_advantage: float | Tensor | None = None,
) -> Tensor:
    """Each token's term of the covariance of log-probability and advantage.

        Cov_i = (logp_i - mean of logp) * (A_i - mean of A)

    Eq. 10 of https://arxiv.org/abs/2505.22617; the means run over all tokens in mask, and the
    mean of Cov_i over them is the population covariance.

    Args:
        logprobs: [B, T] under the policy being trained, never under the sampling engine.
        mean_logprob, mean_advantage: the means over the whole mini-batch, where it is spread
            over ranks or micro-batches; by default those of the tokens given.
    Returns:
        Same shape, float32 or wider, 0 outside mask whatever the inputs hold there.
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(logprobs=logprobs, advantages=advantages, mask=mask)
    mask = mask.bool()
    # In float64, so that the sum's order (ranks, micro-batches) is not seen in float32 results.
    logprob = torch.where(mask, logprobs.detach().double(), 0.0)
    advantage = torch.where(mask, advantages.detach().double(), 0.0)
    count = mask.sum().clamp(min=1)
    mean_logprob = logprob.sum() / count if mean_logprob is None else mean_logprob
    mean_advantage = advantage.sum() / count if mean_advantage is None else mean_advantage
    covariance = (logprob - mean_logprob) * (advantage - mean_advantage)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return torch.where(mask, covariance, 0.0).to(dtype)


def select_clip_cov(
    covariance: Tensor,
    mask: Tensor,
    *,
    ratio: float,
    lower: float,
    upper: float,
    excluded: Tensor | None = None,
    keys: Tensor | None = None,
    floor_one: bool = True,
) -> Tensor:
    """A uniform draw of floor(ratio * N) tokens with lower < Cov < upper.

    Eq. 11 of https://arxiv.org/abs/2505.22617; the window is open, as in the reference code. N is
    the number of tokens in mask. Drawn are the candidates with the smallest keys, without
    replacement; all of them where they are fewer than the quota.

    Args:
        covariance: from token_covariance, over the whole mini-batch.
        ratio: fraction of the tokens in mask, in [0, 1]; the paper's is 2e-4.
        excluded: bool, never drawn, though counted in N: the tokens of `ppo_clipped`.
        keys: uniform, from `token_keys`. Without them the key is a fixed hash of the position
            in the flattened tensor: the same call draws the same tokens, but the draw depends
            on the layout and repeats from step to step.
        floor_one: draw one token where floor(ratio * N) is 0, as the reference does.
    Returns:
        bool, same shape, within mask.
    Raises:
        ValueError: the shapes disagree, ratio is outside [0, 1], or lower > upper.
    """
    if not lower <= upper:
        raise ValueError(f"the window is empty: lower {lower} is above upper {upper}")
    mask = mask.bool()
    inside = (covariance > lower + BOUND_TOLERANCE) & (covariance < upper - BOUND_TOLERANCE)
    check_same_shape(covariance=covariance, mask=mask)
    candidates = mask & inside
    if excluded is not None:
        check_same_shape(covariance=covariance, excluded=excluded)
        candidates = candidates & ~excluded.bool()
    if keys is None:
        positions = torch.arange(covariance.numel(), device=covariance.device)
        keys = token_keys(0, 0, 0, torch.zeros_like(positions), positions).view(covariance.shape)
    check_same_shape(covariance=covariance, keys=keys)
    indices = candidates.flatten().nonzero().squeeze(-1)
    order = keys.flatten()[indices].argsort(stable=True)
    quota = _quota(mask, ratio=ratio, floor_one=floor_one)
    return _mask_at(indices[order[:quota]], covariance.shape)


def select_kl_cov(
    covariance: Tensor,
    mask: Tensor,
    *,
    ratio: float,
    floor_one: bool = True,
    keys: Tensor | None = None,
) -> Tensor:
    """The floor(ratio * N) tokens with the largest covariance, whatever its sign.

    Eq. 13 of https://arxiv.org/abs/2505.22617. Of equal covariances, which are common (a constant
    advantage makes all of them 0), those with the smaller key go first; without keys, those
    that come first in the flattened tensor.

    Args:
        covariance: from token_covariance, over the whole mini-batch.
        ratio: fraction of the tokens in mask, in [0, 1]; the paper's are 2e-3 and 2e-4.
        floor_one: select one token where floor(ratio * N) is 0, as the reference does.
        keys: from `token_keys`.
    Returns:
        bool, same shape, within mask.
    Raises:
        ValueError: the shapes disagree, or ratio is outside [0, 1].
    """
    check_same_shape(covariance=covariance, mask=mask)
    mask = mask.bool()
    indices = mask.flatten().nonzero().squeeze(-1)
    if keys is not None:
        check_same_shape(covariance=covariance, keys=keys)
        indices = indices[keys.flatten()[indices].argsort(stable=True)]
    order = covariance.detach().flatten()[indices].argsort(descending=True, stable=True)
    quota = _quota(mask, ratio=ratio, floor_one=floor_one)
    return _mask_at(indices[order[:quota]], covariance.shape)


def token_keys(
    seed: int, step: int, minibatch: int, uid_hashes: Tensor, positions: Tensor
) -> Tensor:
    """A uniform 63-bit integer for each token, from what the token is.

    splitmix64 (https://doi.org/10.1145/2660193.2660195) absorbs the five words in turn. The key
    of a token does not depend on its place in the batch, its rank or any random state, so a
    draw by keys survives re-batching and resume; each step and mini-batch is a new draw.

    Args:
        uid_hashes: int64, one value per completion: group uid and index in the group together.
        positions: int64, the token's index in its completion; broadcasts with uid_hashes.
    Returns:
        int64 in [0, 2**63), of the broadcast shape.
    Raises:
        ValueError: uid_hashes or positions is not int64.
    """
    if uid_hashes.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(
            f"keys need int64, got {uid_hashes.dtype} uid_hashes and {positions.dtype} positions"
        )
    state = torch.zeros_like(uid_hashes)
    for word in (seed, step, minibatch):
        state = _splitmix64(state ^ _signed64(word))
    state = _splitmix64(state ^ uid_hashes)
    return _shift_right(_splitmix64(state ^ positions), 1)


def covariance_percentiles(covariance: Tensor, mask: Tensor) -> CovariancePercentiles:
    """The upper tail of the covariance, as means of the top p percent and as percentiles.

    The layout of Table 1 of https://arxiv.org/abs/2505.22617.

    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(covariance=covariance, mask=mask)
    values = covariance.detach().double()[mask.bool()].sort(descending=True).values
    count = values.numel()
    if count == 0:
        return CovariancePercentiles(
            dict.fromkeys(TOP_PERCENTS, math.nan), dict.fromkeys(PERCENTILES, math.nan)
        )
    top_means = {
        percent: float(values[: max(1, _floor(percent / 100, count))].mean())
        for percent in TOP_PERCENTS
    }
    percentiles = {}
    for percent in PERCENTILES:
        from_top = (1 - percent / 100) * (count - 1)
        above, below = values[math.floor(from_top)], values[math.ceil(from_top)]
        percentiles[percent] = float(above + (below - above) * (from_top % 1))
    return CovariancePercentiles(top_means, percentiles)


def _quota(mask: Tensor, *, ratio: float, floor_one: bool) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is a fraction of the tokens, in [0, 1], got {ratio}")
    quota = _floor(ratio, int(mask.sum()))
    return max(quota, 1) if floor_one else quota


def _floor(ratio: float, count: int) -> int:
    # In floats 0.29 * 100 lies just below 29.
    return math.floor(ratio * count + 1e-9)


def _mask_at(indices: Tensor, shape: torch.Size) -> Tensor:
    chosen = torch.zeros(shape.numel(), dtype=torch.bool, device=indices.device)
    chosen[indices] = True
    return chosen.view(shape)


def _splitmix64(state: Tensor) -> Tensor:
    # In place from here on: of a batch's tokens a copy is tens of megabytes.
    state = state + _signed64(0x9E3779B97F4A7C15)
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_signed64(0xBF58476D1CE4E5B9))
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_signed64(0x94D049BB133111EB))
    return state.bitwise_xor_(_shift_right(state, 31))


def _shift_right(state: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask removes the copies of the sign bit.
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed64(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
