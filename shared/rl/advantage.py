"""From the rewards of a group to the advantage of each completion.

The last axis is the group: [num_groups, group_size], or [group_size] for one group. Sums run
in float64 on rewards shifted by the group's largest, so a group of equal rewards has a
deviation of exactly 0; with the plain float32 mean, 64 rewards of 0.9 get 0.056.
"""

import torch
from torch import Tensor

from shared.rl.shapes import check_same_shape

STD_EPSILON = 1e-6


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


def _deviations(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 r - mean over the valid ones (0 elsewhere), and their number [..., 1]."""
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
    mean = shifted.sum(-1, keepdim=True) / num_valid.clamp(min=1)
    return torch.where(valid, shifted - mean, 0.0), num_valid


def _result_dtype(rewards: Tensor) -> torch.dtype:
    return rewards.dtype if rewards.is_floating_point() else torch.float32
