"""From the rewards of a group to the advantage of each completion.

The last axis is the group: [num_groups, group_size], or [group_size] for one group. Sums run
in float64 on rewards shifted by the group's largest, so a group of equal rewards has a
deviation of exactly 0; with the plain float32 mean, 64 rewards of 0.9 get 0.056. `whiten` knows
no groups: it runs over the whole batch, and is as exact.
"""

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

STD_EPSILON = 1e-6
VARIANCE_EPSILON = 1e-8


def group_relative(rewards: Tensor, *, normalise_std: bool, valid: Tensor | None = None) -> Tensor:
    """Reward relative to its group, in units of the group's standard deviation.

        A_i = (r_i - mean) / (std + 1e-6)        std unbiased, as torch.std

    GRPO (https://arxiv.org/abs/2402.03300). Without the division it is Dr. GRPO's form
    (https://arxiv.org/abs/2503.20783). A group_size of 1 has mean 0 and std 1: the advantage is the
    reward (over 1 + 1e-6 if normalised).

    Args:
        rewards: [num_groups, group_size] or [group_size].
        normalise_std: divide by std + 1e-6.
        valid: bool, same shape; False where the verifier's outcome was an error. Such a
            completion counts in no mean or std and gets 0, whatever its reward holds (NaN
            too). A completion that is left alone in its group has nothing to be compared
            with and gets 0.
    Returns:
        Advantages with the shape and dtype of rewards (float32 for integer rewards).
    Raises:
        ValueError: the shapes disagree, a group is empty, or a valid reward is not finite.
    """
    deviations, num_valid = _deviations(rewards, valid)
    if normalise_std:
        if rewards.shape[-1] == 1:
            std = torch.ones_like(deviations)
        else:
            degrees = (num_valid - 1).clamp(min=1)
            std = (deviations.square().sum(-1, keepdim=True) / degrees).sqrt()
        deviations = deviations / (std + STD_EPSILON)
    return deviations.to(_result_dtype(rewards))


def leave_one_out(rewards: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Reward minus the mean reward of the group's other completions.

        A_i = r_i - mean over j != i of r_j = (r_i - mean) * n / (n - 1)

    RLOO (https://arxiv.org/abs/2402.14740). A group_size of 1 has baseline 0.

    Args:
        rewards: [num_groups, group_size] or [group_size].
        valid: as in group_relative; n counts valid completions only.
    Raises:
        ValueError: as in group_relative.
    """
    deviations, num_valid = _deviations(rewards, valid)
    scale = num_valid / (num_valid - 1).clamp(min=1)
    return (deviations * scale).to(_result_dtype(rewards))


def length_weighted(rewards: Tensor, lengths: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Reward minus the group's mean reward per token.

        A_i = r_i - (sum over j of l_j r_j) / (sum over j of l_j)

    OPO (https://arxiv.org/abs/2505.23585): the baseline of least gradient variance where a
    completion's squared gradient grows with its length l. A group_size of 1 has baseline 0.

    Args:
        rewards: [num_groups, group_size] or [group_size].
        lengths: same shape; tokens sampled for each completion, above 0.
        valid: as in group_relative; the length of a completion that is not valid is not read.
    Raises:
        ValueError: as in group_relative, or a valid completion's length is not above 0.
    """
    check_same_shape(rewards=rewards, lengths=lengths)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    check_same_shape(rewards=rewards, valid=valid)
    lengths = torch.where(valid, lengths.double(), 1.0)
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise ValueError(
            "a length is not finite and above 0; mark a completion of no token as not valid"
        )
    deviations, _ = _deviations(rewards, valid, weights=lengths)
    return deviations.to(_result_dtype(rewards))


def whiten(values: Tensor, weights: Tensor) -> Tensor:
    """Values in units of their standard deviation over the tokens of the batch.

        A_i = (v_i - mean) / sqrt(var + 1e-8)
        mean = sum of w v / n,    var = sum of w (v - mean)^2 / (n - 1),    n = sum of w

    REINFORCE++ (https://arxiv.org/abs/2501.03262): v is the reward (in its variant with a
    baseline, the reward relative to its group) and w the number of tokens, so that the tokens
    of the batch have mean 0 and variance 1. Among other groups, a group of equal rewards then
    does not keep an advantage of 0: it gets the batch's mean subtracted like the rest.

    Args:
        values: [N], one per completion of the whole batch, from every rank.
        weights: [N], the completion's number of tokens, at least 0. A completion of weight 0
            counts in no mean or variance and gets 0, whatever its value holds (NaN too).
    Returns:
        [N], dtype of values (float32 for integers). Exactly 0 where all values are equal, and
        where the weights add up to one token or none.
    Raises:
        ValueError: the shapes disagree, a weight is negative or not finite, or a value of
            positive weight is not finite.
    """
    check_same_shape(values=values, weights=weights)
    weights = weights.double()
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("a weight is a number of tokens: finite and at least 0")
    counted = weights > 0
    wide = torch.where(counted, values.double(), 0.0)
    if not bool(wide.isfinite().all()):
        raise ValueError("a value is not finite; give its completion weight 0 instead")
    num_tokens = weights.sum()
    if num_tokens <= 1:
        return torch.zeros_like(wide).to(_result_dtype(values))
    shifted = torch.where(counted, wide - wide[counted].amax(), 0.0)
    deviations = shifted - (weights * shifted).sum() / num_tokens
    variance = (weights * deviations.square()).sum() / (num_tokens - 1)
    whitened = deviations / (variance + VARIANCE_EPSILON).sqrt()
    return torch.where(counted, whitened, 0.0).to(_result_dtype(values))


def _deviations(
    rewards: Tensor, valid: Tensor | None, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float64 r - (weighted) mean over the valid ones (0 elsewhere), and their number [..., 1]."""
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"a group needs a completion, got rewards of shape {tuple(rewards.shape)}")
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    check_same_shape(rewards=rewards, valid=valid)
    valid = valid.bool()
    values = torch.where(valid, rewards.double(), 0.0)
    if not bool(values.isfinite().all()):
        raise ValueError("a reward is not finite; mark its completion as not valid instead")
    num_valid = valid.sum(-1, keepdim=True, dtype=torch.float64)
    if rewards.shape[-1] == 1:
        return values, num_valid
    largest = values.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    shifted = torch.where(valid, values - largest, 0.0)
    weights = valid.double() if weights is None else torch.where(valid, weights, 0.0)
    # 0 / 0 in a group without a valid completion, of which nothing is kept.
    mean = (weights * shifted).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return torch.where(valid, shifted - mean, 0.0), num_valid


def _result_dtype(rewards: Tensor) -> torch.dtype:
    return rewards.dtype if rewards.is_floating_point() else torch.float32
