import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from shared.rl.loss import Aggregation, aggregate

MODES: tuple[Aggregation, ...] = get_args(Aggregation)
NORM: Aggregation = "seq-mean-token-sum-norm"

VALUES = torch.tensor([[0.2, 0.4, 9.0, 9.0], [1.0] * 4], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, False], [True] * 4])


def reduced(
    values: Tensor, mask: Tensor, mode: Aggregation, denominator: float | Tensor | None = None
) -> Tensor:
    scale = 8.0 if mode == NORM else None
    return aggregate(values, mask, mode=mode, denominator=denominator, scale=scale)


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Six rows of five tokens; the third row has none in the mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[2] = False
    return values, mask


def slow_aggregate(values: Tensor, mask: Tensor, mode: Aggregation) -> float:
    rows = [
        [float(value) for value, shown in zip(row, row_mask, strict=True) if shown]
        for row, row_mask in zip(values, mask, strict=True)
    ]
    rows = [row for row in rows if row]
    everything = sum(sum(row) for row in rows)
    if mode == "token-sum":
        return everything
    if mode == "token-mean":
        return everything / sum(len(row) for row in rows)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return everything / len(rows) / (8.0 if mode == NORM else 1.0)


def gradient(loss: Tensor, values: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, values)
    return grad


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_the_slow_loop(mode: Aggregation) -> None:
    values, mask = random_rows(7)
    assert reduced(values, mask, mode).item() == pytest.approx(slow_aggregate(values, mask, mode))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 4.6 / 6),
        ("token-sum", 4.6),
        ("seq-mean-token-sum", 2.3),
        ("seq-mean-token-sum-norm", 0.2875),
        ("seq-mean-token-mean", 0.65),
    ],
)
def test_the_modes_differ_as_in_the_golden_rows(mode: Aggregation, expected: float) -> None:
    assert reduced(VALUES, MASK, mode).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "short", "long"),
    [
        ("token-mean", 1 / 6, 1 / 6),
        ("token-sum", 1.0, 1.0),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-sum-norm", 1 / 16, 1 / 16),
        ("seq-mean-token-mean", 1 / 4, 1 / 8),
    ],
)
def test_only_the_mean_of_row_means_weighs_a_token_by_the_length_of_its_row(
    mode: Aggregation, short: float, long: float
) -> None:
    values = VALUES.clone().requires_grad_()
    grad = gradient(reduced(values, MASK, mode), values)
    assert grad.tolist() == [pytest.approx([short] * 2 + [0.0] * 2), pytest.approx([long] * 4)]


def test_a_row_without_tokens_does_not_count_as_a_sequence() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert aggregate(values, mask, mode="seq-mean-token-sum") == 4.0
    assert aggregate(values, mask, mode="seq-mean-token-mean") == 2.0
    assert aggregate(values, mask, mode="seq-mean-token-sum-norm", scale=2.0) == 2.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_an_empty_mask_gives_zero_with_a_gradient_of_zero(
    mode: Aggregation, shape: tuple[int, int]
) -> None:
    values = torch.full(shape, math.nan, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    for denominator in (None, 5.0):
        loss = reduced(values, mask, mode, denominator)
        assert loss == 0
        assert (gradient(loss, values) == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
def test_what_the_mask_hides_reaches_neither_value_nor_gradient(
    mode: Aggregation, garbage: float
) -> None:
    clean = VALUES.clone().requires_grad_()
    dirty = torch.where(MASK, VALUES, garbage).requires_grad_()
    expected, loss = reduced(clean, MASK, mode), reduced(dirty, MASK, mode)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, dirty), gradient(expected, clean))


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_that_the_mask_shows_is_seen(mode: Aggregation) -> None:
    values = VALUES.clone()
    values[0, 0] = math.nan
    assert reduced(values, MASK, mode).isnan()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_over_the_common_denominator_add_up_to_the_whole(mode: Aggregation) -> None:
    values, mask = random_rows(8)
    num_tokens, num_rows = mask.sum(), (mask.sum(-1) > 0).sum()
    denominator = {"token-mean": num_tokens, "token-sum": None}.get(mode, num_rows)
    parts = [
        reduced(values[rows], mask[rows], mode, denominator) for rows in ([0, 1], [2], [3, 4, 5])
    ]
    torch.testing.assert_close(sum(parts), reduced(values, mask, mode))


def test_a_token_sum_over_a_denominator_is_a_mean_over_that_many() -> None:
    values, mask = random_rows(9)
    torch.testing.assert_close(
        aggregate(values, mask, mode="token-sum", denominator=mask.sum()),
        aggregate(values, mask, mode="token-mean"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_scale_is_required_by_the_norm_and_refused_by_the_others(mode: Aggregation) -> None:
    scale = None if mode == NORM else 8.0
    with pytest.raises(ValueError, match="scale"):
        aggregate(VALUES, MASK, mode=mode, scale=scale)


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan])
def test_a_scale_or_denominator_that_is_not_above_zero_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="scale must be above 0"):
        aggregate(VALUES, MASK, mode=NORM, scale=number)
    for denominator in (number, torch.tensor(number)):
        with pytest.raises(ValueError, match="denominator must be above 0"):
            aggregate(VALUES, MASK, mode="token-mean", denominator=denominator)


def test_unknown_modes_and_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'sum'"):
        aggregate(VALUES, MASK, mode="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        aggregate(VALUES, MASK[:1], mode="token-mean")
