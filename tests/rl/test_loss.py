import math
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.loss import (
    Penalty,
    aggregate,
    cispo_surrogate,
    clip_cov_surrogate,
    clipped_surrogate,
    high_probability_surrogate,
    kl_cov_surrogate,
    ppo_clipped,
    unclipped_surrogate,
)

PENALTIES = get_args(Penalty)
NONE = torch.zeros(2, 3, dtype=torch.bool)
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]

# T5 of the specification; the last token is masked.
LOGPROBS = torch.tensor([[-0.1, -1.8, -0.6], [-1.2, -0.3, -2.6]], dtype=torch.float64)
OLD = torch.tensor([[-0.1, -2.0, -0.5], [-1.0, -0.3, -3.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.5] * 3, [-1.0] * 3], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def surrogates(selected: Tensor) -> dict[str, Surrogate]:
    """Every per-token loss, as a function of the three tensors."""
    return {
        "vanilla": lambda n, o, a: clipped_surrogate(n, o, a, clip_low=0.2, clip_high=0.2),
        "dual": lambda n, o, a: clipped_surrogate(
            n, o, a, clip_low=0.2, clip_high=0.28, dual_clip=3.0
        ),
        "clip_cov": lambda n, o, a: clip_cov_surrogate(
            n, o, a, selected=selected, clip_low=1.0, clip_high=1.0
        ),
        **{f"kl_cov_{penalty}": kl_cov(selected, penalty) for penalty in PENALTIES},
        "unclipped": unclipped_surrogate,
        "cispo": partial(cispo_surrogate, clip_low=0.2, clip_high=0.28),
        "high_probability": partial(high_probability_surrogate, threshold=0.5),
    }


def kl_cov(selected: Tensor, penalty: Penalty) -> Surrogate:
    return lambda n, o, a: kl_cov_surrogate(
        n, o, a, selected=selected, kl_coef=0.7, penalty=penalty
    )


def random_tokens(seed: int, shape: tuple[int, ...] = (4, 7)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    logprobs = old + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    return logprobs, old, advantages


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, logprobs)
    return grad


def token_mean(token_loss: Tensor, mask: Tensor) -> Tensor:
    return aggregate(token_loss, mask, mode="token-mean")


def slow_surrogate(
    name: str, logp: float, old: float, advantage: float, is_selected: bool
) -> float:
    """Each loss of section 1 of the specification, one token."""
    ratio = math.exp(logp - old)

    def clipped(low: float, high: float) -> float:
        return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))

    if name == "vanilla":
        return clipped(0.2, 0.2)
    if name == "dual":
        loss = clipped(0.2, 0.28)
        return min(loss, -advantage * 3.0) if advantage < 0 else loss
    if name == "clip_cov":
        return 0.0 if is_selected else clipped(1.0, 1.0)
    if name == "unclipped":
        return -advantage * ratio
    if name == "cispo":
        return -min(max(ratio, 0.8), 1.28) * advantage * logp
    if name == "high_probability":
        return -ratio * abs(advantage) if math.exp(old) > 0.5 else 0.0
    delta = logp - old
    penalty = {"abs": abs(delta), "k2": delta**2 / 2, "k3": ratio - 1 - delta}[name[7:]]
    return -advantage * ratio + (0.7 * penalty if is_selected else 0.0)


@pytest.mark.parametrize("name", surrogates(NONE))
def test_every_surrogate_equals_the_slow_loop(name: str) -> None:
    logprobs, old, advantages = random_tokens(0)
    selected = torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    losses = surrogates(selected)[name](logprobs, old, advantages)
    assert losses.shape == logprobs.shape
    for index in np.ndindex(*logprobs.shape):
        logp, before, advantage = (float(t[index]) for t in (logprobs, old, advantages))
        expected = slow_surrogate(name, logp, before, advantage, bool(selected[index]))
        assert float(losses[index]) == pytest.approx(expected, rel=1e-12), index


@pytest.mark.parametrize("name", [name for name in surrogates(NONE) if name != "high_probability"])
def test_on_policy_every_policy_loss_has_the_plain_policy_gradient(name: str) -> None:
    old = LOGPROBS
    logprobs = old.clone().requires_grad_()
    expected = -ADVANTAGES * MASK / 5
    selected = torch.zeros_like(MASK) if name == "clip_cov" else MASK
    losses = surrogates(selected)[name](logprobs, old, ADVANTAGES)
    torch.testing.assert_close(gradient(token_mean(losses, MASK), logprobs), expected)
    if name == "kl_cov_abs":  # T9, in numbers
        assert expected.flatten().tolist() == pytest.approx([-0.3] * 3 + [0.2, 0.2, 0.0])


def test_the_golden_batch_has_the_golden_losses() -> None:
    wide = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, clip_low=1.0, clip_high=1.0)
    assert token_mean(wide, MASK).item() == pytest.approx(-0.574125902, abs=1e-9)
    ppo = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    assert token_mean(ppo, MASK).item() == pytest.approx(-0.567705075, abs=1e-9)
    low, high = ppo_clipped(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2)
    assert not low.any()
    assert high.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize(("chosen", "loss"), [((0, 0), -0.274125902), ((1, 0), -0.737872053)])
def test_clip_cov_drops_the_chosen_token_and_keeps_the_denominator(
    chosen: tuple[int, int], loss: float
) -> None:
    selected = torch.zeros_like(MASK)
    selected[chosen] = True
    logprobs = LOGPROBS.clone().requires_grad_()
    losses = clip_cov_surrogate(
        logprobs, OLD, ADVANTAGES, selected=selected, clip_low=1.0, clip_high=1.0
    )
    total = token_mean(losses, MASK)
    assert total.item() == pytest.approx(loss, abs=1e-9)
    expected = -ADVANTAGES * (LOGPROBS - OLD).exp() / 5 * (MASK & ~selected)
    grad = gradient(total, logprobs)
    assert grad[chosen] == 0
    torch.testing.assert_close(grad, expected)


def test_a_ppo_clipped_token_keeps_its_loss_beside_a_full_clip_cov_selection() -> None:
    low, high = ppo_clipped(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2)
    logprobs = LOGPROBS.clone().requires_grad_()
    losses = clip_cov_surrogate(
        logprobs,
        OLD,
        ADVANTAGES,
        selected=MASK & ~(low | high),
        clip_low=0.2,
        clip_high=0.2,
    )
    total = token_mean(losses, MASK)
    assert total.item() == pytest.approx(-0.36, abs=1e-12)
    assert (gradient(total, logprobs) == 0).all()


@pytest.mark.parametrize(
    ("delta", "penalty", "value", "slope"),
    [
        (0.4, "abs", 0.4, 1.0),
        (0.4, "k2", 0.08, 0.4),
        (0.4, "k3", 0.0918247, 0.4918247),
        (-0.4, "abs", 0.4, -1.0),
        (-0.4, "k2", 0.08, -0.4),
        (-0.4, "k3", 0.0703200, -0.32968),
        (0.01, "k3", 5.0167e-5, 0.0100502),
        (-0.01, "k3", 4.9834e-5, -0.0099502),
        (0.0, "abs", 0.0, 0.0),
        (0.0, "k2", 0.0, 0.0),
        (0.0, "k3", 0.0, 0.0),
    ],
)
def test_the_penalties_have_the_golden_values_and_slopes(
    delta: float, penalty: Penalty, value: float, slope: float
) -> None:
    logprobs = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    selected = torch.ones(1, dtype=torch.bool)
    loss = kl_cov_surrogate(
        logprobs, zero, zero, selected=selected, kl_coef=1.0, penalty=penalty
    ).sum()
    assert loss.item() == pytest.approx(value, rel=2e-5, abs=1e-12)
    assert gradient(loss, logprobs).item() == pytest.approx(slope, rel=2e-5, abs=1e-12)


def test_the_mean_of_k3_under_the_old_policy_is_the_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    new = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    everywhere = torch.ones(9, dtype=torch.bool)
    k3 = kl_cov_surrogate(
        new, old, torch.zeros_like(new), selected=everywhere, kl_coef=1.0, penalty="k3"
    )
    kl = (old.exp() * (old - new)).sum()
    torch.testing.assert_close((old.exp() * k3).sum(), kl)


def test_an_empty_clip_cov_selection_is_ppo() -> None:
    tokens = random_tokens(5)
    selected = torch.zeros(tokens[0].shape, dtype=torch.bool)
    for low, high in ((0.2, 0.28), (1.0, 1.0)):
        assert torch.equal(
            clip_cov_surrogate(*tokens, selected=selected, clip_low=low, clip_high=high),
            clipped_surrogate(*tokens, clip_low=low, clip_high=high),
        )


def test_kl_cov_with_coefficient_zero_is_the_unclipped_policy_gradient() -> None:
    logprobs, old, advantages = random_tokens(6)
    everywhere = torch.ones(logprobs.shape, dtype=torch.bool)
    losses = kl_cov_surrogate(
        logprobs, old, advantages, selected=everywhere, kl_coef=0.0, penalty="abs"
    )
    torch.testing.assert_close(losses, -advantages * (logprobs - old).exp())


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has_the_ratio() -> None:
    logprobs, old, advantages = random_tokens(7)
    logprobs.requires_grad_()
    everywhere = torch.ones(logprobs.shape, dtype=torch.bool)
    low, high = ppo_clipped(logprobs, old, advantages, everywhere, clip_low=0.2, clip_high=0.28)
    losses = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    grad = gradient(losses.sum(), logprobs)
    expected = -advantages * (logprobs - old).exp().detach()
    clipped = low | high
    assert low.any()
    assert high.any()
    assert not clipped.all()
    assert not (low & high).any()
    assert (grad[clipped] == 0).all()
    torch.testing.assert_close(grad[~clipped], expected[~clipped])


def test_unclipped_is_kl_cov_of_coefficient_zero_and_ppo_within_endless_bounds() -> None:
    logprobs, old, advantages = random_tokens(9)
    logprobs.requires_grad_()
    everywhere = torch.ones(logprobs.shape, dtype=torch.bool)
    unclipped = unclipped_surrogate(logprobs, old, advantages)
    grad = gradient(unclipped.sum(), logprobs)
    torch.testing.assert_close(grad, -advantages * (logprobs - old).exp().detach())
    for other in (
        kl_cov_surrogate(logprobs, old, advantages, selected=everywhere, kl_coef=0.0, penalty="k3"),
        clipped_surrogate(logprobs, old, advantages, clip_low=1.0, clip_high=1e12),
    ):
        torch.testing.assert_close(other, unclipped)
        torch.testing.assert_close(gradient(other.sum(), logprobs), grad)


def test_cispo_clips_the_weight_and_never_the_gradient() -> None:
    logprobs, old, advantages = random_tokens(10)
    logprobs.requires_grad_()
    everywhere = torch.ones(logprobs.shape, dtype=torch.bool)
    low, high = ppo_clipped(logprobs, old, advantages, everywhere, clip_low=0.2, clip_high=0.28)
    grad = gradient(
        cispo_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.28).sum(), logprobs
    )
    weights = (logprobs - old).exp().detach().clamp(0.8, 1.28)
    torch.testing.assert_close(grad, -weights * advantages)
    assert low.any()
    assert high.any()
    assert (grad[low] > 0).all()  # PPO has no gradient on these
    assert (grad[high] < 0).all()


def test_cispo_within_endless_bounds_has_the_gradient_of_the_unclipped_loss() -> None:
    logprobs, old, advantages = random_tokens(11)
    logprobs.requires_grad_()
    cispo = cispo_surrogate(logprobs, old, advantages, clip_low=1.0, clip_high=1e12)
    unclipped = unclipped_surrogate(logprobs, old, advantages)
    torch.testing.assert_close(gradient(cispo.sum(), logprobs), gradient(unclipped.sum(), logprobs))


def test_only_likely_tokens_are_pushed_up_whatever_the_sign_of_the_advantage() -> None:
    old = torch.tensor([0.96, 0.96, 0.94, 0.94], dtype=torch.float64).log()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    logprobs = (old - 0.5).requires_grad_()
    losses = high_probability_surrogate(logprobs, old, advantages, threshold=0.95)
    expected = [-2 * math.exp(-0.5)] * 2 + [0.0] * 2
    assert losses.tolist() == pytest.approx(expected)
    assert gradient(losses.sum(), logprobs).tolist() == pytest.approx(expected)


def test_a_token_at_the_threshold_is_not_likely() -> None:
    old = torch.tensor([0.5]).log()
    (probability,) = old.exp().tolist()
    losses = high_probability_surrogate(old, old, torch.ones(1), threshold=probability)
    assert losses.tolist() == [0.0]


@given(
    delta=st.floats(-3, 3),
    advantage=st.floats(-5, 5),
    low=st.floats(0, 1),
    high=st.floats(0, 5),
)
def test_ppo_never_promises_more_than_the_unclipped_loss(
    delta: float, advantage: float, low: float, high: float
) -> None:
    logprobs, old, advantages = (
        torch.tensor([number], dtype=torch.float64) for number in (delta - 3, -3.0, advantage)
    )
    clipped = clipped_surrogate(logprobs, old, advantages, clip_low=low, clip_high=high)
    assert clipped >= unclipped_surrogate(logprobs, old, advantages)


@pytest.mark.parametrize("name", ["unclipped", "high_probability", "kl_cov_k3"])
def test_smooth_surrogates_pass_gradcheck(name: str) -> None:
    logprobs, old, advantages = random_tokens(12, (2, 3))
    surrogate = surrogates(torch.ones(2, 3, dtype=torch.bool))[name]
    assert torch.autograd.gradcheck(
        lambda x: surrogate(x, old, advantages), (logprobs.requires_grad_(),)
    )


def test_dual_clip_only_bounds_a_large_ratio_of_a_bad_token() -> None:
    logprobs = torch.tensor([2.0, 2.0, 0.5, -2.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    old = torch.zeros(4)
    without = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)
    bounded = clipped_surrogate(
        logprobs, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    assert bounded[0] == 3.0
    assert without[0] == pytest.approx(math.exp(2))
    assert torch.equal(bounded[1:], without[1:])


@pytest.mark.parametrize("name", surrogates(NONE))
@pytest.mark.parametrize("delta", [800.0, -800.0])
def test_an_absurd_log_ratio_stays_finite_in_value_and_gradient(name: str, delta: float) -> None:
    logprobs = torch.tensor([delta, -0.5], requires_grad=True)
    selected = torch.tensor([name != "clip_cov", False])
    for advantage in (1.0, -1.0):
        losses = surrogates(selected)[name](logprobs, torch.zeros(2), torch.full((2,), advantage))
        assert losses.isfinite().all()
        assert gradient(losses.sum(), logprobs).isfinite().all()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("delta", [30.0, -30.0])
def test_no_penalty_pushes_further_away_beyond_the_clamp(penalty: Penalty, delta: float) -> None:
    logprobs = torch.tensor([delta], requires_grad=True)
    losses = kl_cov_surrogate(
        logprobs,
        torch.zeros(1),
        torch.zeros(1),
        selected=torch.ones(1, dtype=torch.bool),
        kl_coef=1.0,
        penalty=penalty,
    )
    assert gradient(losses.sum(), logprobs).item() * delta >= 0


@pytest.mark.parametrize("name", surrogates(NONE))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
def test_a_masked_token_never_reaches_the_loss_even_when_it_is_nan(
    name: str, garbage: float
) -> None:
    clean = [t.float() for t in (LOGPROBS, OLD, ADVANTAGES)]
    expected_at = clean[0].clone().requires_grad_()
    expected = token_mean(surrogates(MASK)[name](expected_at, *clean[1:]), MASK)
    expected_grad = gradient(expected, expected_at)
    for dirty in range(3):
        tensors = [t.clone() for t in clean]
        tensors[dirty][1, 2] = garbage
        tensors[0].requires_grad_()
        loss = token_mean(surrogates(MASK)[name](*tensors), MASK)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient(loss, tensors[0]), expected_grad)
        assert expected_grad[1, 2] == 0


@pytest.mark.parametrize("name", surrogates(NONE))
def test_a_nan_inside_the_mask_is_seen(name: str) -> None:
    for dirty in range(3):
        tensors = [t.clone() for t in (LOGPROBS, OLD, ADVANTAGES)]
        tensors[dirty][0, 0] = math.nan
        losses = surrogates(NONE)[name](*tensors)
        assert losses.isnan().nonzero().tolist() == [[0, 0]]
        assert token_mean(losses, MASK).isnan()


@pytest.mark.parametrize("name", surrogates(NONE))
def test_no_gradient_reaches_the_old_logprobs_or_the_advantages(name: str) -> None:
    tensors = [t.clone().requires_grad_() for t in (LOGPROBS, OLD, ADVANTAGES)]
    losses = surrogates(NONE)[name](*tensors)
    torch.autograd.backward(losses.sum())
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[2].grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
    ],
)
def test_bounds_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    bounds = {"clip_low": 0.2, "clip_high": 0.2} | change
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, **bounds)
    if "dual_clip" not in change:
        with pytest.raises(ValueError, match=message):
            cispo_surrogate(LOGPROBS, OLD, ADVANTAGES, **bounds)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        high_probability_surrogate(LOGPROBS, OLD, ADVANTAGES, threshold=threshold)


def test_shapes_that_would_broadcast_are_refused() -> None:
    column = ADVANTAGES[:, :1]
    for surrogate in surrogates(NONE).values():
        with pytest.raises(ValueError, match="one shape"):
            surrogate(LOGPROBS, OLD, column)
        with pytest.raises(ValueError, match="one shape"):
            surrogate(LOGPROBS, OLD[:1], ADVANTAGES)
    with pytest.raises(ValueError, match="one shape"):
        clip_cov_surrogate(
            LOGPROBS, OLD, ADVANTAGES, selected=MASK[:, :1], clip_low=1.0, clip_high=1.0
        )
    with pytest.raises(ValueError, match="one shape"):
        kl_cov_surrogate(
            LOGPROBS, OLD, ADVANTAGES, selected=MASK[:, :1], kl_coef=1.0, penalty="abs"
        )
    with pytest.raises(ValueError, match="one shape"):
        ppo_clipped(LOGPROBS, OLD, ADVANTAGES, MASK[:1], clip_low=0.2, clip_high=0.2)


def test_unknown_names_and_negative_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match="penalty"):
        kl_cov_surrogate(
            LOGPROBS,
            OLD,
            ADVANTAGES,
            selected=MASK,
            kl_coef=1.0,
            penalty="k1",  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match="kl_coef"):
        kl_cov_surrogate(LOGPROBS, OLD, ADVANTAGES, selected=MASK, kl_coef=-1.0, penalty="k3")
