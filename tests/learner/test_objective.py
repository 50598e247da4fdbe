"""The loss of a mini-batch is the sum of its micro-batches', whatever the configuration."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.learner.objective import (
    ENTROPY_TERMS,
    LOSS_MODES,
    OFF_POLICY_WEIGHTS,
    Objective,
    TokenInputs,
    Totals,
)
from shared.config.algorithm import EntropyConfig, OffPolicyConfig, PolicyLossConfig
from shared.rl.covariance import token_keys
from shared.rl.entropy import TokenStatistics

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
ROWS, WIDTH = 12, 7


def objective(
    loss: dict[str, Any] | None = None,
    entropy: str = "none",
    off_policy: dict[str, Any] | None = None,
) -> Objective:
    coefficient = 0.0 if entropy == "none" else 0.01
    return Objective(
        PolicyLossConfig.model_validate(loss or {}),
        EntropyConfig.model_validate({"method": entropy, "entropy_coeff": coefficient}),
        OffPolicyConfig.model_validate(off_policy or {"method": "none"}),
    )


def token_inputs(seed: int = 0, rows: int = ROWS) -> TokenInputs:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (rows, 1), generator=generator)
    mask = torch.arange(WIDTH) < lengths
    proximal = -torch.rand(rows, WIDTH, generator=generator) * 4
    uids = torch.arange(rows).unsqueeze(1) * 7919
    return TokenInputs(
        mask=mask,
        advantages=torch.randn(rows, 1, generator=generator) * 2 * mask,
        behaviour_logprobs=proximal + torch.randn(rows, WIDTH, generator=generator) * 0.5,
        proximal_logprobs=proximal,
        keys=token_keys(1, 2, 0, uids, torch.arange(WIDTH)),
    )


def statistics(inputs: TokenInputs, seed: int = 1) -> tuple[TokenStatistics, Tensor]:
    """Statistics that depend on one leaf, so that its gradient is that of the loss."""
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(inputs.mask.shape, generator=generator) * 0.3
    leaf.requires_grad_()
    moved = inputs.proximal_logprobs + leaf
    return TokenStatistics(moved, leaf.square(), leaf.square() / 2, leaf.detach().abs()), leaf


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def rows_of(measured: TokenStatistics, rows: list[int], width: int) -> TokenStatistics:
    return TokenStatistics(*(each[rows, :width] for each in measured if each is not None))


def split(order: list[int], sizes: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(order[start : start + size])
        start += size
    return [part for part in [*parts, order[start:]] if part]


@pytest.mark.parametrize(
    ("mode", "entropy", "weights", "aggregation"),
    list(product(LOSS_MODES, ENTROPY_TERMS, OFF_POLICY_WEIGHTS, AGGREGATIONS)),
)
def test_every_combination_has_a_finite_loss_and_gradient(
    mode: str, entropy: str, weights: str, aggregation: str
) -> None:
    made = objective(
        {"loss_mode": mode, "loss_agg_mode": aggregation}, entropy, {"method": weights}
    )
    inputs = token_inputs()
    measured, leaf = statistics(inputs)
    selected = made.select(measured.logprob, inputs) if made.selects else None
    loss = made.loss(measured, inputs, selected, totals=Totals.of(inputs.mask), coefficient=0.01)
    slope = gradient(loss.total, leaf)
    assert bool(loss.total.isfinite())
    assert bool(slope.isfinite().all())
    assert not bool(slope[~inputs.mask].any())
    assert (loss.entropy is None) == (entropy == "none")


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(LOSS_MODES)),
    st.sampled_from(list(ENTROPY_TERMS)),
    st.sampled_from(list(OFF_POLICY_WEIGHTS)),
    st.sampled_from(AGGREGATIONS),
    st.permutations(list(range(ROWS))),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_gradients_of_micro_batches_add_up_to_that_of_the_minibatch(
    mode: str, entropy: str, weights: str, aggregation: str, order: list[int], sizes: list[int]
) -> None:
    made = objective(
        {"loss_mode": mode, "loss_agg_mode": aggregation, "clip_cov_ratio": 0.05},
        entropy,
        {"method": weights},
    )
    inputs = token_inputs()
    totals = Totals.of(inputs.mask)
    measured, whole_leaf = statistics(inputs)
    selected = made.select(measured.logprob, inputs) if made.selects else None
    whole = made.loss(measured, inputs, selected, totals=totals, coefficient=0.1).total
    expected = gradient(whole, whole_leaf)

    measured, leaf = statistics(inputs)
    total = torch.zeros(())
    for rows in split(order, sizes):
        width = int(inputs.mask[rows].sum(-1).max())
        part = None if selected is None else selected[rows, :width]
        total = (
            total
            + made.loss(
                rows_of(measured, rows, width),
                inputs.rows(rows, width),
                part,
                totals=totals,
                coefficient=0.1,
            ).total
        )
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(total, leaf), expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["clip_cov", "kl_cov"]), st.permutations(list(range(ROWS))))
def test_a_global_selection_does_not_depend_on_the_order_of_rows(
    mode: str, order: list[int]
) -> None:
    made = objective(
        {
            "loss_mode": mode,
            "clip_cov_ratio": 0.05,
            "kl_cov_ratio": 0.05,
            "clip_cov_lb": 0.1,
        }
    )
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    selected = made.select(measured.logprob, inputs)
    turned = made.select(measured.logprob[order], inputs.rows(order, WIDTH))
    assert torch.equal(turned, selected[order])
    assert 0 < int(selected.sum()) <= made.quota(int(inputs.mask.sum()))


def test_per_micro_batch_selection_takes_a_token_in_each_as_the_reference_does() -> None:
    made = objective({"loss_mode": "kl_cov", "scope": "micro"})
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    assert not made.selects_globally
    halves = [list(range(6)), list(range(6, 12))]
    counts = [
        int(made.select(measured.logprob[rows], inputs.rows(rows, WIDTH)).sum()) for rows in halves
    ]
    assert counts == [1, 1]


def test_clip_cov_never_selects_a_token_where_the_clip_already_binds() -> None:
    made = objective(
        {
            "loss_mode": "clip_cov",
            "clip_cov_ratio": 1.0,
            "allow_large_ratio": True,
            "clip_cov_lb": -99.0,
            "clip_cov_ub": 99.0,
        }
    )
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    selected = made.select(measured.logprob, inputs)
    low, high = made.clipped(measured.logprob, inputs)
    assert bool((low | high).any())
    assert torch.equal(selected, inputs.mask & ~(low | high))


def test_clip_cov_takes_the_gradient_of_the_selected_tokens_away() -> None:
    made = objective({"loss_mode": "clip_cov"})
    inputs = token_inputs()
    measured, leaf = statistics(inputs)
    selected = inputs.mask & (torch.arange(WIDTH) == 0)
    loss = made.loss(measured, inputs, selected, totals=Totals.of(inputs.mask), coefficient=0.0)
    slope = gradient(loss.total, leaf)
    assert not bool(slope[selected].any())
    assert bool(slope[inputs.mask & ~selected].any())


def test_off_policy_weights_scale_the_gradient_of_their_token() -> None:
    inputs = token_inputs()
    totals = Totals.of(inputs.mask)
    gradients = []
    for method in ("none", "truncate"):
        made = objective(off_policy={"method": method})
        measured, leaf = statistics(inputs)
        loss = made.loss(measured, inputs, None, totals=totals, coefficient=0.0)
        gradients.append(gradient(loss.total, leaf))
    weights = (inputs.proximal_logprobs - inputs.behaviour_logprobs).exp().clamp(max=2.0)
    torch.testing.assert_close(gradients[1], gradients[0] * weights * inputs.mask)


def test_without_correction_the_behaviour_log_probs_do_not_matter() -> None:
    inputs = token_inputs()
    assert torch.equal(objective().weights(inputs), torch.ones(ROWS, WIDTH))


def test_the_entropy_term_lowers_the_loss_by_coefficient_times_entropy() -> None:
    inputs = token_inputs()
    measured = TokenStatistics(
        *(each.detach() for each in statistics(inputs)[0] if each is not None)
    )
    totals = Totals.of(inputs.mask)
    for method, expected in (("bonus", measured.entropy), ("aent", measured.clamped_entropy)):
        assert expected is not None
        loss = objective(entropy=method).loss(
            measured, inputs, None, totals=totals, coefficient=0.3
        )
        assert loss.entropy is not None
        assert float(loss.entropy) == pytest.approx(-0.3 * float(expected[inputs.mask].mean()))
        assert float(loss.total) == pytest.approx(float(loss.policy + loss.entropy))


def test_only_aent_pays_for_the_clamped_entropy() -> None:
    assert objective(entropy="aent").clamp_p == 0.33
    assert objective(entropy="bonus").clamp_p is None


def test_a_value_that_is_not_a_number_shows_in_the_loss_and_stays_out_behind_the_mask() -> None:
    inputs = token_inputs()
    totals = Totals.of(inputs.mask)
    for hidden in (True, False):
        measured, _ = statistics(inputs)
        place = ~inputs.mask if hidden else inputs.mask
        behaviour = inputs.behaviour_logprobs.masked_fill(place, float("nan"))
        poisoned = TokenInputs(
            inputs.mask, inputs.advantages, behaviour, inputs.proximal_logprobs, inputs.keys
        )
        made = objective(off_policy={"method": "truncate"})
        loss = made.loss(measured, poisoned, None, totals=totals, coefficient=0.0)
        assert bool(loss.total.isfinite()) == hidden
