"""From a batch of scored groups to an advantage for each completion, then for each token.

1. Reward: the score, less a penalty where the completion came near its length limit.
2. Estimator: relative to its group, over the batch, or both.
3. Shaping, once the learner has measured log-probs: by perplexity, by position.

A completion without a verdict counts in no mean and has the advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shared.config.algorithm import AdvantageConfig
from shared.records import ScoredGroup
from shared.rl.advantage import group_relative, leave_one_out, length_weighted, whiten
from shared.rl.shaping import overlong_penalty, perplexity_factors, position_shaped


class GroupRewards(NamedTuple):
    """A group's completions, [group_size] each; `lengths` in tokens."""

    rewards: Tensor
    lengths: Tensor
    valid: Tensor


Estimator = Callable[[AdvantageConfig, Sequence[GroupRewards]], list[Tensor]]


def estimate_advantages(
    groups: Sequence[ScoredGroup], config: AdvantageConfig, *, max_completion_tokens: int
) -> list[list[float]]:
    """The advantage of every completion of every group, 0 for those that are not usable."""
    if not groups:
        return []
    rewards = [
        _group_rewards(group, config, max_completion_tokens=max_completion_tokens)
        for group in groups
    ]
    return [each.tolist() for each in ESTIMATORS[config.estimator](config, rewards)]


def shape_advantages(
    advantages: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    groups: Sequence[int],
    *,
    config: AdvantageConfig,
) -> Tensor:
    """Advantages per token with the run file's shaping; [R, C] all, unchanged without any.

    Args:
        logprobs: of the learner's weights at the batch's start.
        groups: of each row, the number of its group.
    """
    if config.ppl_alpha > 0:
        lengths = mask.sum(-1).clamp(min=1)
        means = torch.where(mask, logprobs, 0.0).sum(-1) / lengths
        of_group = torch.tensor(groups, device=mask.device)
        factors = torch.ones_like(means)
        for group in set(groups):
            rows = of_group == group
            factors[rows] = perplexity_factors(means[rows], alpha=config.ppl_alpha)
        advantages = advantages * factors.unsqueeze(-1)
    if config.position_gamma > 0:
        advantages = position_shaped(
            advantages, mask, gamma=config.position_gamma, steepness=config.position_steepness
        )
    return advantages


def _group_rewards(
    group: ScoredGroup, config: AdvantageConfig, *, max_completion_tokens: int
) -> GroupRewards:
    lengths = [len(completion.token_ids) for completion in group.rollout.completions]
    penalties = [0.0] * len(lengths)
    if config.overlong_buffer_len > 0:
        penalties = [
            overlong_penalty(
                length,
                max_tokens=max_completion_tokens,
                buffer_tokens=config.overlong_buffer_len,
                factor=config.overlong_penalty_factor,
            )
            for length in lengths
        ]
    rewards = [
        score.reward + penalty for score, penalty in zip(group.scores, penalties, strict=True)
    ]
    return GroupRewards(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(lengths, dtype=torch.float64),
        torch.tensor([score.is_usable for score in group.scores]),
    )


def _group_relative(config: AdvantageConfig, group: GroupRewards) -> Tensor:
    return group_relative(group.rewards, normalise_std=config.normalise_std, valid=group.valid)


def _centred(_: AdvantageConfig, group: GroupRewards) -> Tensor:
    return group_relative(group.rewards, normalise_std=False, valid=group.valid)


def _leave_one_out(_: AdvantageConfig, group: GroupRewards) -> Tensor:
    return leave_one_out(group.rewards, valid=group.valid)


def _length_weighted(_: AdvantageConfig, group: GroupRewards) -> Tensor:
    return length_weighted(group.rewards, group.lengths, valid=group.valid)


def _by_group(
    estimate: Callable[[AdvantageConfig, GroupRewards], Tensor],
    config: AdvantageConfig,
    groups: Sequence[GroupRewards],
) -> list[Tensor]:
    return [estimate(config, group) for group in groups]


def _whitened(
    estimate: Callable[[AdvantageConfig, GroupRewards], Tensor],
    config: AdvantageConfig,
    groups: Sequence[GroupRewards],
) -> list[Tensor]:
    """In units of the standard deviation over all tokens of the batch."""
    values = torch.cat([estimate(config, group) for group in groups])
    weights = torch.cat([group.lengths * group.valid for group in groups])
    sizes = [len(group.rewards) for group in groups]
    return list(torch.split(whiten(values, weights), sizes))


ESTIMATORS: dict[str, Estimator] = {
    "grpo": partial(_by_group, _group_relative),
    "rloo": partial(_by_group, _leave_one_out),
    "opo": partial(_by_group, _length_weighted),
    "reinforce_plus_plus": partial(_whitened, lambda _, group: group.rewards),
    "reinforce_plus_plus_baseline": partial(_whitened, _centred),
}
