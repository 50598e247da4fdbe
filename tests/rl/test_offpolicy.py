import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.rl.offpolicy import (
    effective_sample_size,
    masked_weights,
    mismatch_kl,
    sequence_masked_weights,
    truncated_weights,
)

GOLDEN = [0.4, 0.5, 1.0, 2.0, 5.0, 6.0]

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "truncated": lambda p, b, m: truncated_weights(p, b, m, cap=2.0),
    "masked": lambda p, b, m: masked_weights(p, b, m, lower=0.5, upper=2.0),
    "sequence": lambda p, b, m: sequence_masked_weights(p, b, m, lower=0.8, upper=1.25),
}


def random_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(5, 9, generator=generator, dtype=torch.float64) * 3
    proximal = behaviour + torch.randn(5, 9, generator=generator, dtype=torch.float64) * 0.6
    mask = torch.rand(5, 9, generator=generator) < 0.7
    mask[3] = False
    return proximal, behaviour, mask


def slow_weights(name: str, proximal: Tensor, behaviour: Tensor, mask: Tensor) -> np.ndarray:
    """Section 3.7 of the specification, token by token."""
    weights = np.zeros(mask.shape)
    for row, column in np.ndindex(*mask.shape):
        if not mask[row, column]:
            continue
        if name == "sequence":
            tokens = [t for t in range(mask.shape[1]) if mask[row, t]]
            w = math.exp(np.mean([float(proximal[row, t] - behaviour[row, t]) for t in tokens]))
            w = w if 0.8 <= w <= 1.25 else 0.0
        else:
            w = math.exp(float(proximal[row, column] - behaviour[row, column]))
            w = min(w, 2.0) if name == "truncated" else (w if 0.5 <= w <= 2.0 else 0.0)
        weights[row, column] = w
    return weights


@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_the_slow_loop(name: str) -> None:
    proximal, behaviour, mask = random_tokens()
    weights = FORMS[name](proximal, behaviour, mask)
    expected = slow_weights(name, proximal, behaviour, mask)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
    assert 0 < (expected > 0).sum() < mask.sum() or name == "truncated"


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


def test_a_completion_is_rejected_as_a_whole_by_its_geometric_mean() -> None:
    log_weights = torch.tensor([[1.0, -1.0, 0.3], [0.5, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weights = sequence_masked_weights(log_weights, torch.zeros(2, 3), mask, lower=0.9, upper=1.2)
    assert weights[0].tolist() == pytest.approx([math.exp(0.1)] * 3)
    assert weights[1].tolist() == [0, 0, 0]


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
    for cap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="cap"):
            truncated_weights(proximal, behaviour, mask, cap=cap)
    for form in (masked_weights, sequence_masked_weights):
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
