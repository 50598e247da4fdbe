import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.offpolicy import (
    capped_weights,
    effective_sample_size,
    geometric_masked_weights,
    interpolated_proximal,
    masked_weights,
    mismatch_kl,
    sequence_masked_weights,
    sequence_truncated_weights,
    truncated_weights,
)

GOLDEN = [0.4, 0.5, 1.0, 2.0, 5.0, 6.0]

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "truncated": lambda p, b, m: truncated_weights(p, b, m, cap=2.0),
    "masked": lambda p, b, m: masked_weights(p, b, m, lower=0.5, upper=2.0),
    "capped": lambda p, b, m: capped_weights(p, b, m, cap=1.5),
    "sequence_truncated": lambda p, b, m: sequence_truncated_weights(p, b, m, cap=2.0),
    "sequence_masked": lambda p, b, m: sequence_masked_weights(p, b, m, lower=0.5, upper=2.0),
    "geometric_masked": lambda p, b, m: geometric_masked_weights(p, b, m, lower=0.8, upper=1.25),
}
TRUNCATED = ("truncated", "sequence_truncated")
WEIGHED: dict[str, Callable[[float], float]] = {
    "truncated": lambda w: min(w, 2.0),
    "masked": lambda w: w if 0.5 <= w <= 2.0 else 0.0,
    "capped": lambda w: w if w <= 1.5 else 0.0,
    "sequence_truncated": lambda w: min(w, 2.0),
    "sequence_masked": lambda w: w if 0.5 <= w <= 2.0 else 0.0,
    "geometric_masked": lambda w: w if 0.8 <= w <= 1.25 else 0.0,
}
"""What each form makes of the weight of a token, or of a completion."""


def random_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(5, 9, generator=generator, dtype=torch.float64) * 3
    proximal = behaviour + torch.randn(5, 9, generator=generator, dtype=torch.float64) * 0.6
    mask = torch.rand(5, 9, generator=generator) < 0.7
    mask[3] = False
    return proximal, behaviour, mask


def slow_weights(name: str, proximal: Tensor, behaviour: Tensor, mask: Tensor) -> np.ndarray:
    """Sections 3.7 and 3.8 of the specification, token by token."""
    weights = np.zeros(mask.shape)
    for row, column in np.ndindex(*mask.shape):
        if not mask[row, column]:
            continue
        tokens = [t for t in range(mask.shape[1]) if mask[row, t]]
        ratios = [math.exp(float(proximal[row, t] - behaviour[row, t])) for t in tokens]
        if name.startswith("sequence"):
            w = math.prod(ratios)
        elif name.startswith("geometric"):
            w = math.prod(ratios) ** (1 / len(tokens))
        else:
            w = ratios[tokens.index(column)]
        weights[row, column] = WEIGHED[name](w)
    return weights


@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_the_slow_loop(name: str) -> None:
    seen = set()
    for seed in range(4):
        proximal, behaviour, mask = random_tokens(seed)
        weights = FORMS[name](proximal, behaviour, mask)
        expected = slow_weights(name, proximal, behaviour, mask)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
        seen |= {float(w) for w in expected[mask.numpy()]}
    bound = 2.0 if name in TRUNCATED else 0.0
    assert bound in seen, "no token is out of bounds"
    assert len(seen) > 2, "no token is within bounds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_golden_weights_are_cut_off_and_kept_with_closed_bounds(dtype: torch.dtype) -> None:
    proximal = torch.tensor(GOLDEN, dtype=dtype).log()[None]
    zero, mask = torch.zeros_like(proximal), torch.ones(1, 6, dtype=torch.bool)
    tis = truncated_weights(proximal, zero, mask, cap=2.0)
    assert tis[0].tolist() == pytest.approx([0.4, 0.5, 1, 2, 2, 2], rel=1e-6)
    icepop = masked_weights(proximal, zero, mask, lower=0.5, upper=5.0)
    assert icepop[0].tolist() == pytest.approx([0, 0.5, 1, 2, 5, 0], rel=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_on_policy_every_weight_is_one_and_carries_no_gradient(name: str) -> None:
    proximal, _, mask = random_tokens()
    weights = FORMS[name](proximal.requires_grad_(), proximal, mask)
    assert torch.equal(weights, mask.double())
    assert not weights.requires_grad
    assert effective_sample_size(weights, mask) == mask.sum()
    assert [float(x) for x in mismatch_kl(proximal, proximal, mask)] == [0, 0, 0]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
def test_what_the_mask_hides_never_matters(name: str, garbage: float) -> None:
    proximal, behaviour, mask = random_tokens()
    dirty = [torch.where(mask, t, garbage) for t in (proximal, behaviour)]
    weights = FORMS[name](proximal, behaviour, mask)
    for p, b in ((dirty[0], behaviour), (proximal, dirty[1]), dirty):
        assert torch.equal(FORMS[name](p, b, mask), weights)
        assert mismatch_kl(p, b, mask) == mismatch_kl(proximal, behaviour, mask)
    hidden = torch.where(mask, weights, garbage)
    assert effective_sample_size(hidden, mask) == effective_sample_size(weights, mask)


def test_an_absurd_log_ratio_stays_finite() -> None:
    proximal = torch.tensor([[800.0, -800.0]])
    zero, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    weights = masked_weights(proximal, zero, mask, lower=0.0, upper=math.inf)
    assert weights.isfinite().all()
    assert weights[0, 0] == pytest.approx(math.exp(20), rel=1e-5)
    assert all(x.isfinite() for x in mismatch_kl(proximal, zero, mask))


@pytest.mark.parametrize("sign", [1, -1])
def test_an_absurd_product_stays_finite_and_is_still_out_of_bounds(sign: int) -> None:
    proximal, zero = torch.full((1, 2), sign * 400.0), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    limit = torch.full((1, 2), math.exp(sign * 20))
    weights = sequence_truncated_weights(proximal, zero, mask, cap=math.inf)
    torch.testing.assert_close(weights, limit)
    weights = sequence_masked_weights(proximal, zero, mask, lower=0.0, upper=math.inf)
    torch.testing.assert_close(weights, limit)
    weights = sequence_masked_weights(proximal, zero, mask, lower=1e-20, upper=1e20)
    assert (weights == 0).all()


def test_a_product_is_bounded_as_a_whole_and_not_token_by_token() -> None:
    proximal = torch.tensor([[800.0, -800.0, math.log(2)], [30.0, -31.0, 1.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    weights = sequence_truncated_weights(proximal, torch.zeros(2, 3), mask, cap=5.0)
    assert weights[0].tolist() == pytest.approx([2.0] * 3, rel=1e-6)
    assert weights[1].tolist() == [1.0] * 3


def test_a_token_that_cannot_occur_any_more_takes_the_weight_from_its_completion() -> None:
    proximal = torch.tensor([[-math.inf, 0.0], [0.0, 0.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    for weights in (
        sequence_masked_weights(proximal, torch.zeros(2, 2), mask, lower=0.1, upper=3.0),
        geometric_masked_weights(proximal, torch.zeros(2, 2), mask, lower=0.1, upper=3.0),
    ):
        assert weights.tolist() == [[0, 0], [1, 1]]
    weights = sequence_truncated_weights(proximal, torch.zeros(2, 2), mask, cap=3.0)
    assert weights[0].tolist() == pytest.approx([0, 0], abs=1e-8)


def test_a_completion_is_rejected_as_a_whole_by_its_geometric_mean() -> None:
    log_weights = torch.tensor([[1.0, -1.0, 0.3], [0.5, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weights = geometric_masked_weights(log_weights, torch.zeros(2, 3), mask, lower=0.9, upper=1.2)
    assert weights[0].tolist() == pytest.approx([math.exp(0.1)] * 3)
    assert weights[1].tolist() == [0, 0, 0]


def test_the_golden_products_are_cut_off_and_kept_with_closed_bounds() -> None:
    ratios = torch.tensor([[0.5, 1.0, 1.0], [2.0, 1.5, 9.0], [4.0, 0.5, 1.0], [3.0, 1.5, 1.0]])
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True] * 3])
    zero = torch.zeros(4, 3)
    cut = sequence_truncated_weights(ratios.log(), zero, mask, cap=3.0)
    assert cut[:, 0].tolist() == pytest.approx([0.5, 3.0, 2.0, 3.0], rel=1e-6)
    kept = sequence_masked_weights(ratios.log(), zero, mask, lower=0.5, upper=3.0)
    assert kept[:, 0].tolist() == pytest.approx([0.5, 3.0, 2.0, 0.0], rel=1e-6)
    for weights in (cut, kept):
        assert torch.equal(weights, torch.where(mask, weights[:, :1], 0.0))


def test_a_drift_that_no_token_shows_rejects_a_long_completion_by_its_product_only() -> None:
    drift, mask = torch.full((1, 1000), 0.01), torch.ones(1, 1000, dtype=torch.bool)
    zero = torch.zeros(1, 1000)
    assert (sequence_masked_weights(drift, zero, mask, lower=0.0, upper=3.0) == 0).all()
    geometric = geometric_masked_weights(drift, zero, mask, lower=0.9, upper=1.1)
    assert geometric[0, 0] == pytest.approx(math.exp(0.01))


@pytest.mark.parametrize(
    ("product", "of_tokens"),
    [
        (FORMS["sequence_truncated"], FORMS["truncated"]),
        (FORMS["sequence_masked"], FORMS["masked"]),
        (
            lambda p, b, m: geometric_masked_weights(p, b, m, lower=0.5, upper=2.0),
            FORMS["masked"],
        ),
    ],
    ids=["truncated", "masked", "geometric"],
)
def test_for_completions_of_one_token_the_sequence_forms_are_the_token_forms(
    product: Callable[..., Tensor], of_tokens: Callable[..., Tensor]
) -> None:
    proximal, behaviour, _ = random_tokens()
    mask = torch.eye(5, 9, dtype=torch.bool)
    torch.testing.assert_close(
        product(proximal, behaviour, mask), of_tokens(proximal, behaviour, mask)
    )


def test_a_cap_that_drops_is_a_mask_without_a_lower_bound() -> None:
    proximal = torch.tensor(GOLDEN).log()[None]
    zero, mask = torch.zeros_like(proximal), torch.ones(1, 6, dtype=torch.bool)
    weights = capped_weights(proximal, zero, mask, cap=5.0)
    assert weights[0].tolist() == pytest.approx([0.4, 0.5, 1, 2, 5, 0], rel=1e-6)
    assert torch.equal(weights, masked_weights(proximal, zero, mask, lower=0.0, upper=5.0))


@pytest.mark.parametrize("name", FORMS)
def test_the_weights_keep_the_dtype_of_the_log_probabilities(name: str) -> None:
    proximal, behaviour, mask = random_tokens()
    single = FORMS[name](proximal.float(), behaviour.float(), mask)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, FORMS[name](proximal, behaviour, mask).float())


def test_the_effective_sample_size_counts_as_kish_does() -> None:
    everywhere = torch.ones(4, dtype=torch.bool)
    assert effective_sample_size(torch.full((4,), 3.0), everywhere) == 4
    assert effective_sample_size(torch.tensor([5.0, 0.0, 0.0, 0.0]), everywhere) == 1
    assert effective_sample_size(torch.tensor([1.0, 2.0, 0.0, 0.0]), everywhere).item() == (
        pytest.approx(9 / 5)
    )
    assert effective_sample_size(torch.zeros(4), everywhere) == 0
    assert effective_sample_size(torch.ones(4), ~everywhere) == 0


def test_the_mismatch_equals_the_slow_loop() -> None:
    proximal, behaviour, mask = random_tokens()
    x = (proximal - behaviour)[mask].numpy()
    result = mismatch_kl(proximal, behaviour, mask)
    assert result.kl.item() == pytest.approx(np.mean(np.exp(x) - 1 - x))
    assert result.mean_abs.item() == pytest.approx(np.mean(np.abs(x)))
    assert result.max_abs.item() == pytest.approx(np.max(np.abs(x)))


def test_the_mismatch_is_the_kl_divergence_in_expectation() -> None:
    generator = torch.Generator().manual_seed(1)
    behaviour = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    proximal = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    one = torch.ones(1, dtype=torch.bool)
    expected = sum(
        behaviour[v].exp() * mismatch_kl(proximal[v : v + 1], behaviour[v : v + 1], one).kl
        for v in range(6)
    )
    kl = (behaviour.exp() * (behaviour - proximal)).sum()
    torch.testing.assert_close(expected, kl)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_an_empty_mask_gives_zeros(shape: tuple[int, int]) -> None:
    values = torch.full(shape, math.nan)
    nothing = torch.zeros(shape, dtype=torch.bool)
    for form in FORMS.values():
        assert (form(values, values, nothing) == 0).all()
    assert [float(x) for x in mismatch_kl(values, values, nothing)] == [0, 0, 0]


def test_unusable_arguments_are_refused() -> None:
    proximal, behaviour, mask = random_tokens()
    for with_cap in (truncated_weights, capped_weights, sequence_truncated_weights):
        for cap in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="cap"):
                with_cap(proximal, behaviour, mask, cap=cap)
    for form in (masked_weights, sequence_masked_weights, geometric_masked_weights):
        for lower, upper in ((2.0, 1.0), (-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0)):
            with pytest.raises(ValueError, match="lower"):
                form(proximal, behaviour, mask, lower=lower, upper=upper)
    for weights in FORMS.values():
        with pytest.raises(ValueError, match="one shape"):
            weights(proximal, behaviour[:1], mask)
    with pytest.raises(ValueError, match="one shape"):
        mismatch_kl(proximal, behaviour, mask[:1])
    with pytest.raises(ValueError, match="one shape"):
        effective_sample_size(proximal, mask[:1])


@given(st.integers(0, 2**31), st.integers(0, 12))
@settings(max_examples=30)
def test_the_interpolated_proximal_policy_equals_the_slow_loop(seed: int, newest: int) -> None:
    target, behaviour, _ = random_tokens(seed)
    staleness = torch.arange(newest, newest + 5)[:, None]
    result = interpolated_proximal(target, behaviour, staleness)
    for row, column in np.ndindex(5, 9):
        d = int(staleness[row, 0])
        alpha = 1 / d if d >= 1 else 0.0
        expected = alpha * float(behaviour[row, column]) + (1 - alpha) * float(target[row, column])
        assert result[row, column].item() == pytest.approx(expected, abs=1e-12)
    by_token = interpolated_proximal(target, behaviour, staleness.expand(5, 9))
    assert torch.equal(by_token, result)


def test_the_proximal_policy_is_the_target_when_fresh_and_the_behaviour_one_version_later() -> None:
    target, behaviour, mask = random_tokens()
    target[0, 0] = behaviour[1, 1] = -math.inf
    fresh, one, ten = (torch.full((5, 1), d) for d in (0, 1, 10))
    assert torch.equal(interpolated_proximal(target, behaviour, fresh), target)
    assert torch.equal(interpolated_proximal(target, behaviour, one), behaviour)
    unread = torch.full_like(behaviour, math.nan)
    assert torch.equal(interpolated_proximal(target, unread, fresh), target)
    finite, _, _ = random_tokens()
    weights = truncated_weights(
        interpolated_proximal(finite, behaviour, one), behaviour, mask, cap=9
    )
    assert (weights[mask & behaviour.isfinite()] == 1).all()
    golden = interpolated_proximal(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), ten[:1])
    assert golden.item() == pytest.approx(-1.1)


def test_the_interpolated_proximal_policy_carries_no_gradient() -> None:
    target, behaviour, _ = random_tokens()
    staleness = torch.arange(5)[:, None]
    result = interpolated_proximal(target.requires_grad_(), behaviour.requires_grad_(), staleness)
    assert not result.requires_grad


def test_the_interpolated_log_weight_is_the_measured_one_divided_among_the_updates() -> None:
    target, behaviour, _ = random_tokens()
    stale = torch.full((5, 1), 4)
    proximal = interpolated_proximal(target, behaviour, stale)
    torch.testing.assert_close(target - proximal, (target - behaviour) / 4)
    torch.testing.assert_close(proximal - behaviour, (target - behaviour) * 3 / 4)


@pytest.mark.parametrize("shape", [(5,), (9,), (), (5, 2), (1, 5, 9)])
def test_a_staleness_that_is_neither_a_rows_nor_a_tokens_is_refused(shape: tuple[int, ...]) -> None:
    target, behaviour, _ = random_tokens()
    with pytest.raises(ValueError, match="staleness"):
        interpolated_proximal(target, behaviour, torch.ones(shape, dtype=torch.int64))


def test_a_negative_staleness_and_two_shapes_are_refused() -> None:
    target, behaviour, _ = random_tokens()
    with pytest.raises(ValueError, match="negative"):
        interpolated_proximal(target, behaviour, torch.tensor([[0], [1], [-1], [2], [3]]))
    with pytest.raises(ValueError, match="one shape"):
        interpolated_proximal(target, behaviour[:1], torch.ones(5, 1))
    nothing = torch.zeros(0, 9)
    assert interpolated_proximal(nothing, nothing, torch.zeros(0, 1)).shape == (0, 9)
