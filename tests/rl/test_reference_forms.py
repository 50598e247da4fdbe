"""With `scope = "micro"` the loss is verl's, written here again from its rules.

The forms work on the sampled tokens of a micro-batch alone, in numpy, and give each token's loss
and its slope. verl's draw is random, ours goes by keys: where tokens are drawn, either all
candidates are, or their number and the candidates are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.learner.loss_modes import TokenInputs
from services.learner.objective import Objective, Totals
from shared.config import RunConfig
from shared.rl.covariance import token_keys
from shared.rl.entropy import TokenStatistics

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ROWS, WIDTH = 12, 40
MICRO_BATCHES = [[0, 3, 5], [1, 2, 7, 11], [4, 6], [8, 9, 10]]
SEEDS = range(5)
WINDOW = (0.3, 5.0)
CAP = 2.0
"""Of the off-policy weights; the run file's default."""


class Tokens(NamedTuple):
    """The sampled tokens of a micro-batch, [n] each; `row` tells completions apart."""

    logp: Floats
    old: Floats
    advantage: Floats
    row: NDArray[np.int64]

    @property
    def ratio(self) -> Floats:
        ratio: Floats = np.exp(self.logp - self.old)
        return ratio

    @property
    def covariance(self) -> Floats:
        covariance: Floats = (self.advantage - self.advantage.mean()) * (
            self.logp - self.logp.mean()
        )
        return covariance


Form = Callable[[Tokens], tuple[Floats, Floats]]
"""To each token's loss and its derivative by the token's log-prob."""


def clip_cov_candidates(tokens: Tokens, *, clip: float) -> Bools:
    """Inside the open window, and not clipped by PPO already."""
    lower, upper = WINDOW
    unclipped = -tokens.advantage * tokens.ratio
    clipped = -tokens.advantage * np.clip(tokens.ratio, 1 - clip, 1 + clip)
    inside = (tokens.covariance > lower) & (tokens.covariance < upper)
    return inside & ~(clipped > unclipped)


def clip_cov_with_all_candidates(tokens: Tokens, *, clip: float) -> tuple[Floats, Floats]:
    unclipped = -tokens.advantage * tokens.ratio
    clipped = -tokens.advantage * np.clip(tokens.ratio, 1 - clip, 1 + clip)
    correction = np.where(clip_cov_candidates(tokens, clip=clip), 0.0, 1.0)
    losses = np.maximum(unclipped, clipped) * correction
    return losses, np.where(clipped > unclipped, 0.0, unclipped) * correction


def kl_cov_selected(tokens: Tokens, *, ratio: float) -> Bools:
    selected = np.zeros(len(tokens.logp), dtype=bool)
    quota = max(1, int(len(tokens.logp) * ratio))
    selected[np.argsort(-tokens.covariance, kind="stable")[:quota]] = True
    return selected


def kl_cov(tokens: Tokens, *, ratio: float, coefficient: float) -> tuple[Floats, Floats]:
    selected = kl_cov_selected(tokens, ratio=ratio)
    difference = tokens.logp - tokens.old
    plain = -tokens.advantage * tokens.ratio
    losses = plain + coefficient * np.where(selected, np.abs(difference), 0.0)
    return losses, plain + coefficient * np.where(selected, np.sign(difference), 0.0)


def gspo(tokens: Tokens, *, low: float, high: float) -> tuple[Floats, Floats]:
    difference = tokens.logp - tokens.old
    ratio = np.exp([difference[tokens.row == row].mean() for row in tokens.row])
    unclipped = -tokens.advantage * ratio
    clipped = -tokens.advantage * np.clip(ratio, 1 - low, 1 + high)
    return np.maximum(unclipped, clipped), np.where(clipped > unclipped, 0.0, unclipped)


def cispo(tokens: Tokens, *, low: float, high: float) -> tuple[Floats, Floats]:
    weight = np.clip(tokens.ratio, 1 - low, 1 + high) * tokens.advantage
    return -weight * tokens.logp, -weight


def random_inputs(seed: int) -> tuple[Tensor, TokenInputs]:
    """Log-probs mostly near 0, as those of a trained policy are, and moved since the sampling."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Two tokens alone always have one covariance, and verl leaves ties undefined.
    mask = torch.arange(WIDTH) < torch.randint(3, WIDTH + 1, (ROWS, 1), generator=generator)
    old = -(torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64) ** 4) * 6
    inputs = TokenInputs(
        mask=mask,
        advantages=1.5 * normal(ROWS, 1) * mask,
        behaviour_logprobs=old + 0.4 * normal(ROWS, WIDTH),
        proximal_logprobs=old,
        proximal_entropy=torch.zeros_like(old),
        staleness=torch.zeros_like(mask, dtype=torch.int64),
        keys=token_keys(seed, 1, 0, torch.arange(ROWS)[:, None] * 977, torch.arange(WIDTH)),
    )
    return old + 0.3 * normal(ROWS, WIDTH), inputs


def tokens_of(logprobs: Tensor, inputs: TokenInputs, rows: list[int]) -> Tokens:
    mask = inputs.mask[rows]
    row = torch.tensor(rows).unsqueeze(1).expand(mask.shape)
    every = (logprobs[rows], inputs.proximal_logprobs[rows], inputs.advantages[rows], row)
    return Tokens(*(each[mask].numpy() for each in every))


def weights_of(inputs: TokenInputs, rows: list[int], off_policy: str) -> Floats:
    """Truncated importance weights, which multiply the loss after the selection."""
    ratio = (inputs.proximal_logprobs - inputs.behaviour_logprobs)[rows][inputs.mask[rows]].exp()
    weights: Floats = (ratio.clamp(max=CAP) if off_policy == "truncate" else ratio**0).numpy()
    return weights


def reference(
    form: Form, logprobs: Tensor, inputs: TokenInputs, *, off_policy: str, by_sequence: bool
) -> tuple[float, Tensor]:
    """Loss and gradient of the mini-batch: each micro-batch's sum over its common denominator."""
    total, gradient = 0.0, torch.zeros_like(logprobs)
    lengths = inputs.mask.sum(-1)
    for rows in MICRO_BATCHES:
        tokens = tokens_of(logprobs, inputs, rows)
        share = np.full(len(tokens.logp), 1 / int(lengths.sum()))
        if by_sequence:
            share = 1 / lengths[torch.from_numpy(tokens.row)].double().numpy() / ROWS
        share = share * weights_of(inputs, rows, off_policy)
        losses, slopes = form(tokens)
        total += float((losses * share).sum())
        part = torch.zeros_like(logprobs[rows])
        part[inputs.mask[rows]] = torch.from_numpy(slopes * share)
        gradient[rows] = part
    return total, gradient


def objective(loss: dict[str, Any], off_policy: str = "none") -> Objective:
    run = {"run": {"name": "t", "num_steps": 1}, "model": {"path": "x"}}
    chosen = {"policy_loss": {"scope": "micro", **loss}, "off_policy": {"method": off_policy}}
    return Objective(RunConfig.model_validate({**run, **chosen}))


def ours(made: Objective, logprobs: Tensor, inputs: TokenInputs) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and selected tokens of the mini-batch, a micro-batch at a time."""
    leaf = logprobs.clone().requires_grad_()
    total, selected = torch.zeros((), dtype=torch.float64), torch.zeros_like(inputs.mask)
    for rows in MICRO_BATCHES:
        mine = inputs.rows(rows, WIDTH)
        statistics = TokenStatistics(leaf[rows], torch.zeros_like(leaf[rows]), None, None)
        choice = made.choose(statistics.logprob, statistics.entropy, mine)
        if choice.selected is not None:
            selected[rows] = choice.selected
        totals = Totals.of(inputs.mask)
        total = total + made.loss(statistics, mine, choice, totals=totals, coefficient=0.0).total
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient, selected


def clip_cov_loss(*, clip: float, ratio: float) -> dict[str, Any]:
    return {
        "loss_mode": "clip_cov",
        "clip_ratio_low": clip,
        "clip_ratio_high": clip,
        "clip_cov_ratio": ratio,
        "clip_cov_lb": WINDOW[0],
        "clip_cov_ub": WINDOW[1],
        "allow_large_ratio": True,
    }


def kl_cov_loss(*, ratio: float, coefficient: float) -> dict[str, Any]:
    return {
        "loss_mode": "kl_cov",
        "kl_cov_ratio": ratio,
        "ppo_kl_coef": coefficient,
        "allow_large_ratio": True,
    }


CASES: dict[str, tuple[dict[str, Any], Form]] = {
    "clip_cov": (
        clip_cov_loss(clip=1.0, ratio=1.0),
        partial(clip_cov_with_all_candidates, clip=1.0),
    ),
    "clip_cov within PPO's clip": (
        clip_cov_loss(clip=0.2, ratio=1.0),
        partial(clip_cov_with_all_candidates, clip=0.2),
    ),
    "kl_cov of one token": (
        kl_cov_loss(ratio=2e-4, coefficient=1.0),
        partial(kl_cov, ratio=2e-4, coefficient=1.0),
    ),
    "kl_cov of a fifth": (
        kl_cov_loss(ratio=0.2, coefficient=0.1),
        partial(kl_cov, ratio=0.2, coefficient=0.1),
    ),
    "gspo": ({"loss_mode": "gspo"}, partial(gspo, low=3e-4, high=4e-4)),
    "gspo of wide bounds": (
        {"loss_mode": "gspo", "clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
        partial(gspo, low=0.1, high=0.2),
    ),
    "cispo": ({"loss_mode": "cispo"}, partial(cispo, low=0.2, high=0.2)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("off_policy", ["none", "truncate"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_reference_s(case: str, off_policy: str, seed: int) -> None:
    loss, form = CASES[case]
    logprobs, inputs = random_inputs(seed)
    expected, slope = reference(
        form, logprobs, inputs, off_policy=off_policy, by_sequence=case.startswith("gspo")
    )
    total, gradient, _ = ours(objective(loss, off_policy), logprobs, inputs)
    assert total == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [2e-4, 0.05])
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip_cov_draws_as_many_tokens_as_the_reference_and_from_its_candidates(
    clip: float, ratio: float, seed: int
) -> None:
    logprobs, inputs = random_inputs(seed)
    made = objective(clip_cov_loss(clip=clip, ratio=ratio))
    _, gradient, selected = ours(made, logprobs, inputs)
    for rows in MICRO_BATCHES:
        tokens = tokens_of(logprobs, inputs, rows)
        candidates = clip_cov_candidates(tokens, clip=clip)
        drawn = selected[rows][inputs.mask[rows]].numpy()
        assert not (drawn & ~candidates).any()
        quota = max(int(ratio * len(tokens.logp)), 1)
        assert drawn.sum() == min(quota, candidates.sum())
    assert not gradient[selected].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [2e-4, 0.2])
def test_kl_cov_selects_the_reference_s_tokens(ratio: float, seed: int) -> None:
    logprobs, inputs = random_inputs(seed)
    made = objective(kl_cov_loss(ratio=ratio, coefficient=1.0))
    _, _, selected = ours(made, logprobs, inputs)
    for rows in MICRO_BATCHES:
        expected = kl_cov_selected(tokens_of(logprobs, inputs, rows), ratio=ratio)
        assert selected[rows][inputs.mask[rows]].tolist() == expected.tolist()


def test_the_inputs_reach_every_branch_of_the_reference() -> None:
    clipped = candidates = kept = 0
    for seed in SEEDS:
        logprobs, inputs = random_inputs(seed)
        for rows in MICRO_BATCHES:
            tokens = tokens_of(logprobs, inputs, rows)
            wide = clip_cov_candidates(tokens, clip=1.0)
            candidates += int(wide.sum())
            clipped += int((wide & ~clip_cov_candidates(tokens, clip=0.2)).sum())
            kept += int((gspo(tokens, low=0.1, high=0.2)[1] != 0).sum())
    assert candidates > 100
    assert clipped > 50
    assert kept > 100
