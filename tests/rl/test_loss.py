import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.rl.loss import (
    Aggregation,
    Penalty,
    aggregate,
    clip_cov_surrogate,
    clipped_surrogate,
    kl_cov_surrogate,
    ppo_clipped,
)

MODES = get_args(Aggregation)
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


@pytest.mark.parametrize("name", surrogates(NONE))
def test_on_policy_every_surrogate_has_the_plain_policy_gradient(name: str) -> None:
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
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
def test_a_masked_token_never_reaches_the_loss_even_when_it_is_nan(
    name: str, mode: Aggregation, garbage: float
) -> None:
    clean = [t.float() for t in (LOGPROBS, OLD, ADVANTAGES)]
    expected_at = clean[0].clone().requires_grad_()
    expected = aggregate(surrogates(MASK)[name](expected_at, *clean[1:]), MASK, mode=mode)
    expected_grad = gradient(expected, expected_at)
    for dirty in range(3):
        tensors = [t.clone() for t in clean]
        tensors[dirty][1, 2] = garbage
        tensors[0].requires_grad_()
        loss = aggregate(surrogates(MASK)[name](*tensors), MASK, mode=mode)
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


def test_no_gradient_reaches_the_old_logprobs_or_the_advantages() -> None:
    tensors = [t.clone().requires_grad_() for t in (LOGPROBS, OLD, ADVANTAGES)]
    losses = clipped_surrogate(*tensors, clip_low=0.2, clip_high=0.2)
    torch.autograd.backward(losses.sum())
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_token_mean_and_sequence_mean_differ_as_in_the_golden_rows() -> None:
    values = torch.tensor([[0.2, 0.4, 9.0, 9.0], [1.0] * 4])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    assert aggregate(values, mask, mode="token-mean").item() == pytest.approx(0.766667, abs=1e-6)
    assert aggregate(values, mask, mode="seq-mean-token-mean").item() == pytest.approx(0.65)
    assert aggregate(values, mask, mode="seq-mean-token-sum").item() == pytest.approx(2.3)


def test_a_row_without_tokens_does_not_count_as_a_sequence() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert aggregate(values, mask, mode="seq-mean-token-sum") == 4.0
    assert aggregate(values, mask, mode="seq-mean-token-mean") == 2.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_an_empty_mask_gives_zero_with_a_gradient_of_zero(
    mode: Aggregation, shape: tuple[int, int]
) -> None:
    values = torch.full(shape, math.nan, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    for denominator in (None, 5.0):
        loss = aggregate(values, mask, mode=mode, denominator=denominator)
        assert loss == 0
        assert (gradient(loss, values) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_over_the_common_denominator_add_up_to_the_whole(mode: Aggregation) -> None:
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[2] = False
    count = mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).sum()
    parts = [
        aggregate(values[rows], mask[rows], mode=mode, denominator=count)
        for rows in ([0, 1], [2], [3, 4, 5])
    ]
    torch.testing.assert_close(sum(parts), aggregate(values, mask, mode=mode))


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


def test_shapes_that_would_broadcast_are_refused() -> None:
    column = ADVANTAGES[:, :1]
    with pytest.raises(ValueError, match="one shape"):
        clipped_surrogate(LOGPROBS, OLD, column, clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match="one shape"):
        aggregate(LOGPROBS, MASK[:1], mode="token-mean")
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
    with pytest.raises(ValueError, match="token-sum"):
        aggregate(LOGPROBS, MASK, mode="token-sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="denominator"):
        aggregate(LOGPROBS, MASK, mode="token-mean", denominator=0)
