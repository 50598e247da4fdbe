"""Rewards become advantages: every estimator, the penalty for length, the shaping."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.learner.advantages import ESTIMATORS, estimate_advantages, shape_advantages
from services.learner.batch import Batch, build_batch
from shared.config import RunConfig
from shared.records import Outcome, ScoredGroup
from tests.learner.fakes import run_config, scored_group

WITHIN_GROUPS = ("grpo", "rloo", "opo")
Judged = list[tuple[float, int]]
"""Reward and length of the usable completions of a group."""


def config_of(estimator: str, **advantage: Any) -> RunConfig:
    return run_config(
        advantage={"estimator": estimator, **advantage}, rollout={"max_completion_tokens": 16}
    )


def build(groups: Sequence[ScoredGroup], config: RunConfig) -> Batch:
    return build_batch(groups, config, policy_version=0)


def advantages_of(batch: Batch) -> list[float]:
    return [row.advantage for row in batch.rows]


def slow_grpo(groups: list[Judged], *, normalise: bool = True) -> list[float]:
    result = []
    for group in groups:
        rewards = [reward for reward, _ in group]
        mean = sum(rewards) / len(rewards)
        std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        result += [(r - mean) / (std + 1e-6 if normalise else 1.0) for r in rewards]
    return result


def slow_rloo(groups: list[Judged]) -> list[float]:
    result = []
    for group in groups:
        for place, (reward, _) in enumerate(group):
            others = [r for other, (r, _) in enumerate(group) if other != place]
            result.append(reward - sum(others) / len(others) if others else 0.0)
    return result


def slow_opo(groups: list[Judged]) -> list[float]:
    result = []
    for group in groups:
        baseline = sum(length * r for r, length in group) / sum(length for _, length in group)
        result += [reward - baseline for reward, _ in group]
    return result


def slow_whitened(groups: list[Judged], *, baseline: bool) -> list[float]:
    values, lengths = [], []
    for group in groups:
        mean = sum(reward for reward, _ in group) / len(group)
        values += [reward - (mean if baseline else 0.0) for reward, _ in group]
        lengths += [length for _, length in group]
    per_token = [v for v, length in zip(values, lengths, strict=True) for _ in range(length)]
    mean, variance = statistics.fmean(per_token), statistics.variance(per_token)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


SLOW: dict[str, Callable[[list[Judged]], list[float]]] = {
    "grpo": slow_grpo,
    "rloo": slow_rloo,
    "opo": slow_opo,
    "reinforce_plus_plus": lambda groups: slow_whitened(groups, baseline=False),
    "reinforce_plus_plus_baseline": lambda groups: slow_whitened(groups, baseline=True),
}

MIXED = [
    scored_group(
        0,
        [Outcome.PASS, Outcome.ERROR, Outcome.FAIL, Outcome.FAIL],
        lengths=[3, 9, 5, 1],
        rewards=[1.0, 0.0, 0.25, 0.0],
    ),
    scored_group(1, [Outcome.PASS] * 3, lengths=[2, 4, 6], rewards=[0.9] * 3),
    scored_group(
        2,
        [Outcome.PASS, Outcome.PASS, Outcome.FAIL],
        lengths=[7, 2, 4],
        rewards=[1.0, math.nan, 0.0],
    ),
]
MIXED_JUDGED: list[Judged] = [
    [(1.0, 3), (0.25, 5), (0.0, 1)],
    [(0.9, 2), (0.9, 4), (0.9, 6)],
    [(1.0, 7), (0.0, 4)],
]


def test_every_estimator_is_tested_here() -> None:
    assert SLOW.keys() == ESTIMATORS.keys()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_gives_a_batch_its_slow_loop(estimator: str) -> None:
    batch = build(MIXED, config_of(estimator))
    expected = SLOW[estimator](MIXED_JUDGED)
    assert advantages_of(batch) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert any(abs(each) > 0.1 for each in expected)
    for row, line, kept in zip(batch.rows, batch.advantages, batch.mask, strict=True):
        torch.testing.assert_close(line, row.advantage * kept.float())


def test_without_the_deviation_grpo_is_dr_grpo() -> None:
    batch = build(MIXED, config_of("grpo", normalise_std=False))
    expected = slow_grpo(MIXED_JUDGED, normalise=False)
    assert advantages_of(batch) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("estimator", WITHIN_GROUPS)
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(estimator: str) -> None:
    same = scored_group(0, [Outcome.FAIL] * 64, lengths=[*range(1, 17)] * 4, rewards=[0.9] * 64)
    assert advantages_of(build([same, *MIXED], config_of(estimator)))[:64] == [0.0] * 64


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_a_batch_of_equal_rewards_has_advantages_of_exactly_0(estimator: str) -> None:
    same = [scored_group(i, [Outcome.FAIL] * 8, rewards=[0.9] * 8) for i in range(3)]
    assert advantages_of(build(same, config_of(estimator))) == [0.0] * 24


def test_groups_of_equal_rewards_each_at_another_level_teach_nothing_with_a_baseline() -> None:
    levels = [scored_group(i, [Outcome.FAIL] * 4, rewards=[i / 7] * 4) for i in range(3)]
    baseline = build(levels, config_of("reinforce_plus_plus_baseline"))
    assert advantages_of(baseline) == [0.0] * 12
    assert advantages_of(build(levels, config_of("reinforce_plus_plus")))[0] < -1


outcomes = st.lists(st.sampled_from(list(Outcome)), min_size=1, max_size=5)


@given(st.sampled_from(list(ESTIMATORS)), st.lists(outcomes, min_size=1, max_size=4))
def test_completions_without_a_verdict_are_left_out_and_move_no_other(
    estimator: str, judged: list[list[Outcome]]
) -> None:
    config = config_of(estimator)
    mixed, clean = [], []
    for index, each in enumerate(judged):
        # A group of one completion is compared with nothing; two groups must not differ in that.
        each = [Outcome.PASS, Outcome.FAIL, *each]
        mixed.append(scored_group(index, each))
        clean.append(scored_group(index, [one for one in each if one.is_verdict]))
    found = advantages_of(build(mixed, config))
    assert found == pytest.approx(advantages_of(build(clean, config)), rel=1e-9, abs=1e-12)
    whole = estimate_advantages(mixed, config.advantage, max_completion_tokens=16)
    for group, values in zip(mixed, whole, strict=True):
        for score, value in zip(group.scores, values, strict=True):
            assert score.is_usable or value == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_a_verdict_has_no_advantage(estimator: str) -> None:
    group = scored_group(0, [Outcome.ERROR, Outcome.TIMEOUT])
    config = config_of(estimator).advantage
    assert estimate_advantages([group], config, max_completion_tokens=16) == [[0.0, 0.0]]
    assert estimate_advantages([], config, max_completion_tokens=16) == []


def test_the_overlong_penalty_lowers_the_reward_of_long_completions_alone() -> None:
    lengths = [4, 12, 14, 16]
    group = scored_group(0, [Outcome.PASS] * 4, lengths=lengths)
    plain = build([group], config_of("rloo"))
    made = build([group], config_of("rloo", overlong_buffer_len=4, overlong_penalty_factor=0.5))
    assert advantages_of(plain) == [0.0] * 4
    penalised = [(1.0, 4), (1.0, 12), (0.75, 14), (0.5, 16)]
    assert advantages_of(made) == pytest.approx(slow_rloo([penalised]))
    # What the verifier said is what is reported.
    assert [row.reward for row in made.rows] == [1.0] * 4


def test_the_overlong_penalty_reaches_no_completion_below_the_buffer() -> None:
    group = scored_group(0, [Outcome.PASS, Outcome.FAIL, Outcome.FAIL], lengths=[12, 3, 7])
    assert advantages_of(build([group], config_of("grpo", overlong_buffer_len=4))) == advantages_of(
        build([group], config_of("grpo"))
    )


def shaped(batch: Batch, config: RunConfig, logprobs: torch.Tensor) -> torch.Tensor:
    return shape_advantages(
        batch.advantages,
        batch.mask,
        logprobs,
        [row.group for row in batch.rows],
        config=config.advantage,
    )


def test_without_shaping_the_advantages_are_what_they_were() -> None:
    config = config_of("grpo")
    batch = build(MIXED, config)
    assert shaped(batch, config, torch.zeros(batch.mask.shape)) is batch.advantages


def test_perplexity_shaping_weighs_the_likely_completions_of_each_group_more() -> None:
    config = config_of("grpo", ppl_alpha=0.05)
    batch = build(MIXED, config)
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(batch.mask.shape, generator=generator) * 3
    found = shaped(batch, config, logprobs.masked_fill(~batch.mask, math.nan))
    expected = torch.zeros_like(batch.advantages)
    for group in range(len(MIXED)):
        rows = [place for place, row in enumerate(batch.rows) if row.group == group]
        perplexities = [-float(logprobs[row][batch.mask[row]].mean()) for row in rows]
        mean, std = statistics.fmean(perplexities), statistics.pstdev(perplexities)
        for row, value in zip(rows, perplexities, strict=True):
            factor = min(max(1 - 0.05 * (value - mean) / std, 0.8), 1.2)
            expected[row] = batch.advantages[row] * factor
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, batch.advantages, rtol=1e-3)


def test_position_shaping_makes_the_end_of_a_completion_count_more() -> None:
    config = config_of("grpo", position_gamma=0.1, position_steepness=15.0)
    batch = build(MIXED, config)
    found = shaped(batch, config, torch.zeros(batch.mask.shape))
    for row, line in zip(batch.rows, found.tolist(), strict=True):
        length = row.num_completion_tokens
        size = abs(row.advantage)
        for place in range(length):
            bonus = 0.1 / (1 + math.exp(-15 * (place / length - 0.5)))
            expected = math.copysign(size + min(bonus, size / 2), row.advantage)
            assert line[place] == pytest.approx(expected if size else 0.0, rel=1e-5)
        assert line[length:] == [0.0] * (len(line) - length)


def test_both_shapings_multiply_first_and_add_then() -> None:
    both = config_of("grpo", ppl_alpha=0.05, position_gamma=0.1)
    batch = build(MIXED, both)
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(batch.mask.shape, generator=generator)
    scaled = shaped(batch, config_of("grpo", ppl_alpha=0.05), logprobs)
    groups = [row.group for row in batch.rows]
    expected = shape_advantages(
        scaled,
        batch.mask,
        logprobs,
        groups,
        config=config_of("grpo", position_gamma=0.1).advantage,
    )
    torch.testing.assert_close(shaped(batch, both, logprobs), expected)
