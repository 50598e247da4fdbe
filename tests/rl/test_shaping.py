import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.shaping import (
    entropy_ratio_kept,
    overlong_penalty,
    perplexity_factors,
    position_shaped,
    top_entropy_mask,
)

GARBAGE = [math.nan, math.inf, -math.inf, 1e9]


def tokens(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, 9, generator=generator, dtype=dtype)
    mask = torch.rand(5, 9, generator=generator) < 0.7
    mask[3] = False
    return values, mask


def linear_quantile(values: list[float], at: Fraction) -> Fraction:
    """In exact arithmetic."""
    ordered = sorted(map(Fraction, values))
    rank = at * (len(ordered) - 1)
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return below + (above - below) * (rank - math.floor(rank))


def slow_weights(mean_logprobs: list[float]) -> list[float]:
    """w of section 3.1, a group at a time, as in the release."""
    logs = [-x for x in mean_logprobs]
    lower, upper = (float(linear_quantile(logs, Fraction(q, 4))) for q in (1, 3))
    margin = 1.5 * (upper - lower)
    usual = [x for x in logs if lower - margin <= x <= upper + margin]
    mean = math.fsum(usual) / len(usual)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in usual) / len(usual))
    return [(x - mean) / (std if std >= 1e-6 else 1) for x in logs]


def slow_position_shaped(
    advantages: Tensor, mask: Tensor, gamma: float, steepness: float
) -> list[list[float]]:
    shaped = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    for i, row in enumerate(mask.tolist()):
        columns = [t for t, sampled in enumerate(row) if sampled]
        for t, column in enumerate(columns, start=1):
            a = float(advantages[i, column])
            rho = (t - 1) / len(columns)
            b = gamma / (1 + math.exp(-steepness * (rho - 0.5)))
            shaped[i][column] = a + (a > 0) * min(b, a / 2) - (a < 0) * min(b, -a / 2)
    return shaped


# Top-entropy mask


@given(
    st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40),
    st.integers(1, 100),
)
@settings(max_examples=200)
def test_the_selected_tokens_reach_the_interpolated_quantile_in_exact_arithmetic(
    entropies: list[float], percent: int
) -> None:
    threshold = linear_quantile(entropies, 1 - Fraction(percent, 100))
    selected = top_entropy_mask(
        torch.tensor(entropies), torch.ones(len(entropies)), quantile=percent / 100
    )
    assert selected.tolist() == [Fraction(x) >= threshold for x in entropies]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.25, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_selected_tokens_are_those_at_or_above_torchs_quantile(
    quantile: float, seed: int, dtype: torch.dtype
) -> None:
    entropy, mask = tokens(seed, dtype=dtype)
    threshold = torch.quantile(entropy[mask], 1 - quantile)
    selected = top_entropy_mask(entropy, mask, quantile=quantile)
    assert torch.equal(selected, mask & (entropy >= threshold))


def test_a_fifth_of_ten_tokens_is_the_upper_two() -> None:
    entropy = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4], [0.5, 1.0, 0.6, 0.7, 0.8]])
    selected = top_entropy_mask(entropy, torch.ones(2, 5), quantile=0.2)
    assert selected.nonzero().tolist() == [[0, 1], [1, 1]]


def test_a_rank_that_floats_put_just_below_an_integer_is_that_integer() -> None:
    assert 0.29 * 100 < 29
    selected = top_entropy_mask(torch.arange(101.0), torch.ones(101), quantile=0.29)
    assert selected.sum() == 30


def test_a_quantile_of_one_is_the_mask_itself_whatever_the_entropies() -> None:
    entropy, mask = tokens(0)
    entropy[0] = math.nan
    assert torch.equal(top_entropy_mask(entropy, mask, quantile=1.0), mask)


@pytest.mark.parametrize("quantile", [1e-9, 0.2, 1.0])
def test_one_token_is_selected_and_an_empty_mask_selects_none(quantile: float) -> None:
    entropy = torch.tensor([0.3, math.nan, 0.1])
    alone = torch.tensor([False, False, True])
    assert torch.equal(top_entropy_mask(entropy, alone, quantile=quantile), alone)
    assert not top_entropy_mask(entropy, torch.zeros(3), quantile=quantile).any()


def test_tokens_that_share_the_threshold_are_all_selected() -> None:
    selected = top_entropy_mask(torch.tensor([0.0, 1, 1, 1, 1]), torch.ones(5), quantile=0.2)
    assert selected.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_lies_outside_the_mask_selects_nothing_and_moves_no_threshold(garbage: float) -> None:
    entropy, mask = tokens(1)
    clean = top_entropy_mask(entropy, mask, quantile=0.3)
    assert torch.equal(top_entropy_mask(entropy.where(mask, garbage), mask, quantile=0.3), clean)


def test_a_token_of_nan_entropy_stays_visible() -> None:
    entropy = torch.tensor([math.nan, 0.1, 0.2, 0.3, 0.4, 0.5])
    selected = top_entropy_mask(entropy, torch.ones(6), quantile=0.5)
    assert selected.tolist() == [True, False, False, False, True, True]


def test_more_tokens_than_torchs_quantile_takes_are_selected_from() -> None:
    count = 2**24 + 3
    entropy = torch.arange(count, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropy, 0.75)
    selected = top_entropy_mask(entropy, torch.ones(count, dtype=torch.bool), quantile=0.25)
    # The quantile lies at 0.75 * (2**24 + 2) = 3 * 2**22 + 1.5.
    assert selected[3 * 2**22 + 2 :].all()
    assert selected.sum() == 2**22 + 1


def test_the_selection_of_a_layout_is_the_selection_of_its_tokens() -> None:
    entropy, mask = tokens(2)
    selected = top_entropy_mask(entropy, mask, quantile=0.2)
    flat = top_entropy_mask(entropy.flatten(), mask.flatten(), quantile=0.2)
    assert torch.equal(selected.flatten(), flat)


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.01, 20.0, math.nan])
def test_a_quantile_that_is_no_share_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        top_entropy_mask(torch.ones(3), torch.ones(3), quantile=quantile)


# Perplexity factors


def test_the_golden_perplexities_have_their_standardised_logarithms() -> None:
    mean_logprobs = -torch.tensor([1.1, 1.2, 1.5, 2.0], dtype=torch.float64).log()
    factors = perplexity_factors(mean_logprobs, alpha=0.01)
    weights = ((1 - factors) / 0.01).tolist()
    assert weights == pytest.approx([-1.076278, -0.699803, 0.265679, 1.510402], abs=1e-6)


@given(st.lists(st.floats(-8, 0, width=32), min_size=1, max_size=16), st.floats(0, 0.5))
@settings(max_examples=200)
def test_the_factors_equal_the_slow_loop(mean_logprobs: list[float], alpha: float) -> None:
    actual = perplexity_factors(torch.tensor(mean_logprobs, dtype=torch.float64), alpha=alpha)
    expected = [min(1.2, max(0.8, 1 - alpha * w)) for w in slow_weights(mean_logprobs)]
    assert actual.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_outlier_is_left_out_of_mean_and_deviation_and_still_weighted() -> None:
    usual = torch.tensor([-0.10, -0.20, -0.30, -0.40, -0.25], dtype=torch.float64)
    group = torch.cat([usual, torch.tensor([-50.0], dtype=torch.float64)])
    factors = perplexity_factors(group, alpha=0.01)
    torch.testing.assert_close(factors[:5], perplexity_factors(usual, alpha=0.01))
    assert factors[5].item() == 0.8


def test_a_likelier_completion_has_the_larger_factor_and_none_leaves_the_box() -> None:
    factors = perplexity_factors(torch.tensor([-3.0, -2.0, -1.0, -0.1]), alpha=10.0).tolist()
    assert factors == sorted(factors)
    assert factors[0] == pytest.approx(0.8)
    assert factors[-1] == pytest.approx(1.2)


@given(st.floats(-30, 0, width=32), st.integers(1, 64), st.floats(0, 1e6))
@settings(max_examples=50)
def test_equal_completions_have_factors_of_exactly_one(
    mean_logprob: float, group_size: int, alpha: float
) -> None:
    factors = perplexity_factors(torch.full((2, group_size), mean_logprob), alpha=alpha)
    assert (factors == 1).all()
    assert factors.dtype == torch.float32


def test_a_coefficient_of_zero_changes_no_advantage() -> None:
    assert (perplexity_factors(torch.tensor([-3.0, -1.0, -0.2, 0.0]), alpha=0.0) == 1).all()


def test_a_spread_below_the_least_deviation_counts_as_a_deviation_of_one() -> None:
    mean_logprobs = torch.tensor([-0.5, -0.5 - 1e-7], dtype=torch.float64)
    factors = perplexity_factors(mean_logprobs, alpha=1.0)
    assert factors.tolist() == pytest.approx([1 + 5e-8, 1 - 5e-8], abs=1e-12)


def test_the_groups_of_a_batch_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(3)
    mean_logprobs = -torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    together = perplexity_factors(mean_logprobs, alpha=0.1)
    rows = [perplexity_factors(row, alpha=0.1) for row in mean_logprobs.flatten(0, 1)]
    assert torch.equal(together.flatten(0, 1), torch.stack(rows))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_completion_that_is_not_valid_has_factor_one_and_moves_no_other(garbage: float) -> None:
    mean_logprobs = torch.tensor([-0.3, garbage, -1.2, -0.4, -0.9])
    valid = torch.tensor([True, False, True, True, True])
    factors = perplexity_factors(mean_logprobs, alpha=0.05, valid=valid)
    assert factors[1] == 1
    assert torch.equal(factors[valid], perplexity_factors(mean_logprobs[valid], alpha=0.05))
    nobody = torch.zeros(5, dtype=torch.bool)
    assert (perplexity_factors(mean_logprobs, alpha=0.05, valid=nobody) == 1).all()


@pytest.mark.parametrize(
    ("mean_logprobs", "alpha", "message"),
    [
        (torch.tensor([-1.0, -math.inf]), 0.01, "not finite"),
        (torch.tensor([-1.0, math.nan]), 0.01, "not finite"),
        (torch.zeros(2, 0), 0.01, "needs a completion"),
        (torch.tensor(-1.0), 0.01, "needs a completion"),
        (torch.zeros(3), -0.01, "alpha"),
        (torch.zeros(3), math.inf, "alpha"),
    ],
)
def test_perplexities_without_a_factor_are_refused(
    mean_logprobs: Tensor, alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity_factors(mean_logprobs, alpha=alpha)


# Position


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_golden_bonuses_are_added_along_the_completion(sign: float) -> None:
    advantages = torch.full((1, 4), sign, dtype=torch.float64)
    shaped = position_shaped(advantages, torch.ones(1, 4), gamma=0.1, steepness=15.0)
    bonuses = ((shaped - advantages) * sign)[0].tolist()
    assert bonuses == pytest.approx([5.5278e-5, 0.0022977, 0.05, 0.0977023], rel=2e-5)
    long = torch.full((1, 10**6), sign, dtype=torch.float64)
    shaped = position_shaped(long, torch.ones_like(long), gamma=0.1, steepness=15.0)
    assert abs(shaped[0, -1].item()) - 1 == pytest.approx(0.0999447, abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_position_shaping_equals_the_slow_loop(seed: int) -> None:
    values, mask = tokens(seed)
    advantages = 2 * values - 1
    shaped = position_shaped(advantages, mask, gamma=0.4, steepness=9.0)
    expected = slow_position_shaped(advantages, mask, 0.4, 9.0)
    torch.testing.assert_close(shaped, torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.floats(0, 100))
@settings(max_examples=100)
def test_an_advantage_grows_by_at_most_half_and_keeps_its_sign(
    advantages: list[float], gamma: float
) -> None:
    tensor = torch.tensor([advantages], dtype=torch.float64)
    shaped = position_shaped(tensor, torch.ones_like(tensor), gamma=gamma, steepness=15.0)
    assert torch.equal(shaped.sign(), tensor.sign())
    assert (shaped.abs() >= tensor.abs()).all()
    assert (shaped.abs() <= 1.5 * tensor.abs()).all()


def test_a_bonus_above_half_the_advantage_is_cut_to_half() -> None:
    advantages = torch.tensor([[0.02, -0.02]], dtype=torch.float64)
    shaped = position_shaped(advantages, torch.ones(1, 2), gamma=5.0, steepness=0.0)
    assert shaped[0].tolist() == pytest.approx([0.03, -0.03])


def test_positions_are_counted_over_the_mask_and_not_over_the_columns() -> None:
    mask = torch.tensor([[False, True, False, True, True, False, True]])
    shaped = position_shaped(torch.ones(1, 7), mask, gamma=0.1, steepness=15.0)
    packed = position_shaped(torch.ones(1, 4), torch.ones(1, 4), gamma=0.1, steepness=15.0)
    assert torch.equal(shaped[mask], packed[0])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_outside_the_mask_a_shaped_advantage_is_zero(garbage: float) -> None:
    advantages, mask = tokens(5)
    shaped = position_shaped(advantages.where(mask, garbage), mask, gamma=0.1, steepness=15.0)
    clean = position_shaped(advantages, mask, gamma=0.1, steepness=15.0)
    assert torch.equal(shaped, clean)
    assert (shaped[~mask] == 0).all()


def test_a_gamma_of_zero_changes_no_advantage() -> None:
    advantages, mask = tokens(6)
    shaped = position_shaped(advantages, mask, gamma=0.0, steepness=15.0)
    assert torch.equal(shaped, advantages.where(mask, 0.0))


def test_shaping_carries_no_gradient() -> None:
    values, mask = tokens(7)
    values.requires_grad_()
    assert not position_shaped(values, mask, gamma=0.1, steepness=15.0).requires_grad
    assert not perplexity_factors(-values, alpha=0.1).requires_grad


@pytest.mark.parametrize(("gamma", "steepness"), [(-0.1, 15.0), (0.1, -1.0), (math.nan, 15.0)])
def test_a_negative_bonus_is_refused(gamma: float, steepness: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        position_shaped(torch.ones(1, 2), torch.ones(1, 2), gamma=gamma, steepness=steepness)


# Overlong penalty


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (17408, -0.25),
        (18432, -0.5),
        (20480, -1.0),
        (30000, -1.0),
    ],
)
def test_the_penalty_falls_over_the_buffer_of_the_paper(num_tokens: int, penalty: float) -> None:
    settings_of_dapo = {"max_tokens": 20480, "buffer_tokens": 4096}
    assert overlong_penalty(num_tokens, **settings_of_dapo, factor=1.0) == penalty
    assert overlong_penalty(num_tokens, **settings_of_dapo, factor=0.5) == penalty / 2


def test_a_buffer_of_zero_penalises_only_beyond_the_maximum() -> None:
    assert overlong_penalty(100, max_tokens=100, buffer_tokens=0, factor=1.0) == 0
    assert overlong_penalty(101, max_tokens=100, buffer_tokens=0, factor=1.0) == -1


@given(st.integers(0, 300), st.integers(0, 200), st.floats(0, 5))
@settings(max_examples=100)
def test_a_longer_completion_never_loses_less_and_never_more_than_the_factor(
    num_tokens: int, buffer_tokens: int, factor: float
) -> None:
    now, longer = (
        overlong_penalty(n, max_tokens=200, buffer_tokens=buffer_tokens, factor=factor)
        for n in (num_tokens, num_tokens + 1)
    )
    assert -factor <= longer <= now <= 0


@pytest.mark.parametrize(
    ("max_tokens", "buffer_tokens", "factor"),
    [(100, 101, 1.0), (100, -1, 1.0), (100, 10, -1.0), (100, 10, math.nan)],
)
def test_a_buffer_outside_the_maximum_and_a_negative_factor_are_refused(
    max_tokens: int, buffer_tokens: int, factor: float
) -> None:
    with pytest.raises(ValueError, match="need 0 <= buffer_tokens"):
        overlong_penalty(5, max_tokens=max_tokens, buffer_tokens=buffer_tokens, factor=factor)


# Entropy ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_golden_ratios_are_kept_inside_the_open_interval(dtype: torch.dtype) -> None:
    # (1.05 + 1e-8) / (1 + 1e-8) lies just below 1.05.
    entropy = torch.tensor([0.96, 0.94, 1.05, 1.06, 1.0], dtype=dtype)
    kept = entropy_ratio_kept(entropy, torch.ones_like(entropy), clip_low=0.05, clip_high=0.05)
    assert kept.tolist() == [True, False, True, False, True]


@given(
    st.lists(st.tuples(st.floats(0, 12), st.floats(0, 12)), min_size=1, max_size=20),
    st.floats(0.01, 1.5),
    st.floats(0.01, 1.5),
)
@settings(max_examples=100)
def test_the_kept_tokens_equal_the_slow_loop(
    pairs: list[tuple[float, float]], clip_low: float, clip_high: float
) -> None:
    new, old = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    kept = entropy_ratio_kept(new, old, clip_low=clip_low, clip_high=clip_high)
    ratios = [(h + 1e-8) / (h_old + 1e-8) for h, h_old in pairs]
    assert kept.tolist() == [1 - clip_low < ratio < 1 + clip_high for ratio in ratios]


def test_a_ratio_on_a_bound_is_not_kept() -> None:
    # Ratios of exactly 1/2 and 2, made of nothing but the 1e-8 that is added to each entropy.
    entropy = torch.tensor([0.0, 1e-8], dtype=torch.float64)
    kept = entropy_ratio_kept(entropy, entropy.flip(0), clip_low=0.5, clip_high=1.0)
    assert kept.tolist() == [False, False]
    kept = entropy_ratio_kept(entropy, entropy.flip(0), clip_low=0.501, clip_high=1.001)
    assert kept.tolist() == [True, True]


def test_the_bounds_are_told_apart() -> None:
    entropy = torch.tensor([0.85, 1.15])
    for clip_low, clip_high, expected in [(0.2, 0.1, [True, False]), (0.1, 0.2, [False, True])]:
        kept = entropy_ratio_kept(entropy, torch.ones(2), clip_low=clip_low, clip_high=clip_high)
        assert kept.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_policy_every_token_is_kept_even_without_entropy(dtype: torch.dtype) -> None:
    entropy = torch.tensor([0.0, 1e-12, 1e-4, 0.7, 11.9], dtype=dtype)
    assert entropy_ratio_kept(entropy, entropy, clip_low=1e-6, clip_high=1e-6).all()


def test_an_entropy_that_rounding_left_below_zero_counts_as_zero() -> None:
    below, zero = torch.tensor([-1e-8, -1e-7]), torch.zeros(2)
    assert entropy_ratio_kept(below, zero, clip_low=0.05, clip_high=0.05).all()
    assert entropy_ratio_kept(zero, below, clip_low=0.05, clip_high=0.05).all()


def test_a_token_without_a_ratio_is_not_kept() -> None:
    entropy = torch.tensor([math.nan, 1.0, math.inf])
    old = torch.tensor([1.0, math.nan, math.inf])
    assert not entropy_ratio_kept(entropy, old, clip_low=0.05, clip_high=0.05).any()


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.0, 0.05), (0.05, 0.0), (math.nan, 0.05)])
def test_bounds_that_keep_not_even_the_old_policy_are_refused(
    clip_low: float, clip_high: float
) -> None:
    with pytest.raises(ValueError, match="above 0"):
        entropy_ratio_kept(torch.ones(2), torch.ones(2), clip_low=clip_low, clip_high=clip_high)


# Shapes


def test_tensors_of_different_shapes_are_refused() -> None:
    a, b = torch.ones(2, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match="one shape"):
        top_entropy_mask(a, b, quantile=0.5)
    with pytest.raises(ValueError, match="one shape"):
        perplexity_factors(a, alpha=0.01, valid=b)
    with pytest.raises(ValueError, match="one shape"):
        position_shaped(a, b, gamma=0.1, steepness=15.0)
    with pytest.raises(ValueError, match="one shape"):
        entropy_ratio_kept(a, b, clip_low=0.05, clip_high=0.05)
