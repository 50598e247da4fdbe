import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.loss import aggregate, clipped_surrogate, gspo_surrogate

LOW, HIGH = 3e-4, 4e-4
ENDLESS = 1e12
GOLDEN_DELTA = [0.01, -0.02, 0.03, 0.0]
GOLDEN_RATIO = 1.005012521


def random_rows(
    seed: int, spread: float = 0.01, shape: tuple[int, int] = (8, 6)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, one advantage a row, and a mask with a token in every row."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    logprobs = old + torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    advantages = torch.randn((shape[0], 1), generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[:, 0] = True
    return logprobs, old, advantages.expand(shape).clone(), mask


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, logprobs)
    return grad


def sequence_mean(losses: Tensor, mask: Tensor) -> Tensor:
    return aggregate(losses, mask, mode="seq-mean-token-mean")


def slow_rows(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """GSPO's sequence-level objective, row by row, differentiable through the mean."""
    losses = []
    for row in range(len(logprobs)):
        shown = mask[row]
        ratio = (logprobs[row][shown] - old[row][shown]).mean().exp()
        advantage = advantages[row, 0]
        clipped = ratio.clamp(1 - LOW, 1 + HIGH)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return torch.stack(losses)


def test_every_token_of_a_row_has_the_golden_ratio() -> None:
    delta = torch.tensor([[*GOLDEN_DELTA, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False]])
    old = torch.full_like(delta, -2.0)
    losses = gspo_surrogate(
        old + delta, old, -torch.ones_like(delta), mask, clip_low=1.0, clip_high=ENDLESS
    )
    assert losses[mask].tolist() == pytest.approx([GOLDEN_RATIO] * 4, abs=1e-9)


def test_the_mean_over_a_row_has_the_value_and_gradient_of_the_sequence_level_objective() -> None:
    logprobs, old, advantages, mask = random_rows(0, spread=3e-4)
    logprobs.requires_grad_()
    losses = gspo_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    loss = sequence_mean(losses, mask)
    expected = slow_rows(logprobs, old, advantages, mask).mean()
    torch.testing.assert_close(loss, expected)
    grad = gradient(loss, logprobs)
    torch.testing.assert_close(grad, gradient(expected, logprobs))
    has_gradient = (grad != 0).any(-1)
    assert has_gradient.any()
    assert not has_gradient.all(), "no row was clipped, so the clip was not tried"


def test_a_row_is_clipped_as_a_whole() -> None:
    logprobs, old, advantages, mask = random_rows(1, spread=0.1)
    logprobs.requires_grad_()
    losses = gspo_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    grad = gradient(losses.sum(), logprobs)
    assert ((grad == 0).all(-1) | (grad != 0).all(-1)).all()
    ratio = (torch.where(mask, logprobs - old, 0.0).sum(-1) / mask.sum(-1)).exp()
    advantage = advantages[:, 0]
    binds = ((advantage > 0) & (ratio > 1 + HIGH)) | ((advantage < 0) & (ratio < 1 - LOW))
    assert torch.equal((grad == 0).all(-1), binds)


def test_on_rows_of_one_token_it_is_ppo() -> None:
    logprobs, old, advantages, _ = random_rows(2, spread=0.3)
    logprobs, old, advantages = (tensor.reshape(-1, 1) for tensor in (logprobs, old, advantages))
    logprobs.requires_grad_()
    everywhere = torch.ones(logprobs.shape, dtype=torch.bool)
    gspo = gspo_surrogate(logprobs, old, advantages, everywhere, clip_low=0.2, clip_high=0.28)
    ppo = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(gspo, ppo)
    torch.testing.assert_close(gradient(gspo.sum(), logprobs), gradient(ppo.sum(), logprobs))


def test_on_policy_it_has_the_plain_policy_gradient_on_every_token() -> None:
    old, _, advantages, mask = random_rows(3)
    logprobs = old.clone().requires_grad_()
    losses = gspo_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close(losses, -advantages)
    torch.testing.assert_close(gradient(losses.sum(), logprobs), -advantages)


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=8), st.floats(-1, 1), st.integers(0, 5))
def test_padding_and_the_order_of_tokens_do_not_change_the_ratio(
    deltas: list[float], padding: float, num_padding: int
) -> None:
    def ratio(values: list[float], shown: list[bool]) -> float:
        delta = torch.tensor([values], dtype=torch.float64)
        losses = gspo_surrogate(
            delta,
            torch.zeros_like(delta),
            -torch.ones_like(delta),
            torch.tensor([shown]),
            clip_low=1.0,
            clip_high=ENDLESS,
        )
        return losses[0, shown.index(True)].item()

    plain = ratio(deltas, [True] * len(deltas))
    assert plain == pytest.approx(math.exp(sum(deltas) / len(deltas)))
    shown = [False] * num_padding + [True] * len(deltas)
    assert ratio([padding] * num_padding + deltas[::-1], shown) == pytest.approx(plain)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize("dirty", range(3))
def test_a_token_outside_the_mask_never_reaches_its_row(dirty: int, garbage: float) -> None:
    *clean, mask = random_rows(4)
    hidden = (1, int((~mask[1]).nonzero()[0]))
    reference = clean[0].clone().requires_grad_()
    expected = sequence_mean(
        gspo_surrogate(reference, clean[1], clean[2], mask, clip_low=LOW, clip_high=HIGH), mask
    )
    tensors = [tensor.clone() for tensor in clean]
    tensors[dirty][hidden] = garbage
    logprobs = tensors[0].requires_grad_()
    loss = sequence_mean(
        gspo_surrogate(logprobs, tensors[1], tensors[2], mask, clip_low=LOW, clip_high=HIGH), mask
    )
    assert torch.equal(loss, expected)
    grad = gradient(loss, logprobs)
    assert torch.equal(grad, gradient(expected, reference))
    assert grad[hidden] == 0


@pytest.mark.parametrize("garbage", [math.nan, -math.inf])
@pytest.mark.parametrize("dirty", range(2))
def test_a_token_that_is_not_finite_is_nan_and_leaves_its_row_alone(
    dirty: int, garbage: float
) -> None:
    delta = torch.tensor([[*GOLDEN_DELTA, 7.0]], dtype=torch.float64)
    tensors = [delta.clone(), torch.zeros_like(delta)]
    tensors[dirty][0, 4] = garbage
    logprobs = tensors[0].requires_grad_()
    mask = torch.ones(delta.shape, dtype=torch.bool)
    losses = gspo_surrogate(
        logprobs, tensors[1], -torch.ones_like(delta), mask, clip_low=1.0, clip_high=ENDLESS
    )
    assert losses[0, :4].tolist() == pytest.approx([GOLDEN_RATIO] * 4, abs=1e-9)
    assert losses[0, 4].isnan()
    assert sequence_mean(losses, mask).isnan()
    grad = gradient(losses.nansum(), logprobs)
    assert grad[0].tolist() == pytest.approx([GOLDEN_RATIO] * 4 + [0.0], abs=1e-9)


def test_a_row_without_tokens_has_no_part_in_the_loss() -> None:
    logprobs, old, advantages, mask = random_rows(5)
    mask[3] = False
    logprobs.requires_grad_()
    losses = gspo_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    assert losses.isfinite().all()
    grad = gradient(sequence_mean(losses, mask), logprobs)
    assert (grad[3] == 0).all()
    kept = [row for row in range(8) if row != 3]
    expected = slow_rows(logprobs[kept], old[kept], advantages[kept], mask[kept]).mean()
    torch.testing.assert_close(sequence_mean(losses, mask), expected)


@pytest.mark.parametrize("delta", [800.0, -800.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_absurd_log_ratio_stays_finite_in_value_and_gradient(
    delta: float, advantage: float
) -> None:
    logprobs = torch.tensor([[delta, delta, -0.5]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses = gspo_surrogate(
        logprobs,
        torch.zeros(1, 3),
        torch.full((1, 3), advantage),
        mask,
        clip_low=1.0,
        clip_high=ENDLESS,
    )
    assert losses.isfinite().all()
    assert gradient(losses.sum(), logprobs).isfinite().all()


def test_no_gradient_reaches_the_old_logprobs_or_the_advantages() -> None:
    *tensors, mask = random_rows(6)
    logprobs, old, advantages = (tensor.requires_grad_() for tensor in tensors)
    losses = gspo_surrogate(logprobs, old, advantages, mask, clip_low=1.0, clip_high=1.0)
    torch.autograd.backward(losses.sum())
    assert logprobs.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_bounds_out_of_range_and_shapes_that_would_broadcast_are_refused() -> None:
    logprobs, old, advantages, mask = random_rows(7)
    with pytest.raises(ValueError, match="clip_low"):
        gspo_surrogate(logprobs, old, advantages, mask, clip_low=1.1, clip_high=HIGH)
    with pytest.raises(ValueError, match="clip_high"):
        gspo_surrogate(logprobs, old, advantages, mask, clip_low=LOW, clip_high=-0.1)
    with pytest.raises(ValueError, match="one shape"):
        gspo_surrogate(logprobs, old, advantages, mask[:1], clip_low=LOW, clip_high=HIGH)
    with pytest.raises(ValueError, match="one shape"):
        gspo_surrogate(logprobs, old, advantages[:, :1], mask, clip_low=LOW, clip_high=HIGH)
