import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.rl.entropy import (
    TokenStatistics,
    clamped_entropy,
    entropy_from_logits,
    entropy_influence,
    fused_logprob_entropy,
    predicted_entropy_change_natural_gradient,
    predicted_entropy_change_policy_gradient,
    predicted_entropy_change_sampled,
)

# T1 of the specification.
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
RAW_ADVANTAGES = torch.tensor([1.0, -0.5, 0.5, -1.0], dtype=torch.float64)

logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=12)


def slow_entropy(logits: list[float], num_removed: int = 0) -> tuple[float, float]:
    """(entropy of the kept, mass of the removed), in plain numbers."""
    order = sorted(range(len(logits)), key=lambda v: (logits[v], v))
    weights = [math.exp(z - max(logits)) for z in logits]
    kept = [weights[v] for v in order[num_removed:]]
    probs = [w / sum(kept) for w in kept]
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    return entropy, 1 - sum(kept) / sum(weights)


def slow_mean_pull(logits: list[float]) -> float:
    """sum over v of p_v^2 (log p_v + H), in plain numbers."""
    weights = [math.exp(z - max(logits)) for z in logits]
    probs = [w / sum(weights) for w in weights]
    entropy = slow_entropy(logits)[0]
    return sum(p * p * (math.log(p) + entropy) for p in probs if p > 0)


def entropy_gradient(logits: Tensor, clamp_p: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(clamped_entropy(leaf, clamp_p=clamp_p)[0].sum(), leaf)
    return grad


@given(logit_rows, st.floats(0, 0.3))
@settings(max_examples=60)
def test_the_entropies_equal_the_slow_loop(logits: list[float], clamp_p: float) -> None:
    tensor = torch.tensor(logits, dtype=torch.float64)
    assert entropy_from_logits(tensor).item() == pytest.approx(slow_entropy(logits)[0], abs=1e-9)
    clamped, removed_mass = clamped_entropy(tensor, clamp_p=clamp_p)
    entropy, mass = slow_entropy(logits, int(len(logits) * clamp_p))
    assert clamped.item() == pytest.approx(entropy, abs=1e-9)
    assert removed_mass.item() == pytest.approx(mass, abs=1e-9)


@given(logit_rows)
@settings(max_examples=40)
def test_the_gradient_of_the_entropy_has_its_closed_form(logits: list[float]) -> None:
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    entropy = entropy_from_logits(leaf)
    (grad,) = torch.autograd.grad(entropy, leaf)
    log_probs = leaf.detach().log_softmax(-1)
    torch.testing.assert_close(
        grad, -log_probs.exp() * (log_probs + entropy.detach()), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize(
    ("clamp_p", "entropy", "gradient"),
    [
        (0.0, 0.947536964, [-0.326688139, 0.116700968, 0.130076206, 0.079910965]),
        (0.25, 0.832395582, [-0.282587451, 0.140770357, 0.141817094, 0.0]),
        (0.33, 0.832395582, [-0.282587451, 0.140770357, 0.141817094, 0.0]),
        (0.5, 0.582203109, [-0.196611933, 0.196611933, 0.0, 0.0]),
    ],
)
def test_the_clamped_entropy_has_the_golden_values_and_gradients(
    clamp_p: float, entropy: float, gradient: list[float]
) -> None:
    assert clamped_entropy(LOGITS, clamp_p=clamp_p)[0].item() == pytest.approx(entropy, abs=1e-9)
    grad = entropy_gradient(LOGITS, clamp_p)
    assert grad.tolist() == pytest.approx(gradient, abs=1e-9)
    removed = torch.tensor(gradient) == 0
    assert (grad[removed] == 0).all()


@pytest.mark.parametrize(
    ("clamp_p", "entropy"),
    [(0, 2.302585), (0.1, 2.197225), (0.25, 2.079442), (0.3, 1.945910), (0.33, 1.945910)],
)
def test_uniform_logits_lose_the_log_of_what_is_kept(clamp_p: float, entropy: float) -> None:
    clamped, removed_mass = clamped_entropy(torch.zeros(10), clamp_p=clamp_p)
    assert clamped.item() == pytest.approx(entropy, abs=1e-6)
    assert removed_mass.item() == pytest.approx(int(10 * clamp_p) / 10, abs=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "clamp_p", "num_removed"),
    [
        (151936, 0.33, 50138),
        (151936, 0.25, 37984),
        (151936, 0.3, 45580),
        (151936, 0.4, 60774),
        (152064, 0.33, 50181),
    ],
)
def test_the_number_removed_is_the_floor_for_real_vocabularies(
    vocabulary: int, clamp_p: float, num_removed: int
) -> None:
    entropy = clamped_entropy(torch.zeros(1, vocabulary, dtype=torch.float64), clamp_p=clamp_p)[0]
    assert entropy.exp().item() == pytest.approx(vocabulary - num_removed, abs=1e-3)


def test_ties_at_the_threshold_remove_exactly_the_quota_first_index_first() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    grad = entropy_gradient(logits, 0.4)
    assert (grad[0] == 0).tolist() == [False, True, True, False, False]
    clamped, removed_mass = clamped_entropy(logits, clamp_p=0.4)
    assert clamped[1].item() == pytest.approx(math.log(3))
    assert removed_mass[1].item() == pytest.approx(0.4)


def test_the_entropy_decomposes_over_the_clamp() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 0.0, -2.0, -2.0], dtype=torch.float64)
    clamped, mass = clamped_entropy(logits, clamp_p=0.34)
    assert clamped.item() == pytest.approx(0.801056369, abs=1e-9)
    assert mass.item() == pytest.approx(0.010102373, abs=1e-9)
    binary = -mass * mass.log() - (1 - mass) * (1 - mass).log()
    whole = binary + (1 - mass) * clamped + mass * math.log(2)
    assert whole.item() == pytest.approx(0.856437653, abs=1e-9)
    assert entropy_from_logits(logits).item() == pytest.approx(whole.item(), abs=1e-12)


def test_a_clamp_of_zero_is_the_plain_entropy_with_its_gradient() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clamped, removed_mass = clamped_entropy(logits, clamp_p=0.0)
    assert torch.equal(clamped, entropy_from_logits(logits))
    assert (removed_mass == 0).all()
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad(entropy_from_logits(leaf).sum(), leaf)
    assert torch.equal(entropy_gradient(logits, 0.0), plain)


def test_the_forms_of_verl_and_areal_agree() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    num_removed = int(40 * 0.33)
    removed = torch.zeros_like(logits, dtype=torch.bool)
    removed.scatter_(-1, logits.topk(num_removed, largest=False).indices, True)
    kept = logits.masked_fill(removed, -torch.inf)
    verl = kept.logsumexp(-1) - (kept.softmax(-1) * logits).sum(-1)
    areal = -(kept.softmax(-1) * kept.log_softmax(-1).masked_fill(removed, 0)).sum(-1)
    ours = clamped_entropy(logits, clamp_p=0.33)[0]
    torch.testing.assert_close(ours, verl)
    torch.testing.assert_close(ours, areal)


@pytest.mark.parametrize("clamp_p", [0.0, 0.2, 0.5])
def test_padding_of_minus_infinity_is_removed_first_and_never_makes_a_nan(clamp_p: float) -> None:
    padded = torch.tensor([2.0, -torch.inf, 1.0, 0.0, -torch.inf, -1.0], dtype=torch.float64)
    clamped, removed_mass = clamped_entropy(padded, clamp_p=clamp_p)
    num_removed = max(int(6 * clamp_p) - 2, 0)
    entropy, mass = slow_entropy(LOGITS.tolist(), num_removed)
    assert clamped.item() == pytest.approx(entropy)
    assert removed_mass.item() == pytest.approx(mass, abs=1e-12)
    grad = entropy_gradient(padded, clamp_p)
    assert grad.isfinite().all()
    assert grad[1] == grad[4] == 0


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
    for clamp_p in (0.0, 0.5):
        torch.testing.assert_close(
            clamped_entropy(LOGITS + shift, clamp_p=clamp_p),
            clamped_entropy(LOGITS, clamp_p=clamp_p),
        )
    # In float32, logsumexp(z) - sum p z would lose every digit here.
    shifted = entropy_from_logits((LOGITS + shift).float())
    assert shifted.item() == pytest.approx(0.947536964, abs=1e-6)


def test_a_nearly_certain_token_has_a_nearly_zero_entropy_that_is_not_negative() -> None:
    entropy = entropy_from_logits(torch.tensor([100.0, 0.0, -50.0]))
    assert 0 <= entropy.item() < 1e-6


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)).bfloat16()
    entropy = entropy_from_logits(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, entropy_from_logits(logits.double()).float())
    clamped = clamped_entropy(logits, clamp_p=0.3)[0]
    expected = clamped_entropy(logits.double(), clamp_p=0.3)[0].float()
    torch.testing.assert_close(clamped, expected, rtol=1e-5, atol=1e-5)


def test_the_clamped_entropy_passes_gradcheck_away_from_ties() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: clamped_entropy(z, clamp_p=0.4)[0], logits.requires_grad_()
    )
    assert not clamped_entropy(logits, clamp_p=0.4)[1].requires_grad


@pytest.mark.parametrize("clamp_p", [-0.1, 0.75, 0.9, 1.0, math.nan])
def test_a_clamp_that_leaves_fewer_than_two_tokens_is_refused(clamp_p: float) -> None:
    with pytest.raises(ValueError, match="clamp_p"):
        clamped_entropy(LOGITS, clamp_p=clamp_p)
    with pytest.raises(ValueError, match="clamp_p"):
        fused_logprob_entropy(
            torch.zeros(2, 3),
            torch.zeros(4, 3),
            torch.zeros(2, dtype=torch.int64),
            temperature=1.0,
            clamp_p=clamp_p,
            chunk=1,
        )


def fused_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64).to(dtype)
    head_weight = torch.randn(11, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(11, (7,), generator=generator)
    return hidden.requires_grad_(), head_weight.requires_grad_(), targets


def naive(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float, clamp_p: float
) -> TokenStatistics:
    logits = hidden @ head_weight.T / temperature
    logprob = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    entropy = entropy_from_logits(logits)
    clamped, removed_mass = clamped_entropy(logits, clamp_p=clamp_p)
    mean_pull = torch.tensor([slow_mean_pull(row) for row in logits.tolist()], dtype=logits.dtype)
    return TokenStatistics(logprob, entropy, clamped, removed_mass, mean_pull)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_fused_form_equals_the_naive_form_in_values_and_gradients(chunk: int) -> None:
    inputs = fused_inputs()
    fused = fused_logprob_entropy(
        *inputs, temperature=0.7, clamp_p=0.3, chunk=chunk, with_mean_pull=True
    )
    expected = naive(*inputs, 0.7, 0.3)
    for name, ours, theirs in zip(fused._fields, fused, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, msg=name)
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for row in torch.eye(3, dtype=torch.float64).unsqueeze(-1) * weights:
        grads = [
            torch.autograd.grad(
                (row * torch.stack([t for t in result[:3] if t is not None])).sum(),
                inputs[:2],
                retain_graph=True,
            )
            for result in (fused, expected)
        ]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("with_mean_pull", [False, True])
@pytest.mark.parametrize("clamp_p", [None, 0.3])
def test_the_fused_form_passes_gradcheck(clamp_p: float | None, with_mean_pull: bool) -> None:
    hidden, head_weight, targets = fused_inputs()

    def outputs(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, ...]:
        result = fused_logprob_entropy(
            hidden,
            head_weight,
            targets,
            temperature=1.3,
            clamp_p=clamp_p,
            chunk=3,
            with_mean_pull=with_mean_pull,
        )
        return tuple(t for t in result if t is not None and t.requires_grad)

    assert len(outputs(hidden, head_weight)) == (2 if clamp_p is None else 3)
    assert torch.autograd.gradcheck(outputs, (hidden, head_weight))


def test_without_a_clamp_the_fused_form_has_no_clamped_entropy() -> None:
    result = fused_logprob_entropy(*fused_inputs(), temperature=1.0, chunk=2)
    assert result.clamped_entropy is None
    assert result.removed_mass is None
    assert result.mean_pull is None
    assert result.logprob.shape == result.entropy.shape == (7,)


@pytest.mark.parametrize("clamp_p", [None, 0.3])
def test_asking_for_the_mean_pull_changes_no_other_field_and_no_gradient(
    clamp_p: float | None,
) -> None:
    inputs = fused_inputs()
    plain, pulled = (
        fused_logprob_entropy(
            *inputs, temperature=0.7, clamp_p=clamp_p, chunk=3, with_mean_pull=with_mean_pull
        )
        for with_mean_pull in (False, True)
    )
    assert plain.mean_pull is None
    assert pulled.mean_pull is not None
    assert not pulled.mean_pull.requires_grad
    assert pulled.mean_pull.shape == (7,)
    for before, after in zip(plain[:4], pulled[:4], strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert torch.equal(before, after)
    grads = [
        torch.autograd.grad((result.logprob + result.entropy).sum(), inputs[:2])
        for result in (plain, pulled)
    ]
    assert all(torch.equal(before, after) for before, after in zip(*grads, strict=True))


def test_the_fused_form_takes_no_tokens_and_no_gradient() -> None:
    hidden, head_weight, _ = fused_inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    result = fused_logprob_entropy(
        hidden[:0],
        head_weight,
        nothing,
        temperature=1.0,
        clamp_p=0.3,
        chunk=4,
        with_mean_pull=True,
    )
    assert all(t is not None and t.shape == (0,) for t in result)
    with torch.no_grad():
        result = fused_logprob_entropy(*fused_inputs(), temperature=1.0, chunk=4)
    assert not result.logprob.requires_grad
    torch.testing.assert_close(result.logprob, naive(*fused_inputs(), 1.0, 0.3).logprob.detach())


def test_bfloat16_hidden_states_give_float32_statistics_of_the_bfloat16_logits() -> None:
    hidden, head_weight, targets = fused_inputs(torch.bfloat16)
    result = fused_logprob_entropy(hidden, head_weight, targets, temperature=1.0, chunk=3)
    logits = (hidden @ head_weight.T).double()
    assert result.logprob.dtype == result.entropy.dtype == torch.float32
    torch.testing.assert_close(
        result.entropy.double(), entropy_from_logits(logits), rtol=1e-5, atol=1e-5
    )
    torch.autograd.backward(result.logprob.sum())
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_logits_are_never_kept_for_more_than_a_chunk() -> None:
    vocabulary, chunk = 211, 4
    hidden = torch.randn(32, 8, requires_grad=True)
    head_weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(vocabulary, (32,))
    saved: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = fused_logprob_entropy(
            hidden,
            head_weight,
            targets,
            temperature=1.0,
            clamp_p=0.3,
            chunk=chunk,
            with_mean_pull=True,
        )
    assert not any(vocabulary in shape and shape != head_weight.shape for shape in saved)
    torch.autograd.backward(result.logprob.sum() + result.entropy.sum())
    assert hidden.grad is not None
    assert head_weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"hidden": torch.zeros(7, 5)}, "head_weight"),
        ({"hidden": torch.zeros(1, 7, 4)}, "head_weight"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "target per token"),
    ],
)
def test_unusable_arguments_of_the_fused_form_are_refused(
    change: dict[str, Any], message: str
) -> None:
    hidden, head_weight, targets = fused_inputs()
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "head_weight": head_weight,
        "targets": targets,
        "temperature": 1.0,
        "chunk": 4,
    }
    with pytest.raises(ValueError, match=message):
        fused_logprob_entropy(**(arguments | change))


def centred(logits: Tensor, advantages: Tensor) -> Tensor:
    return advantages - (logits.softmax(-1) * advantages).sum(-1, keepdim=True)


def test_the_tabular_laws_have_the_golden_covariances() -> None:
    pg = predicted_entropy_change_policy_gradient(LOGITS, RAW_ADVANTAGES, learning_rate=1.0)
    assert pg.item() == pytest.approx(-0.130422829, abs=1e-9)
    npg = predicted_entropy_change_natural_gradient(LOGITS, RAW_ADVANTAGES, learning_rate=1.0)
    assert npg.item() == pytest.approx(-0.399911485, abs=1e-9)
    # Centring matters to neither answer, since the first form centres by itself.
    advantages = centred(LOGITS, RAW_ADVANTAGES)
    for predict, expected in (
        (predicted_entropy_change_policy_gradient, pg),
        (predicted_entropy_change_natural_gradient, npg),
    ):
        torch.testing.assert_close(predict(LOGITS, advantages, learning_rate=1.0), expected)


@pytest.mark.parametrize(("is_natural", "curvature"), [(False, -0.0208), (True, -0.1121)])
def test_the_predicted_change_is_off_only_to_second_order(
    is_natural: bool, curvature: float
) -> None:
    advantages = centred(LOGITS, RAW_ADVANTAGES)
    if is_natural:
        direction, predict = advantages, predicted_entropy_change_natural_gradient
    else:
        direction = LOGITS.softmax(-1) * advantages
        predict = predicted_entropy_change_policy_gradient
    coefficients = []
    for rate in (1e-3, 1e-4):
        change = entropy_from_logits(LOGITS + rate * direction) - entropy_from_logits(LOGITS)
        error = change - predict(LOGITS, advantages, learning_rate=rate)
        coefficients.append(error.item() / rate**2)
    assert coefficients[0] == pytest.approx(coefficients[1], rel=0.01)
    assert coefficients[0] == pytest.approx(curvature, abs=1e-3)


def test_the_natural_gradient_law_integrates_to_the_exact_change() -> None:
    advantages = centred(LOGITS, RAW_ADVANTAGES)
    nodes = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    slopes = predicted_entropy_change_natural_gradient(
        LOGITS + nodes * advantages, advantages.expand(201, 4), learning_rate=1.0
    )
    simpson = torch.ones(201, dtype=torch.float64)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    integral = (simpson * slopes).sum().item() / 600
    exact = entropy_from_logits(LOGITS + advantages) - entropy_from_logits(LOGITS)
    assert exact.item() == pytest.approx(-0.410466595284, abs=1e-12)
    assert integral == pytest.approx(exact.item(), abs=1e-9)


@pytest.mark.parametrize(
    ("action", "advantage", "covariance"),
    [(0, 1.0, 0.197750), (0, -1.0, -0.197750), (1, 1.0, -0.197750), (1, -1.0, 0.197750)],
    ids=["likely and good", "likely and bad", "rare and good", "rare and bad"],
)
def test_the_sign_of_the_change_follows_likelihood_and_advantage(
    action: int, advantage: float, covariance: float
) -> None:
    logits = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    advantages = torch.zeros(2, dtype=torch.float64)
    advantages[action] = advantage
    npg = predicted_entropy_change_natural_gradient(logits, advantages, learning_rate=1.0)
    assert npg.item() == pytest.approx(-covariance, abs=1e-6)
    pg = predicted_entropy_change_policy_gradient(logits, advantages, learning_rate=1.0)
    assert pg.item() == pytest.approx(-math.copysign(0.035595038, covariance), abs=1e-9)
    uniform = torch.zeros(2, dtype=torch.float64)
    npg = predicted_entropy_change_natural_gradient(uniform, advantages, learning_rate=1.0)
    assert npg.item() == pytest.approx(0, abs=1e-12)


def test_the_sampled_influence_has_the_golden_values_and_averages_to_zero() -> None:
    actions = torch.arange(4)
    influence = predicted_entropy_change_sampled(
        LOGITS.expand(4, 4), actions, torch.ones(4, dtype=torch.float64), learning_rate=1.0
    )
    assert influence.tolist() == pytest.approx(
        [-0.157870678, 0.285518429, 0.298893666, 0.248728426], abs=1e-9
    )
    assert (LOGITS.softmax(-1) * influence).sum().item() == pytest.approx(0, abs=1e-12)


def test_the_sampled_prediction_equals_the_finite_difference() -> None:
    actions = torch.tensor([0, 1, 1, 3])
    advantages = torch.tensor([1.0, -0.5, -0.5, 2.0], dtype=torch.float64)
    predicted = predicted_entropy_change_sampled(
        LOGITS.expand(4, 4), actions, advantages, learning_rate=1.0
    ).mean()
    assert predicted.item() == pytest.approx(0.013516936, abs=1e-9)
    leaf = LOGITS.clone().requires_grad_()
    objective = (advantages * leaf.log_softmax(-1)[actions]).mean()
    (grad,) = torch.autograd.grad(objective, leaf)
    change = entropy_from_logits(LOGITS + 1e-4 * grad) - entropy_from_logits(LOGITS)
    assert change.item() / 1e-4 == pytest.approx(0.01351734, abs=1e-8)


def influence_of(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """entropy_influence with each ingredient by its own road."""
    logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    pulls = [slow_mean_pull(row) for row in logits.flatten(0, -2).tolist()]
    mean_pull = torch.tensor(pulls, dtype=logits.dtype).view(actions.shape)
    return entropy_influence(logprobs, entropy_from_logits(logits), mean_pull, advantages)


def test_the_influence_has_the_golden_values() -> None:
    logits = LOGITS.expand(4, 4)
    ones = torch.ones(4, dtype=torch.float64)
    assert influence_of(logits, torch.arange(4), ones).tolist() == pytest.approx(
        [-0.157870678, 0.285518429, 0.298893666, 0.248728426], abs=1e-9
    )
    actions = torch.tensor([0, 1, 1, 3])
    advantages = torch.tensor([1.0, -0.5, -0.5, 2.0], dtype=torch.float64)
    predicted = influence_of(logits, actions, advantages).mean()
    assert predicted.item() == pytest.approx(0.013516936, abs=1e-9)


@given(st.integers(0, 2**31), st.floats(0.1, 8), st.sampled_from([1.0, 0.5, 1e-6, 3e-4, 7.0]))
@settings(max_examples=50)
def test_the_influence_is_the_sampled_prediction_per_unit_of_learning_rate(
    seed: int, spread: float, learning_rate: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * spread
    actions = torch.randint(7, (3, 5), generator=generator)
    advantages = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    predicted = predicted_entropy_change_sampled(
        logits, actions, advantages, learning_rate=learning_rate
    )
    torch.testing.assert_close(
        influence_of(logits, actions, advantages),
        predicted / learning_rate,
        rtol=1e-12,
        atol=1e-14,
    )


def test_the_influence_of_the_fused_statistics_is_the_sampled_prediction() -> None:
    hidden, head_weight, targets = fused_inputs()
    statistics = fused_logprob_entropy(
        hidden, head_weight, targets, temperature=0.7, chunk=3, with_mean_pull=True
    )
    assert statistics.mean_pull is not None
    advantages = torch.linspace(-2, 2, 7, dtype=torch.float64)
    influence = entropy_influence(
        statistics.logprob, statistics.entropy, statistics.mean_pull, advantages
    )
    logits = (hidden @ head_weight.T / 0.7).detach()
    predicted = predicted_entropy_change_sampled(logits, targets, advantages, learning_rate=0.5)
    torch.testing.assert_close(influence, predicted / 0.5, rtol=1e-12, atol=1e-14)
    assert not influence.requires_grad


def test_the_sampled_prediction_equals_the_slow_loop_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64) * 2
    actions = torch.randint(9, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    predicted = predicted_entropy_change_sampled(logits, actions, advantages, learning_rate=0.3)
    for row, change in zip(range(6), predicted.tolist(), strict=True):
        probs = logits[row].softmax(-1).tolist()
        entropy = -sum(p * math.log(p) for p in probs)
        pulls = [p * (math.log(p) + entropy) for p in probs]
        mean = sum(p * pull for p, pull in zip(probs, pulls, strict=True))
        expected = -0.3 * float(advantages[row]) * (pulls[int(actions[row])] - mean)
        assert change == pytest.approx(expected, abs=1e-12)


def test_the_influence_averages_to_zero_over_the_policy_and_is_zero_without_an_advantage() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    ones = torch.ones(9, dtype=torch.float64)
    influence = influence_of(logits.expand(9, 9), torch.arange(9), ones)
    assert (logits.softmax(-1) * influence).sum().item() == pytest.approx(0, abs=1e-14)
    none = influence_of(logits.expand(9, 9), torch.arange(9), 0 * ones)
    assert (none == 0).all()


def test_the_influence_of_the_certain_and_of_the_impossible_token_is_finite() -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=torch.float64).expand(2, 3)
    ones = torch.ones(2, dtype=torch.float64)
    assert influence_of(certain, torch.tensor([0, 1]), ones).tolist() == [0, 0]
    padded = torch.cat([LOGITS, torch.tensor([-torch.inf], dtype=torch.float64)]).expand(1, 5)
    impossible = influence_of(padded, torch.tensor([4]), ones[:1])
    assert impossible.item() == pytest.approx(slow_mean_pull(LOGITS.tolist()), abs=1e-12)


def test_single_precision_suffices_for_the_influence_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(40, 16, generator=generator) / 2
    head_weight = torch.randn(5000, 16, generator=generator)
    targets = torch.randint(5000, (40,), generator=generator)
    advantages = torch.ones(40)
    statistics = fused_logprob_entropy(
        hidden, head_weight, targets, temperature=1.0, chunk=16, with_mean_pull=True
    )
    assert statistics.mean_pull is not None
    assert statistics.mean_pull.dtype == torch.float32
    influence = entropy_influence(
        statistics.logprob, statistics.entropy, statistics.mean_pull, advantages
    )
    expected = predicted_entropy_change_sampled(
        hidden.double() @ head_weight.double().T, targets, advantages.double(), learning_rate=1.0
    )
    torch.testing.assert_close(influence.double(), expected, rtol=1e-3, atol=1e-6)


def test_an_influence_of_shapes_that_disagree_is_refused() -> None:
    four, three = torch.zeros(4), torch.zeros(3)
    for index in range(4):
        arguments = [three if i == index else four for i in range(4)]
        with pytest.raises(ValueError, match="one shape"):
            entropy_influence(*arguments)


def test_an_impossible_action_does_not_spoil_the_predictions() -> None:
    logits = torch.cat([LOGITS, torch.tensor([-torch.inf], dtype=torch.float64)])
    advantages = torch.cat([RAW_ADVANTAGES, torch.zeros(1, dtype=torch.float64)])
    for predict in (
        predicted_entropy_change_policy_gradient,
        predicted_entropy_change_natural_gradient,
    ):
        torch.testing.assert_close(
            predict(logits, advantages, learning_rate=1.0),
            predict(LOGITS, RAW_ADVANTAGES, learning_rate=1.0),
        )
    action, one = torch.tensor(2), torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(
        predicted_entropy_change_sampled(logits, action, one, learning_rate=1.0),
        predicted_entropy_change_sampled(LOGITS, action, one, learning_rate=1.0),
    )


def test_over_a_run_of_policy_gradient_the_prediction_tracks_the_measured_change() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(64, 30, generator=generator, dtype=torch.float64)
    rewards = (torch.rand(64, 30, generator=generator) < 1 / 6).double()
    predicted, measured = [], []
    for _ in range(100):
        probs = logits.softmax(-1)
        prediction = predicted_entropy_change_policy_gradient(logits, rewards, learning_rate=0.5)
        before = entropy_from_logits(logits)
        logits = logits + 0.5 * probs * centred(logits, rewards)
        predicted.append(prediction)
        measured.append(entropy_from_logits(logits) - before)
    pairs = torch.stack([torch.cat(predicted), torch.cat(measured)])
    assert np.corrcoef(pairs.numpy())[0, 1] > 0.99
    assert pairs[1].sum() < 0


def test_predictions_refuse_advantages_of_another_shape() -> None:
    for predict in (
        predicted_entropy_change_policy_gradient,
        predicted_entropy_change_natural_gradient,
    ):
        with pytest.raises(ValueError, match="one shape"):
            predict(LOGITS, RAW_ADVANTAGES[:3], learning_rate=1.0)
    with pytest.raises(ValueError, match="one shape"):
        predicted_entropy_change_sampled(
            LOGITS, torch.tensor([0]), RAW_ADVANTAGES[:1], learning_rate=1.0
        )
