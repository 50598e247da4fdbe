import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.covariance import (
    covariance_percentiles,
    select_clip_cov,
    select_kl_cov,
    token_covariance,
    token_keys,
)

LOGPROBS = [[-0.1, -1.8, -0.6], [-1.2, -0.3, -2.6]]
ADVANTAGES = [[1.5] * 3, [-1.0] * 3]
MASK = torch.tensor([[True, True, True], [True, True, False]])
GOLDEN = [[0.7, -1.0, 0.2], [0.6, -0.75, 0.0]]
SPLITMIX_OF_ZERO = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def golden_covariance(dtype: torch.dtype = torch.float64) -> Tensor:
    return token_covariance(
        torch.tensor(LOGPROBS, dtype=dtype), torch.tensor(ADVANTAGES, dtype=dtype), MASK
    )


def keys_of(shape: tuple[int, int], seed: int = 0, step: int = 0) -> Tensor:
    rows, columns = shape
    return token_keys(seed, step, 0, torch.arange(rows)[:, None] * 977, torch.arange(columns))


def random_batch(seed: int, rows: int = 6, columns: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, columns, generator=generator) * 3
    advantages = torch.randn(rows, 1, generator=generator).expand(rows, columns)
    mask = torch.rand(rows, columns, generator=generator) < 0.8
    return logprobs, advantages, mask


def slow_clip_cov(
    covariance: Tensor,
    mask: Tensor,
    keys: Tensor,
    excluded: Tensor,
    ratio: float,
    lower: float,
    upper: float,
) -> set[tuple[int, ...]]:
    """Eq. 11 token by token, with the draw as the smallest keys."""
    places = [i for i in np.ndindex(*covariance.shape) if mask[i]]
    quota = max(math.floor(ratio * len(places) + 1e-9), 1)
    candidates = [i for i in places if lower < float(covariance[i]) < upper and not excluded[i]]
    return set(sorted(candidates, key=lambda i: int(keys[i]))[:quota])


def slow_kl_cov(covariance: Tensor, mask: Tensor, ratio: float) -> set[tuple[int, ...]]:
    """Eq. 13 token by token; ties by (row, column)."""
    places = [i for i in np.ndindex(*covariance.shape) if mask[i]]
    quota = max(math.floor(ratio * len(places) + 1e-9), 1)
    return set(sorted(places, key=lambda i: (-float(covariance[i]), i))[:quota])


def places_of(selected: Tensor) -> set[tuple[int, ...]]:
    return {tuple(index) for index in selected.nonzero().tolist()}


def test_the_covariance_equals_the_slow_loop() -> None:
    logprobs, advantages, mask = random_batch(0)
    covariance = token_covariance(logprobs, advantages, mask)
    places = [i for i in np.ndindex(*mask.shape) if mask[i]]
    mean_logprob = np.mean([float(logprobs[i]) for i in places])
    mean_advantage = np.mean([float(advantages[i]) for i in places])
    for i in np.ndindex(*mask.shape):
        expected = (float(logprobs[i]) - mean_logprob) * (float(advantages[i]) - mean_advantage)
        assert float(covariance[i]) == pytest.approx(expected if mask[i] else 0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("garbage", [-2.6, math.nan, math.inf, 1e9])
def test_the_golden_covariance_holds_whatever_the_masked_token_is(
    dtype: torch.dtype, garbage: float
) -> None:
    logprobs = torch.tensor(LOGPROBS, dtype=dtype)
    advantages = torch.tensor(ADVANTAGES, dtype=dtype)
    logprobs[1, 2] = advantages[1, 2] = garbage
    covariance = token_covariance(logprobs, advantages, MASK)
    torch.testing.assert_close(covariance, torch.tensor(GOLDEN, dtype=dtype))
    assert covariance.sum().item() / 5 == pytest.approx(-0.05, abs=1e-6)


def test_the_mean_covariance_is_the_population_covariance() -> None:
    logprobs, advantages, mask = random_batch(1)
    covariance = token_covariance(logprobs.double(), advantages.double(), mask)
    expected = np.cov(logprobs[mask].numpy(), advantages[mask].numpy(), bias=True)[0, 1]
    assert covariance[mask].mean().item() == pytest.approx(expected, rel=1e-6)


def test_the_covariance_carries_no_gradient_and_scales_with_the_advantage() -> None:
    logprobs, advantages, mask = random_batch(2)
    covariance = token_covariance(logprobs.requires_grad_(), advantages, mask)
    assert not covariance.requires_grad
    torch.testing.assert_close(token_covariance(logprobs, 3 * advantages, mask), 3 * covariance)


def test_the_means_of_the_mini_batch_make_a_split_equal_to_the_whole() -> None:
    logprobs, advantages, mask = random_batch(3)
    means = {
        "mean_logprob": logprobs[mask].double().mean(),
        "mean_advantage": advantages[mask].double().mean().item(),
    }
    parts = [
        token_covariance(logprobs[rows], advantages[rows], mask[rows], **means)
        for rows in (slice(0, 1), slice(1, 6))
    ]
    assert torch.equal(torch.cat(parts), token_covariance(logprobs, advantages, mask))


def test_an_empty_mask_has_no_covariance_and_no_selection() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    covariance = token_covariance(torch.tensor(LOGPROBS), torch.tensor(ADVANTAGES), nothing)
    assert (covariance == 0).all()
    assert not select_clip_cov(covariance, nothing, ratio=1.0, lower=-1.0, upper=1.0).any()
    assert not select_kl_cov(covariance, nothing, ratio=1.0).any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3, 1.0])
def test_the_selections_equal_the_slow_loops(seed: int, ratio: float) -> None:
    logprobs, advantages, mask = random_batch(seed)
    covariance = token_covariance(logprobs, advantages, mask)
    excluded = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    keys = keys_of((6, 11), seed)
    selected = select_clip_cov(
        covariance, mask, ratio=ratio, lower=0.1, upper=1.0, excluded=excluded, keys=keys
    )
    expected = slow_clip_cov(covariance, mask, keys, excluded, ratio, 0.1, 1.0)
    assert places_of(selected) == expected
    selected = select_kl_cov(covariance, mask, ratio=ratio)
    assert places_of(selected) == slow_kl_cov(covariance, mask, ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_covariance_on_a_bound_is_not_drawn(dtype: torch.dtype) -> None:
    # T6: 0.2 comes out of the means a little above itself in float64, a little below in float32.
    for covariance in (golden_covariance(dtype), torch.tensor(GOLDEN, dtype=dtype)):
        selected = select_clip_cov(covariance, MASK, ratio=1.0, lower=0.2, upper=1.5)
        assert places_of(selected) == {(0, 0), (1, 0)}
        selected = select_clip_cov(covariance, MASK, ratio=1.0, lower=0.1, upper=0.7)
        assert places_of(selected) == {(0, 2), (1, 0)}


def test_over_many_seeds_each_candidate_is_drawn_equally_often() -> None:
    drawn = Counter[tuple[int, ...]]()
    for seed in range(400):
        selected = select_clip_cov(
            golden_covariance(), MASK, ratio=0.2, lower=0.2, upper=1.5, keys=keys_of((2, 3), seed)
        )
        assert selected.sum() == 1
        drawn.update(places_of(selected))
    assert set(drawn) == {(0, 0), (1, 0)}
    assert abs(drawn[(0, 0)] - 200) < 50  # five standard deviations


def test_an_excluded_token_is_not_drawn_but_counts_in_the_quota() -> None:
    covariance = torch.full((1, 10), 0.5)
    everywhere = torch.ones(1, 10, dtype=torch.bool)
    excluded = torch.arange(10)[None] < 5
    selected = select_clip_cov(
        covariance, everywhere, ratio=0.4, lower=0.0, upper=1.0, excluded=excluded
    )
    assert selected.sum() == 4
    assert not (selected & excluded).any()


def test_fewer_candidates_than_the_quota_are_all_drawn() -> None:
    selected = select_clip_cov(golden_covariance(), MASK, ratio=1.0, lower=0.3, upper=5.0)
    assert places_of(selected) == {(0, 0), (1, 0)}


@pytest.mark.parametrize(
    ("ratio", "count", "quota"),
    [(2e-4, 4999, 0), (2e-4, 5000, 1), (0.29, 100, 29), (0.57, 100, 57), (0.0, 9, 0), (1.0, 9, 9)],
)
def test_the_quota_is_the_floor_and_at_least_one_only_if_asked(
    ratio: float, count: int, quota: int
) -> None:
    covariance = torch.linspace(1.1, 4.9, count)
    mask = torch.ones(count, dtype=torch.bool)
    for floor_one, expected in ((False, quota), (True, max(quota, 1))):
        clip = select_clip_cov(
            covariance, mask, ratio=ratio, lower=1.0, upper=5.0, floor_one=floor_one
        )
        assert clip.sum() == expected
        assert select_kl_cov(covariance, mask, ratio=ratio, floor_one=floor_one).sum() == expected


def test_kl_cov_takes_the_largest_even_when_all_are_negative() -> None:
    covariance = torch.tensor([-3.0, -1.0, -2.0, 7.0])
    mask = torch.tensor([True, True, True, False])
    assert select_kl_cov(covariance, mask, ratio=0.0).tolist() == [False, True, False, False]


def test_kl_cov_breaks_ties_by_place_or_by_key() -> None:
    covariance = torch.zeros(5)
    mask = torch.tensor([False, True, True, True, True])
    assert select_kl_cov(covariance, mask, ratio=0.5).nonzero().flatten().tolist() == [1, 2]
    keys = torch.tensor([0, 9, 3, 8, 1])
    selected = select_kl_cov(covariance, mask, ratio=0.5, keys=keys)
    assert selected.nonzero().flatten().tolist() == [2, 4]


def test_without_keys_the_draw_is_the_same_each_time_and_ignores_the_global_seed() -> None:
    covariance = torch.full((4, 50), 2.0)
    mask = torch.ones(4, 50, dtype=torch.bool)
    torch.manual_seed(1)
    first = select_clip_cov(covariance, mask, ratio=0.1, lower=1.0, upper=5.0)
    torch.manual_seed(2)
    assert torch.equal(first, select_clip_cov(covariance, mask, ratio=0.1, lower=1.0, upper=5.0))
    assert first.sum() == 20
    assert first.any(-1).sum() > 1  # spread over the rows, not the first row's tokens


@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans())
@settings(max_examples=40)
def test_the_selection_does_not_depend_on_order_ranks_or_micro_batches(
    seed: int, num_ranks: int, has_ties: bool
) -> None:
    logprobs, advantages, mask = random_batch(seed)
    covariance = token_covariance(logprobs, advantages, mask)
    if has_ties:
        covariance = covariance.round(decimals=1)
    keys = keys_of((6, 11), seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    # As the learner does: each rank flattens its rows, everything is gathered in rank order.
    shards = [
        rows.flatten() for rows in torch.arange(66).view(6, 11)[order].tensor_split(num_ranks)
    ]
    flat = torch.cat(shards)

    def gathered(tensor: Tensor) -> Tensor:
        return tensor.flatten()[flat]

    selections: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda c, m, k: select_clip_cov(c, m, ratio=0.1, lower=-0.5, upper=1.5, keys=k),
        lambda c, m, k: select_kl_cov(c, m, ratio=0.1, keys=k),
    ]
    for select in selections:
        whole = select(covariance, mask, keys)
        over_ranks = select(gathered(covariance), gathered(mask), gathered(keys))
        assert torch.equal(over_ranks, gathered(whole))
        assert whole.any()


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of splitmix64 for seed 0, absorbed by hand.
    state = 0
    for word in (0, 0, 0, 0, 0):
        state = slow_splitmix64(state ^ word)
    zero = torch.zeros(1, dtype=torch.int64)
    assert token_keys(0, 0, 0, zero, zero).item() == state >> 1
    assert slow_splitmix64(0) == SPLITMIX_OF_ZERO[0]
    assert slow_splitmix64(0x9E3779B97F4A7C15) == SPLITMIX_OF_ZERO[1]


def slow_splitmix64(state: int) -> int:
    limit = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & limit
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & limit
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & limit
    return state ^ (state >> 31)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
    st.integers(0, 64),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10**5),
)
@settings(max_examples=50)
def test_the_keys_equal_the_slow_form(
    seed: int, step: int, minibatch: int, uid_hash: int, position: int
) -> None:
    state = 0
    for word in (seed, step, minibatch, uid_hash % 2**64, position):
        state = slow_splitmix64(state ^ word)
    key = token_keys(seed, step, minibatch, torch.tensor([uid_hash]), torch.tensor([position]))
    assert key.item() == state >> 1


def test_the_keys_are_distinct_uniform_and_change_with_every_word() -> None:
    base = token_keys(1, 2, 3, torch.arange(100)[:, None], torch.arange(200))
    assert base.shape == (100, 200)
    assert len(set(base.flatten().tolist())) == 20000
    assert base.min() >= 0
    share = base.double() / 2**63
    assert abs(share.mean().item() - 0.5) < 0.01
    assert abs((share < 0.1).double().mean().item() - 0.1) < 0.01
    for words in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        other = token_keys(*words, torch.arange(100)[:, None], torch.arange(200))
        assert (other == base).sum() == 0
        agreement = torch.corrcoef(torch.stack([share.flatten(), other.flatten().double()]))
        assert abs(agreement[0, 1].item()) < 0.03


def test_the_percentiles_show_the_tail() -> None:
    covariance = torch.arange(1.0, 10001.0).view(100, 100).flip(0)
    mask = torch.ones(100, 100, dtype=torch.bool)
    mask[0] = False  # hides 9901 .. 10000
    top_means, percentiles = covariance_percentiles(covariance, mask)
    values = np.arange(1.0, 9901.0)
    assert top_means == {
        0.02: 9900.0,
        0.2: pytest.approx(values[-19:].mean()),
        2.0: pytest.approx(values[-198:].mean()),
        20.0: pytest.approx(values[-1980:].mean()),
        50.0: pytest.approx(values[-4950:].mean()),
        100.0: pytest.approx(values.mean()),
    }
    for percent, value in percentiles.items():
        assert value == pytest.approx(np.percentile(values, percent))
    assert sorted(percentiles) == [50.0, 90.0, 99.0, 99.8, 100.0]


def test_the_percentiles_of_nothing_are_nan() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    top_means, percentiles = covariance_percentiles(torch.ones(3), nothing)
    assert all(math.isnan(v) for v in [*top_means.values(), *percentiles.values()])
    assert len(top_means) == 6
    assert len(percentiles) == 5


@pytest.mark.parametrize("ratio", [-0.01, 1.01, 20.0, math.nan])
def test_a_ratio_that_is_no_fraction_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        select_clip_cov(golden_covariance(), MASK, ratio=ratio, lower=1.0, upper=5.0)
    with pytest.raises(ValueError, match="fraction"):
        select_kl_cov(golden_covariance(), MASK, ratio=ratio)


def test_unusable_arguments_are_refused() -> None:
    covariance = golden_covariance()
    with pytest.raises(ValueError, match="window"):
        select_clip_cov(covariance, MASK, ratio=0.1, lower=5.0, upper=1.0)
    with pytest.raises(ValueError, match="int64"):
        token_keys(0, 0, 0, torch.zeros(2), torch.zeros(2))
    row = MASK[:1]
    for call in (
        lambda: token_covariance(covariance, covariance[:1], MASK),
        lambda: select_clip_cov(covariance, row, ratio=0.1, lower=1.0, upper=5.0),
        lambda: select_clip_cov(covariance, MASK, ratio=0.1, lower=1.0, upper=5.0, excluded=row),
        lambda: select_clip_cov(covariance, MASK, ratio=0.1, lower=1.0, upper=5.0, keys=row),
        lambda: select_kl_cov(covariance, row, ratio=0.1),
        lambda: select_kl_cov(covariance, MASK, ratio=0.1, keys=row),
        lambda: covariance_percentiles(covariance, row),
    ):
        with pytest.raises(ValueError, match="one shape"):
            call()
