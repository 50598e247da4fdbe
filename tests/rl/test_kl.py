import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.kl import KLEstimator, reference_kl

ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)


def tabular(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy of nine actions, and the log-probs of another."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    reference = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    return logits, reference


def divergence(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) of two vectors of log-probs."""
    return (left.exp() * (left - right)).sum()


def estimate(delta: float, estimator: KLEstimator) -> tuple[float, float]:
    """Value and slope at a log-ratio."""
    logprobs = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
    value = reference_kl(logprobs, torch.zeros_like(logprobs), estimator=estimator).sum()
    (slope,) = torch.autograd.grad(value, logprobs)
    return value.item(), slope.item()


def slow_kl(delta: float, estimator: KLEstimator) -> float:
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta**2 / 2
    bounded = min(max(-delta, -20.0), 20.0)
    return min(math.exp(bounded) - 1 - bounded, 10.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("delta", [-800.0, -20.5, -3.0, -0.4, 0.0, 0.4, 3.0, 10.9, 800.0])
def test_every_estimator_equals_its_formula(delta: float, estimator: KLEstimator) -> None:
    assert estimate(delta, estimator)[0] == pytest.approx(slow_kl(delta, estimator), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_is_that_of_the_formula(estimator: KLEstimator) -> None:
    logits, reference = tabular(0)
    assert torch.autograd.gradcheck(
        lambda x: reference_kl(x, reference, estimator=estimator),
        (logits.log_softmax(-1).requires_grad_(),),
    )


@pytest.mark.parametrize(
    ("delta", "estimator", "value", "slope"),
    [
        (0.4, "k1", 0.4, 1.0),
        (0.4, "k2", 0.08, 0.4),
        (0.4, "k3", 0.0703200, 0.32968),
        (-0.4, "k1", -0.4, 1.0),
        (-0.4, "k2", 0.08, -0.4),
        (-0.4, "k3", 0.0918247, -0.4918247),
        (0.01, "k3", 4.9834e-5, 0.0099502),
        (-0.01, "k3", 5.0167e-5, -0.0100502),
    ],
)
def test_the_estimators_have_the_golden_values_and_slopes(
    delta: float, estimator: KLEstimator, value: float, slope: float
) -> None:
    assert estimate(delta, estimator) == pytest.approx((value, slope), rel=2e-5)


def test_equal_policies_have_no_divergence_and_only_k1_has_a_slope() -> None:
    assert estimate(0.0, "k1") == (0.0, 1.0)
    assert estimate(0.0, "k2") == (0.0, 0.0)
    assert estimate(0.0, "k3") == (0.0, 0.0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_under_the_current_policy_is_the_divergence(estimator: KLEstimator) -> None:
    logits, reference = tabular(1)
    current = logits.log_softmax(-1)
    mean = (current.exp() * reference_kl(current, reference, estimator=estimator)).sum()
    torch.testing.assert_close(mean, divergence(current, reference))


def test_the_mean_gradients_under_the_current_policy_are_those_of_three_divergences() -> None:
    """k1: of none. k2: of KL(current || reference). k3: of KL(reference || current)."""
    logits, reference = tabular(2)
    logits.requires_grad_()
    current = logits.log_softmax(-1)
    zero = (logits * 0).sum()
    expected: dict[KLEstimator, Tensor] = {
        "k1": zero,
        "k2": divergence(current, reference),
        "k3": divergence(reference, current),
    }
    for estimator, target in expected.items():
        sampled = reference_kl(current, reference, estimator=estimator)
        mean = (current.exp().detach() * sampled).sum()
        (grad,) = torch.autograd.grad(mean, logits, retain_graph=True)
        (target_grad,) = torch.autograd.grad(target, logits, retain_graph=True)
        torch.testing.assert_close(grad, target_grad)


@given(st.floats(-1000, 1000, width=32))
def test_k2_and_k3_are_never_negative_and_never_push_away_from_the_reference(
    delta: float,
) -> None:
    logprobs = torch.tensor([delta], requires_grad=True)
    for estimator in ("k2", "k3"):
        values = reference_kl(logprobs, torch.zeros(1), estimator=estimator)
        (slope,) = torch.autograd.grad(values.sum(), logprobs)
        assert values >= 0
        assert slope.isfinite().all()
        assert slope.item() * delta >= 0


@pytest.mark.parametrize("delta", [-25.0, -2.7, 11.1, 25.0])
def test_beyond_the_cut_k3_is_ten_without_a_gradient(delta: float) -> None:
    assert estimate(delta, "k3") == (10.0, 0.0)


@pytest.mark.parametrize("delta", [-2.6, 10.9])
def test_within_the_cut_k3_has_a_gradient(delta: float) -> None:
    value, slope = estimate(delta, "k3")
    assert value < 10
    assert slope == pytest.approx(1 - math.exp(-delta))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dirty", range(2))
def test_a_token_that_is_not_finite_is_nan_and_has_no_gradient(
    dirty: int, garbage: float, estimator: KLEstimator
) -> None:
    tensors = [torch.tensor([-0.5, -1.0]), torch.tensor([-0.7, -0.6])]
    tensors[dirty][0] = garbage
    logprobs = tensors[0].requires_grad_()
    values = reference_kl(logprobs, tensors[1], estimator=estimator)
    assert values.isnan().tolist() == [True, False]
    (grad,) = torch.autograd.grad(values.nansum(), logprobs)
    assert grad[0] == 0
    assert grad[1] != 0


def test_no_gradient_reaches_the_reference() -> None:
    logprobs, reference = (torch.zeros(2, requires_grad=True) for _ in range(2))
    torch.autograd.backward(reference_kl(logprobs, reference, estimator="k1").sum())
    assert logprobs.grad is not None
    assert reference.grad is None


def test_unknown_estimators_and_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="'abs'"):
        reference_kl(torch.zeros(2), torch.zeros(2), estimator="abs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        reference_kl(torch.zeros(2), torch.zeros(1), estimator="k1")
