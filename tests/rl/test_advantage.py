import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.advantage import group_relative, leave_one_out


def slow_group_relative(rewards: list[float]) -> list[float]:
    """GRPO as in the paper, one group."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def slow_leave_one_out(rewards: list[float]) -> list[float]:
    """RLOO as in the paper, one group."""
    return [
        r - math.fsum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1)
        for i, r in enumerate(rewards)
    ]


groups = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12)


@given(groups)
@settings(max_examples=50, deadline=None)
def test_the_vectorised_forms_equal_the_slow_loops(rewards: list[float]) -> None:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    # An equal-reward group is exact here and only nearly so in the loop: its own test is below.
    if len(set(rewards)) > 1:
        expected = torch.tensor(slow_group_relative(rewards), dtype=torch.float64)
        torch.testing.assert_close(
            group_relative(tensor, normalise_std=True), expected, rtol=1e-6, atol=1e-6
        )
    expected = torch.tensor(slow_leave_one_out(rewards), dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(tensor), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("num_correct", "group_size", "if_correct", "if_wrong"),
    [
        (1, 8, 2.474867, -0.353552),
        (4, 8, 0.935413, -0.935413),
        (7, 8, 0.353552, -2.474867),
        (1, 16, 3.749985, -0.249999),
    ],
)
def test_binary_rewards_give_the_golden_extremes(
    num_correct: int, group_size: int, if_correct: float, if_wrong: float
) -> None:
    rewards = torch.zeros(group_size)
    rewards[:num_correct] = 1
    advantages = group_relative(rewards, normalise_std=True)
    assert advantages[0].item() == pytest.approx(if_correct, abs=1e-6)
    assert advantages[-1].item() == pytest.approx(if_wrong, abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1.0, -3.3, 1e7])
@pytest.mark.parametrize("group_size", [2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(
    reward: float, group_size: int, dtype: torch.dtype
) -> None:
    rewards = torch.full((3, group_size), reward, dtype=dtype)
    assert (group_relative(rewards, normalise_std=True) == 0).all()
    assert (group_relative(rewards, normalise_std=False) == 0).all()
    assert (leave_one_out(rewards) == 0).all()


def test_without_normalisation_the_advantage_is_the_reward_minus_the_mean() -> None:
    advantages = group_relative(torch.tensor([1.0, 0.0, 0.0, 0.0]), normalise_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [100.0, 0.0, 3.0]])
    together = group_relative(rewards, normalise_std=True)
    apart = torch.stack([group_relative(row, normalise_std=True) for row in rewards])
    assert torch.equal(together, apart)


def test_a_group_of_one_has_mean_zero_and_std_one() -> None:
    rewards = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    assert torch.equal(group_relative(rewards, normalise_std=True), rewards / (1 + 1e-6))
    assert torch.equal(group_relative(rewards, normalise_std=False), rewards)
    assert torch.equal(leave_one_out(rewards), rewards)


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan, -math.inf])
def test_a_failed_verification_counts_in_no_mean_and_gets_zero(garbage: float) -> None:
    rewards = torch.tensor([1.0, garbage, 0.0, 0.25])
    valid = torch.tensor([True, False, True, True])
    forms: list[Callable[[Tensor, Tensor | None], Tensor]] = [
        lambda r, v: group_relative(r, normalise_std=True, valid=v),
        lambda r, v: leave_one_out(r, valid=v),
    ]
    for form in forms:
        advantages = form(rewards, valid)
        assert advantages[1] == 0
        assert torch.equal(advantages[valid], form(rewards[valid], None))


@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_completion_without_a_valid_companion_gets_zero(num_valid: int) -> None:
    valid = torch.arange(4) < num_valid
    rewards = torch.ones(4)
    assert (group_relative(rewards, normalise_std=True, valid=valid) == 0).all()
    assert (leave_one_out(rewards, valid=valid) == 0).all()


@given(groups, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_permuting_a_group_permutes_its_advantages(rewards: list[float], random: Random) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    tensor = torch.tensor(rewards)
    for form in (lambda r: group_relative(r, normalise_std=True), leave_one_out):
        torch.testing.assert_close(form(tensor[order]), form(tensor)[order], rtol=1e-5, atol=1e-6)


@given(groups)
@settings(max_examples=50, deadline=None)
def test_no_advantage_exceeds_the_bound_of_its_group_size(rewards: list[float]) -> None:
    size = len(rewards)
    advantages = group_relative(torch.tensor(rewards), normalise_std=True)
    assert advantages.abs().max() <= (1 - 1 / size) * math.sqrt(size) + 1e-5


def test_integer_rewards_give_float32_and_float64_stays() -> None:
    assert group_relative(torch.tensor([0, 1]), normalise_std=True).dtype == torch.float32
    assert leave_one_out(torch.tensor([0.0, 1.0], dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("rewards", "valid", "message"),
    [
        (torch.tensor([1.0, math.nan]), None, "not finite"),
        (torch.zeros(2, 0), None, "needs a completion"),
        (torch.tensor(1.0), None, "needs a completion"),
        (torch.zeros(4), torch.ones(3, dtype=torch.bool), "one shape"),
    ],
)
def test_unusable_rewards_are_refused(rewards: Tensor, valid: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_relative(rewards, normalise_std=True, valid=valid)
    with pytest.raises(ValueError, match=message):
        leave_one_out(rewards, valid=valid)
