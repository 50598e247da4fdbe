import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.advantage import group_relative, leave_one_out, length_weighted, whiten


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


def slow_length_weighted(rewards: list[float], lengths: list[int]) -> list[float]:
    """OPO as in the paper, one group: the baseline is the mean over the group's tokens."""
    per_token = [r for r, length in zip(rewards, lengths, strict=True) for _ in range(length)]
    return [r - math.fsum(per_token) / len(per_token) for r in rewards]


def slow_whiten(values: list[float], weights: list[int]) -> list[float]:
    """verl's masked_whiten on a batch whose every token carries its completion's value."""
    per_token = [v for v, weight in zip(values, weights, strict=True) for _ in range(weight)]
    mean = math.fsum(per_token) / len(per_token)
    variance = math.fsum((v - mean) ** 2 for v in per_token) / (len(per_token) - 1)
    return [
        (v - mean) / math.sqrt(variance + 1e-8) if weight else 0.0
        for v, weight in zip(values, weights, strict=True)
    ]


groups = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12)
groups_with_lengths = st.lists(
    st.tuples(st.floats(-10, 10, width=32), st.integers(1, 50)), min_size=2, max_size=12
)


@given(groups)
@settings(max_examples=50)
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


@given(groups_with_lengths)
@settings(max_examples=50)
def test_the_length_weighted_form_equals_the_mean_over_the_tokens_of_the_group(
    group: list[tuple[float, int]],
) -> None:
    rewards, lengths = ([*column] for column in zip(*group, strict=True))
    actual = length_weighted(torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths))
    expected = slow_length_weighted(rewards, lengths)
    assert actual.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 50)), min_size=2, max_size=12)
)
@settings(max_examples=50)
def test_whitening_equals_the_slow_loop_over_the_tokens_of_the_batch(
    batch: list[tuple[float, int]],
) -> None:
    # Equal values are exact here and only nearly so in the loop: their own test is below.
    assume(len({value for value, weight in batch if weight > 0}) > 1)
    values, weights = ([*column] for column in zip(*batch, strict=True))
    actual = whiten(torch.tensor(values, dtype=torch.float64), torch.tensor(weights))
    assert actual.tolist() == pytest.approx(slow_whiten(values, weights), rel=1e-6, abs=1e-6)


def test_the_tokens_of_a_whitened_batch_have_mean_zero_and_unbiased_variance_one() -> None:
    lengths = torch.tensor([3, 10, 1, 7, 25])
    values = torch.tensor([1.0, 0.0, -4.0, 2.5, 0.5], dtype=torch.float64)
    per_token = whiten(values, lengths).repeat_interleave(lengths)
    assert per_token.mean().item() == pytest.approx(0, abs=1e-12)
    assert per_token.var().item() == pytest.approx(1, abs=1e-7)


def test_the_golden_baseline_is_the_mean_reward_of_a_token() -> None:
    # One token of reward 1 and three of reward 0: a quarter.
    advantages = length_weighted(torch.tensor([1.0, 0.0]), torch.tensor([1, 3]))
    assert advantages.tolist() == [0.75, -0.25]
    # The same four tokens have the unbiased variance 1/4 * 3/4 * 4/3 = 1/4.
    whitened = whiten(torch.tensor([1.0, 0.0]), torch.tensor([1, 3]))
    assert whitened.tolist() == pytest.approx([1.5, -0.5], rel=1e-6)


@given(groups, st.integers(1, 1000))
@settings(max_examples=50)
def test_completions_of_one_length_have_the_plain_mean_for_a_baseline(
    rewards: list[float], length: int
) -> None:
    tensor = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(
        length_weighted(tensor, torch.full_like(tensor, length)),
        group_relative(tensor, normalise_std=False),
        rtol=1e-12,
        atol=1e-12,
    )


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
    lengths = torch.arange(1, 3 * group_size + 1).view(3, group_size)
    assert (length_weighted(rewards, lengths) == 0).all()
    assert (whiten(rewards.flatten(), lengths.flatten()) == 0).all()
    assert (group_relative(rewards, normalise_std=True) == 0).all()
    assert (group_relative(rewards, normalise_std=False) == 0).all()
    assert (leave_one_out(rewards) == 0).all()


@given(
    reward=st.floats(-1e7, 1e7, width=32),
    lengths=st.lists(st.integers(1, 30_000), min_size=2, max_size=64),
)
@settings(max_examples=100)
def test_every_estimator_gives_exactly_zero_to_equal_rewards_of_any_size_and_length(
    reward: float, lengths: list[int]
) -> None:
    rewards, num_tokens = torch.full((len(lengths),), reward), torch.tensor(lengths)
    baselined = group_relative(rewards, normalise_std=False)
    for advantages in (
        group_relative(rewards, normalise_std=True),
        baselined,
        leave_one_out(rewards),
        length_weighted(rewards, num_tokens),
        whiten(rewards, num_tokens),
        whiten(baselined, num_tokens),
    ):
        assert advantages.dtype == torch.float32
        assert (advantages == 0).all()


@given(
    rewards=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=5),
    lengths=st.lists(st.integers(1, 30_000), min_size=8, max_size=8),
)
@settings(max_examples=50)
def test_groups_that_differ_only_from_each_other_whiten_to_exactly_zero_over_their_baselines(
    rewards: list[float], lengths: list[int]
) -> None:
    grouped = torch.tensor(rewards)[:, None].expand(-1, len(lengths))
    num_tokens = torch.tensor(lengths).expand(len(rewards), -1)
    baselined = group_relative(grouped, normalise_std=False)
    assert (whiten(baselined.flatten(), num_tokens.flatten()) == 0).all()
    assert (length_weighted(grouped, num_tokens) == 0).all()


def test_without_normalisation_the_advantage_is_the_reward_minus_the_mean() -> None:
    advantages = group_relative(torch.tensor([1.0, 0.0, 0.0, 0.0]), normalise_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [100.0, 0.0, 3.0]])
    together = group_relative(rewards, normalise_std=True)
    apart = torch.stack([group_relative(row, normalise_std=True) for row in rewards])
    assert torch.equal(together, apart)
    lengths = torch.tensor([[3, 1, 2], [5, 9, 1]])
    together = length_weighted(rewards, lengths)
    rows = zip(rewards, lengths, strict=True)
    assert torch.equal(together, torch.stack([length_weighted(*row) for row in rows]))


def test_a_group_of_one_has_mean_zero_and_std_one() -> None:
    rewards = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    assert torch.equal(group_relative(rewards, normalise_std=True), rewards / (1 + 1e-6))
    assert torch.equal(group_relative(rewards, normalise_std=False), rewards)
    assert torch.equal(leave_one_out(rewards), rewards)
    assert torch.equal(length_weighted(rewards, torch.tensor([[7], [2]])), rewards)


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
    lengths = torch.tensor([4, garbage, 2, 5])
    advantages = length_weighted(rewards, lengths, valid=valid)
    assert advantages[1] == 0
    assert torch.equal(advantages[valid], length_weighted(rewards[valid], lengths[valid]))


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan, -math.inf])
def test_a_completion_of_weight_zero_counts_in_no_mean_and_gets_zero(garbage: float) -> None:
    values, weights = torch.tensor([1.0, garbage, 0.0, 0.25]), torch.tensor([4, 0, 2, 5])
    counted = weights > 0
    whitened = whiten(values, weights)
    assert whitened[1] == 0
    assert torch.equal(whitened[counted], whiten(values[counted], weights[counted]))


@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 1, 0]])
def test_a_batch_of_one_token_or_none_is_whitened_to_zero(weights: list[int]) -> None:
    assert (whiten(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(weights)) == 0).all()


def test_whitening_an_empty_batch_gives_an_empty_batch() -> None:
    assert whiten(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_completion_without_a_valid_companion_gets_zero(num_valid: int) -> None:
    valid = torch.arange(4) < num_valid
    rewards = torch.ones(4)
    assert (group_relative(rewards, normalise_std=True, valid=valid) == 0).all()
    assert (leave_one_out(rewards, valid=valid) == 0).all()
    assert (length_weighted(rewards, rewards, valid=valid) == 0).all()


@given(groups, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_permuting_a_group_permutes_its_advantages(rewards: list[float], random: Random) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    tensor = torch.tensor(rewards)
    for form in (lambda r: group_relative(r, normalise_std=True), leave_one_out):
        torch.testing.assert_close(form(tensor[order]), form(tensor)[order], rtol=1e-5, atol=1e-6)
    lengths = torch.arange(1, len(rewards) + 1)
    for pair in (length_weighted, whiten):
        permuted = pair(tensor[order], lengths[order])
        torch.testing.assert_close(permuted, pair(tensor, lengths)[order], rtol=1e-5, atol=1e-6)


@given(groups)
@settings(max_examples=50)
def test_no_advantage_exceeds_the_bound_of_its_group_size(rewards: list[float]) -> None:
    size = len(rewards)
    advantages = group_relative(torch.tensor(rewards), normalise_std=True)
    assert advantages.abs().max() <= (1 - 1 / size) * math.sqrt(size) + 1e-5


def test_integer_rewards_give_float32_and_float64_stays() -> None:
    assert group_relative(torch.tensor([0, 1]), normalise_std=True).dtype == torch.float32
    assert leave_one_out(torch.tensor([0.0, 1.0], dtype=torch.float64)).dtype == torch.float64
    for form in (length_weighted, whiten):
        integers = torch.tensor([0, 1])
        assert form(integers, torch.tensor([2, 3])).dtype == torch.float32
        assert form(integers.double(), torch.tensor([2, 3])).dtype == torch.float64


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
    with pytest.raises(ValueError, match=message):
        length_weighted(rewards, torch.ones_like(rewards), valid=valid)


@pytest.mark.parametrize("length", [0.0, -1.0, math.nan, math.inf])
def test_a_valid_completion_has_a_length(length: float) -> None:
    with pytest.raises(ValueError, match="finite and above 0"):
        length_weighted(torch.tensor([0.0, 1.0]), torch.tensor([2.0, length]))
    with pytest.raises(ValueError, match="one shape"):
        length_weighted(torch.zeros(3), torch.ones(2))


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], "a value is not finite"),
        ([1.0, 0.0], [1.0, -1.0], "at least 0"),
        ([1.0, 0.0], [1.0, math.nan], "at least 0"),
        ([1.0, 0.0], [1.0, math.inf], "at least 0"),
        ([1.0, 0.0], [1.0], "one shape"),
    ],
)
def test_values_that_cannot_be_whitened_are_refused(
    values: list[float], weights: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(torch.tensor(values), torch.tensor(weights))
