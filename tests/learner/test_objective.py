"""The loss of a mini-batch is the sum of its micro-batches', whatever the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.learner.loss_modes import (
    ENTROPY_TERMS,
    LOSS_MODES,
    OFF_POLICY_WEIGHTS,
    TokenInputs,
)
from services.learner.objective import Choice, Loss, Objective, Totals
from shared.rl.covariance import token_keys
from shared.rl.entropy import TokenStatistics, fused_logprob_entropy
from tests.learner.fakes import run_config

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
COEFFICIENTS = {"none": 0.0, "bonus": 0.01, "aent": 0.002, "target": 0.002, "pi": 0.0}
ENTROPY_CLIP = {"entropy_ratio_clip_low": 0.05, "entropy_ratio_clip_high": 0.05}
WIDE = {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.05}
ROWS, WIDTH = 12, 7
NO_CHOICE = Choice()


def objective(
    loss: dict[str, Any] | None = None,
    entropy: str | dict[str, Any] = "none",
    off_policy: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Objective:
    if isinstance(entropy, str):
        entropy = {"method": entropy, "entropy_coeff": COEFFICIENTS[entropy]}
    return Objective(
        run_config(
            policy_loss=loss or {},
            entropy=entropy,
            off_policy=off_policy or {"method": "none"},
            **sections,
        )
    )


def combined(
    mode: str, entropy: str, weights: str, aggregation: str, *, with_extras: bool
) -> Objective:
    """The named choices; extras are every further method that goes with them."""
    loss: dict[str, Any] = {"loss_mode": mode, "loss_agg_mode": aggregation, **WIDE}
    off_policy, sections = {"method": weights}, {}
    if with_extras:
        loss |= {"top_entropy_quantile": 0.6, **ENTROPY_CLIP}
        sections = {"reference_kl": {"coef": 0.1}}
        if weights != "none":
            off_policy["proximal"] = "interpolated"
    return objective(loss, entropy, off_policy, **sections)


def aggregations_of(mode: str) -> tuple[str, ...]:
    return ("seq-mean-token-mean",) if mode == "gspo" else AGGREGATIONS


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
        proximal_entropy=torch.rand(rows, WIDTH, generator=generator) + 0.2,
        staleness=torch.randint(0, 4, (rows, WIDTH), generator=generator),
        keys=token_keys(1, 2, 0, uids, torch.arange(WIDTH)),
    )


def inputs_of(made: Objective, inputs: TokenInputs) -> TokenInputs:
    """With reference log-probs where the objective has a use for them."""
    if not made.has_reference:
        return inputs
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(inputs.mask.shape, generator=generator) * 0.3
    return replace(inputs, reference_logprobs=inputs.proximal_logprobs + noise)


def statistics(
    inputs: TokenInputs, seed: int = 1, *, size: float = 0.3
) -> tuple[TokenStatistics, Tensor]:
    """Statistics that depend on one leaf, so that its gradient is that of the loss."""
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(inputs.mask.shape, generator=generator) * size
    leaf.requires_grad_()
    moved = inputs.proximal_logprobs + leaf
    entropy = inputs.proximal_entropy * (0.3 * leaf).exp()
    return TokenStatistics(moved, entropy, entropy.square() / 4, leaf.detach().abs()), leaf


def on_policy(inputs: TokenInputs) -> tuple[TokenStatistics, Tensor]:
    return statistics(inputs, size=0.0)


def minimise(
    made: Objective,
    inputs: TokenInputs,
    measured: tuple[TokenStatistics, Tensor] | None = None,
    *,
    choice: Choice | None = None,
    coefficient: float = 0.1,
) -> tuple[Loss, Tensor]:
    """The loss of a whole mini-batch and its gradient."""
    seen, leaf = measured or statistics(inputs)
    if choice is None:
        choice = made.choose(seen.logprob, seen.entropy, inputs)
    loss = made.loss(seen, inputs, choice, totals=Totals.of(inputs.mask), coefficient=coefficient)
    return loss, torch.autograd.grad(loss.total, leaf, retain_graph=True)[0]


def assert_same(left: tuple[Loss, Tensor], right: tuple[Loss, Tensor]) -> None:
    """Equal totals and gradients, and a gradient to be equal in."""
    torch.testing.assert_close(left[0].total, right[0].total, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(left[1], right[1], rtol=1e-6, atol=1e-8)
    assert bool(left[1].any())


def rows_of(measured: TokenStatistics, rows: list[int], width: int) -> TokenStatistics:
    return TokenStatistics(*(each[rows, :width] for each in measured if each is not None))


def split(order: list[int], sizes: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(order[start : start + size])
        start += size
    return [part for part in [*parts, order[start:]] if part]


def poisoned(inputs: TokenInputs) -> TokenInputs:
    """NaN wherever nothing was sampled."""

    def poison(values: Tensor) -> Tensor:
        return values.masked_fill(~inputs.mask, float("nan"))

    reference = inputs.reference_logprobs
    return replace(
        inputs,
        advantages=poison(inputs.advantages),
        behaviour_logprobs=poison(inputs.behaviour_logprobs),
        proximal_logprobs=poison(inputs.proximal_logprobs),
        proximal_entropy=poison(inputs.proximal_entropy),
        reference_logprobs=None if reference is None else poison(reference),
    )


@pytest.mark.parametrize(("mode", "weights"), list(product(LOSS_MODES, OFF_POLICY_WEIGHTS)))
def test_every_combination_has_a_finite_loss_and_gradient_from_the_mask_alone(
    mode: str, weights: str
) -> None:
    rest = product(ENTROPY_TERMS, aggregations_of(mode), (False, True))
    for entropy, aggregation, with_extras in rest:
        made = combined(mode, entropy, weights, aggregation, with_extras=with_extras)
        inputs = inputs_of(made, token_inputs())
        measured, leaf = statistics(inputs)
        loss, slope = minimise(made, inputs, (measured, leaf))
        name = f"{entropy}, {aggregation}, with_extras={with_extras}"
        assert bool(loss.total.isfinite()), name
        assert bool(slope.isfinite().all()), name
        assert bool(slope[inputs.mask].any()), name
        assert not bool(slope[~inputs.mask].any()), name
        assert (loss.entropy is None) == (entropy == "none"), name
        assert (loss.reference is None) == (not with_extras), name
        again, same = minimise(made, poisoned(inputs), (measured, leaf))
        assert torch.equal(again.total, loss.total), name
        assert torch.equal(same, slope), name


@settings(max_examples=80)
@given(
    st.sampled_from(list(LOSS_MODES)),
    st.sampled_from(list(ENTROPY_TERMS)),
    st.sampled_from(list(OFF_POLICY_WEIGHTS)),
    st.sampled_from(AGGREGATIONS),
    st.booleans(),
    st.permutations(list(range(ROWS))),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_gradients_of_micro_batches_add_up_to_that_of_the_minibatch(
    mode: str,
    entropy: str,
    weights: str,
    aggregation: str,
    with_extras: bool,
    order: list[int],
    sizes: list[int],
) -> None:
    if mode == "gspo":
        aggregation = "seq-mean-token-mean"
    made = combined(mode, entropy, weights, aggregation, with_extras=with_extras)
    inputs = inputs_of(made, token_inputs())
    totals = Totals.of(inputs.mask)
    whole, expected = minimise(made, inputs)

    measured, leaf = statistics(inputs)
    choice = made.choose(measured.logprob, measured.entropy, inputs)
    total = torch.zeros(())
    for rows in split(order, sizes):
        width = int(inputs.mask[rows].sum(-1).max())
        part = made.loss(
            rows_of(measured, rows, width),
            inputs.rows(rows, width),
            choice.rows(rows, width),
            totals=totals,
            coefficient=0.1,
        )
        total = total + part.total
    gradient = torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(total, whole.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=40)
@given(
    st.sampled_from(["vanilla", "clip_cov", "kl_cov"]),
    st.floats(0.1, 0.9),
    st.permutations(list(range(ROWS))),
)
def test_a_global_choice_does_not_depend_on_the_order_of_rows(
    mode: str, quantile: float, order: list[int]
) -> None:
    made = objective({"loss_mode": mode, "top_entropy_quantile": quantile, **WIDE})
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    choice = made.choose(measured.logprob, measured.entropy, inputs)
    turned = made.choose(
        measured.logprob[order], measured.entropy[order], inputs.rows(order, WIDTH)
    )
    assert choice.kept is not None
    assert turned.kept is not None
    assert torch.equal(turned.kept, choice.kept[order])
    assert 0 < int(choice.kept.sum()) < int(inputs.mask.sum())
    assert (choice.selected is None) == (mode == "vanilla")
    if choice.selected is not None and turned.selected is not None:
        assert torch.equal(turned.selected, choice.selected[order])
        assert 0 < int(choice.selected.sum()) <= made.quota(int(inputs.mask.sum()))


def test_per_micro_batch_selection_takes_a_token_in_each_as_the_reference_does() -> None:
    made = objective({"loss_mode": "kl_cov", "scope": "micro"})
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    assert made.chooses
    assert not made.chooses_globally
    counts = []
    for rows in (list(range(6)), list(range(6, 12))):
        half = inputs.rows(rows, WIDTH)
        choice = made.choose(measured.logprob[rows], measured.entropy[rows], half)
        assert choice.selected is not None
        counts.append(int(choice.selected.sum()))
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
    choice = made.choose(measured.logprob, measured.entropy, inputs)
    low, high = made.clipped(measured.logprob, inputs)
    assert bool((low | high).any())
    assert choice.selected is not None
    assert torch.equal(choice.selected, inputs.mask & ~(low | high))


def test_clip_cov_takes_the_gradient_of_the_selected_tokens_away() -> None:
    made = objective({"loss_mode": "clip_cov"})
    inputs = token_inputs()
    selected = inputs.mask & (torch.arange(WIDTH) == 0)
    _, slope = minimise(made, inputs, choice=Choice(selected), coefficient=0.0)
    assert not bool(slope[selected].any())
    assert bool(slope[inputs.mask & ~selected].any())


def test_only_the_tokens_of_highest_entropy_have_a_policy_loss() -> None:
    plain, made = objective(entropy="bonus"), objective({"top_entropy_quantile": 0.3}, "bonus")
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    kept = made.choose(measured.logprob, measured.entropy, inputs).kept
    assert kept is not None
    entropy = measured.entropy.detach()
    assert float(entropy[kept].min()) > float(entropy[inputs.mask & ~kept].max())
    policy = minimise(plain, inputs, coefficient=0.0)[1]
    bonus = minimise(plain, inputs)[1] - policy
    # The entropy term and the denominator stay those of all tokens.
    torch.testing.assert_close(minimise(made, inputs)[1], policy * kept + bonus)


def test_a_token_whose_entropy_moved_keeps_its_loss_and_not_its_gradient() -> None:
    plain, made = objective(), objective(ENTROPY_CLIP)
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    kept = made.entropy_ratio_kept(measured.entropy, inputs)
    ratio = (measured.entropy / inputs.proximal_entropy).detach()
    assert torch.equal(kept, (ratio > 0.95) & (ratio < 1.05))
    (expected, slope), (loss, cut) = minimise(plain, inputs), minimise(made, inputs)
    assert torch.equal(loss.total, expected.total)
    assert torch.equal(cut, slope * kept)
    assert bool(cut.any())
    assert not torch.equal(cut, slope)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reference_term_is_coefficient_times_estimated_distance(estimator: str) -> None:
    made = objective(reference_kl={"coef": 0.3, "estimator": estimator})
    inputs = inputs_of(made, token_inputs())
    assert inputs.reference_logprobs is not None
    measured, leaf = statistics(inputs)
    x = (measured.logprob.detach() - inputs.reference_logprobs)[inputs.mask]
    value, slope = {
        "k1": (x, torch.ones_like(x)),
        "k2": (x.square() / 2, x),
        "k3": ((-x).exp() - 1 + x, 1 - (-x).exp()),
    }[estimator]
    loss, gradient = minimise(made, inputs, (measured, leaf))
    bare, without = minimise(objective(), replace(inputs, reference_logprobs=None))
    assert loss.reference is not None
    assert float(loss.reference) == pytest.approx(0.3 * float(value.mean()), rel=1e-5)
    torch.testing.assert_close(loss.total, bare.total + loss.reference)
    added = (gradient - without)[inputs.mask]
    torch.testing.assert_close(added, 0.3 * slope / len(x), rtol=1e-4, atol=1e-7)


Sections = dict[str, Any]
IDENTITIES: dict[str, tuple[Sections, Sections]] = {
    "kl_cov_without_penalty_is_unclipped": (
        {"loss": {"loss_mode": "kl_cov", "ppo_kl_coef": 0.0, "kl_cov_ratio": 0.05}},
        {"loss": {"loss_mode": "unclipped"}},
    ),
    "clip_cov_without_candidates_is_vanilla_without_dual_clip": (
        {"loss": {"loss_mode": "clip_cov", "clip_cov_lb": 98.0, "clip_cov_ub": 99.0}},
        {"loss": {"clip_ratio_c": None}},
    ),
    "a_top_entropy_quantile_of_1_is_off": ({"loss": {"top_entropy_quantile": 1.0}}, {}),
    "endless_entropy_ratio_bounds_are_off": (
        {"loss": {"entropy_ratio_clip_low": 0.999, "entropy_ratio_clip_high": 1e6}},
        {},
    ),
    "weights_below_a_huge_cap_are_those_within_huge_bounds": (
        {"off_policy": {"method": "decoupled", "cap": 1e9}},
        {"off_policy": {"method": "mask", "lower": 0.0, "upper": 1e9}},
    ),
    "exact_proximal_is_the_default": (
        {"off_policy": {"method": "truncate", "proximal": "exact"}},
        {"off_policy": {"method": "truncate"}},
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_configurations_that_mean_the_same_have_the_same_loss_and_gradient(name: str) -> None:
    one, other = (objective(**sections) for sections in IDENTITIES[name])
    for size in (0.0, 0.3, 3.0):
        for seed in range(3):
            inputs = token_inputs(seed)
            pair = [minimise(each, inputs, statistics(inputs, size=size)) for each in (one, other)]
            assert_same(*pair)


def test_the_configurations_that_are_compared_differ_from_their_neighbours() -> None:
    inputs = token_inputs()
    measured = statistics(inputs, size=3.0)
    made = [
        objective(each)
        for each in (
            {"loss_mode": "kl_cov", "kl_cov_ratio": 0.05},
            {"loss_mode": "clip_cov", **WIDE},
            {"loss_mode": "unclipped"},
            {"loss_mode": "cispo"},
            {"loss_mode": "gspo"},
            {"clip_ratio_c": None},
            {},
            {"top_entropy_quantile": 0.5},
            ENTROPY_CLIP,
        )
    ]
    slopes = [minimise(each, inputs, measured)[1] for each in made]
    for number, slope in enumerate(slopes):
        assert not any(torch.allclose(slope, other) for other in slopes[:number])


@pytest.mark.parametrize("method", ["bonus", "aent", "target", "pi"])
def test_an_entropy_term_of_coefficient_0_has_no_gradient(method: str) -> None:
    inputs = token_inputs()
    assert_same(
        minimise(objective(entropy=method), inputs, coefficient=0.0), minimise(objective(), inputs)
    )


def test_aent_that_clamps_nothing_is_the_bonus() -> None:
    inputs = token_inputs()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(inputs.mask.numel(), 4, generator=generator)
    head = torch.randn(9, 4, generator=generator)
    targets = torch.randint(0, 9, (inputs.mask.numel(),), generator=generator)
    gradients = []
    for clamp_p, entropy in (
        (0.0, {"method": "aent", "entropy_coeff": 0.002, "clamp_p": 0.0}),
        (None, {"method": "bonus", "entropy_coeff": 0.002}),
        (0.33, {"method": "aent", "entropy_coeff": 0.002}),
    ):
        made = objective(entropy=entropy)
        assert made.clamp_p == clamp_p
        leaf = hidden.clone().requires_grad_()
        flat = fused_logprob_entropy(
            leaf, head, targets, temperature=1.0, clamp_p=made.clamp_p, chunk=7
        )
        spread = TokenStatistics(
            *(None if each is None else each.view(inputs.mask.shape) for each in flat)  # type: ignore[arg-type]
        )
        loss = made.loss(spread, inputs, NO_CHOICE, totals=Totals.of(inputs.mask), coefficient=1.0)
        gradients.append(torch.autograd.grad(loss.total, leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-3)


@pytest.mark.parametrize(("mode", "method"), list(product(LOSS_MODES, OFF_POLICY_WEIGHTS)))
def test_on_policy_every_mode_has_the_weighted_policy_gradient(mode: str, method: str) -> None:
    nothing_to_select = {"clip_cov_lb": 98.0, "clip_cov_ub": 99.0}
    made = objective({"loss_mode": mode, **nothing_to_select}, off_policy={"method": method})
    inputs = token_inputs()
    _, slope = minimise(made, inputs, on_policy(inputs))
    count = Totals.of(inputs.mask).num_tokens
    shares = torch.full_like(slope, count)
    if mode == "gspo":
        shares = ROWS * inputs.mask.sum(-1, keepdim=True).expand(ROWS, WIDTH).float()
    expected = -inputs.advantages * made.weights(inputs) / shares * inputs.mask
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-8)


def test_decoupled_weights_under_a_huge_cap_are_those_of_importance_sampling() -> None:
    made = objective(off_policy={"method": "decoupled", "cap": 1e9})
    inputs = token_inputs()
    expected = (inputs.proximal_logprobs - inputs.behaviour_logprobs).exp() * inputs.mask
    torch.testing.assert_close(made.weights(inputs), expected)


def test_an_interpolated_proximal_is_the_target_when_fresh_and_the_behaviour_when_one_old() -> None:
    made = objective(off_policy={"method": "truncate", "proximal": "interpolated"})
    inputs = token_inputs()
    measured, leaf = statistics(inputs)
    old = inputs.staleness
    anchored = made.anchored(measured.logprob, inputs)
    assert not anchored.proximal_logprobs.requires_grad
    target, behaviour = measured.logprob.detach(), inputs.behaviour_logprobs
    assert torch.equal(anchored.proximal_logprobs[old == 0], target[old == 0])
    assert torch.equal(anchored.proximal_logprobs[old == 1], behaviour[old == 1])
    middle = (target / 2 + behaviour / 2)[old == 2]
    torch.testing.assert_close(anchored.proximal_logprobs[old == 2], middle)
    weights = made.weights(anchored)
    assert bool((weights[inputs.mask & (old == 1)] == 1).all())
    # With the ratio 1 and the weight exp(target - behaviour) the gradient is -A w / N.
    _, slope = minimise(made, inputs, (measured, leaf))
    fresh = inputs.mask & (old == 0)
    count = Totals.of(inputs.mask).num_tokens
    weight = (target - behaviour).exp().clamp(max=2.0)
    torch.testing.assert_close(slope[fresh], (-inputs.advantages * weight / count)[fresh])


def test_an_exact_proximal_is_what_was_measured() -> None:
    inputs = token_inputs()
    measured, _ = statistics(inputs)
    assert objective().anchored(measured.logprob, inputs) is inputs


def test_off_policy_weights_scale_the_gradient_of_their_token() -> None:
    inputs = token_inputs()
    gradients = [
        minimise(objective(off_policy={"method": method}), inputs)[1]
        for method in ("none", "truncate")
    ]
    weights = (inputs.proximal_logprobs - inputs.behaviour_logprobs).exp().clamp(max=2.0)
    torch.testing.assert_close(gradients[1], gradients[0] * weights * inputs.mask)


def test_without_correction_the_behaviour_log_probs_do_not_matter() -> None:
    inputs = token_inputs()
    assert torch.equal(objective().weights(inputs), torch.ones(ROWS, WIDTH))


AGGREGATED: dict[str, Callable[[Tensor, Tensor], float]] = {
    "token-mean": lambda values, mask: float(values[mask].mean()),
    "token-sum": lambda values, mask: float(values[mask].sum()),
    "seq-mean-token-sum": lambda values, mask: float((values * mask).sum(-1).mean()),
    "seq-mean-token-sum-norm": lambda values, mask: float((values * mask).sum(-1).mean()) / 50,
    "seq-mean-token-mean": lambda values, mask: float(
        torch.stack([row[kept].mean() for row, kept in zip(values, mask, strict=True)]).mean()
    ),
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_tokens_become_one_number_as_the_run_file_says(mode: str) -> None:
    scale = {"loss_scale_factor": 50.0} if mode == "seq-mean-token-sum-norm" else {}
    made = objective({"loss_mode": "unclipped", "loss_agg_mode": mode, **scale})
    inputs = token_inputs()
    measured, leaf = statistics(inputs)
    losses = -inputs.advantages * leaf.detach().exp()
    loss, _ = minimise(made, inputs, (measured, leaf))
    expected = AGGREGATED[mode](losses, inputs.mask)
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_dr_grpo_divides_by_the_longest_completion_unless_told_otherwise() -> None:
    config = {"loss_agg_mode": "seq-mean-token-sum-norm"}
    inputs = token_inputs()
    by_default = objective(config, rollout={"max_completion_tokens": 32})
    told = objective({**config, "loss_scale_factor": 64.0})
    ratio = minimise(by_default, inputs)[0].total / minimise(told, inputs)[0].total
    assert float(ratio.detach()) == pytest.approx(2.0)


def test_the_entropy_term_lowers_the_loss_by_coefficient_times_entropy() -> None:
    inputs = token_inputs()
    measured, leaf = statistics(inputs)
    assert measured.clamped_entropy is not None
    likely = inputs.proximal_logprobs.exp() > 0.95
    weighted = (leaf.exp() * inputs.advantages.abs() * likely).detach()
    terms = {
        "bonus": measured.entropy,
        "target": measured.entropy,
        "aent": measured.clamped_entropy,
        "pi": weighted,
    }
    for method, expected in terms.items():
        loss, _ = minimise(objective(entropy=method), inputs, statistics(inputs), coefficient=0.3)
        assert loss.entropy is not None
        mean = float(expected.detach()[inputs.mask].mean())
        assert float(loss.entropy) == pytest.approx(-0.3 * mean, rel=1e-5)
        assert mean > 0
        assert float(loss.total.detach()) == pytest.approx(float(loss.policy + loss.entropy))


def test_only_aent_pays_for_the_clamped_entropy() -> None:
    assert objective(entropy="aent").clamp_p == 0.33
    assert all(objective(entropy=each).clamp_p is None for each in ("bonus", "target", "pi"))


def test_a_value_that_is_not_a_number_shows_in_the_loss_and_stays_out_behind_the_mask() -> None:
    inputs = token_inputs()
    totals = Totals.of(inputs.mask)
    for hidden in (True, False):
        measured, _ = statistics(inputs)
        place = ~inputs.mask if hidden else inputs.mask
        behaviour = inputs.behaviour_logprobs.masked_fill(place, float("nan"))
        broken = replace(inputs, behaviour_logprobs=behaviour)
        made = objective(off_policy={"method": "truncate"})
        loss = made.loss(measured, broken, NO_CHOICE, totals=totals, coefficient=0.0)
        assert bool(loss.total.isfinite()) == hidden


@pytest.mark.parametrize("method", ENTROPY_TERMS)
@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_a_stand_in_passes_its_slope_through_exactly_the_outputs_that_the_loss_reads(
    method: str, slope: float
) -> None:
    made, inputs = objective(entropy=method), token_inputs()
    outputs = [torch.rand(ROWS, WIDTH, requires_grad=True) for _ in range(3)]
    logprob, entropy, clamped = outputs
    measured = TokenStatistics(logprob, entropy, clamped, torch.rand(ROWS, WIDTH))
    loss = made.loss(
        measured, inputs, NO_CHOICE, totals=Totals.of(inputs.mask), coefficient=0.1
    ).total
    needed = torch.autograd.grad(loss, outputs, allow_unused=True)
    passed = torch.autograd.grad(made.stand_in(measured, slope), outputs, allow_unused=True)
    assert [each is None for each in passed] == [each is None for each in needed]
    assert needed[0] is not None
    for each in passed:
        if each is not None:
            expected = torch.full((ROWS, WIDTH), slope)
            torch.testing.assert_close(each, expected, equal_nan=True)
