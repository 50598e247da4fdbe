"""A training step on a small model: passes, choices of tokens, what is measured."""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.learner.balance import PassCost
from services.learner.batch import build_batch, collate, plan_micro_batches
from services.learner.loss_modes import LOSS_MODES, OFF_POLICY_WEIGHTS
from services.learner.ranks import Ranks
from shared.config import RunConfig
from shared.records import ScoredGroup
from tests.learner.fakes import (
    RecordingTrainer,
    make_trainer,
    run_config,
    sampled_groups,
    train_steps,
    weights_of,
)

WHOLE, SMALL = 100_000, 30
"""Tokens of a micro-batch that holds a mini-batch, and of one that holds a completion or two."""

FAST = {"learning_rate": 0.3}
"""So fast that the second mini-batch finds other log-probs than the first."""

KL_COV = {"loss_mode": "kl_cov", "kl_cov_ratio": 0.05}
CLIP_COV = {"loss_mode": "clip_cov", "clip_cov_ratio": 0.05, "clip_cov_lb": 0.1}
TOP = {"top_entropy_quantile": 0.3}
CHOOSING: dict[str, dict[str, Any]] = {
    "kl_cov": KL_COV,
    "clip_cov": CLIP_COV,
    "top_entropy": TOP,
    "kl_cov_and_top_entropy": {**KL_COV, **TOP},
}


def config_of(
    loss: dict[str, Any] | None = None,
    *,
    tokens: int = WHOLE,
    cuts: int = 2,
    **sections: dict[str, Any],
) -> RunConfig:
    learner = {
        "groups_per_batch": 4,
        "optimizer_steps_per_batch": cuts,
        "learning_rate": 0.02,
        "micro_batch_tokens": tokens,
        **sections.pop("learner", {}),
    }
    sections = {"diagnostics": {"entropy_change_every_steps": 0}, **sections}
    return run_config(policy_loss=loss or {}, learner=learner, **sections)


def trained(config: RunConfig, batches: list[list[ScoredGroup]] | None = None) -> RecordingTrainer:
    trainer = make_trainer(config)
    train_steps(trainer, batches or [sampled_groups(0), sampled_groups(1)])
    return trainer


def chosen(trainer: RecordingTrainer) -> list[dict[tuple[int, int], tuple[bool, bool]]]:
    """By step: of each token, by completion and position, (selected, kept)."""
    steps = []
    for record, hashes in zip(trainer.records, trainer.uid_hashes, strict=True):
        nothing = torch.zeros_like(record.mask)
        selected = nothing if record.selected is None else record.selected
        kept = nothing if record.kept is None else record.kept
        steps.append(
            {
                (int(hashes[row]), place): (bool(selected[row, place]), bool(kept[row, place]))
                for row, place in record.mask.nonzero().tolist()
            }
        )
    return steps


@pytest.mark.parametrize("loss", CHOOSING.values(), ids=CHOOSING)
@pytest.mark.parametrize("cuts", [2, 4])
def test_a_training_pass_that_also_measures_spares_a_forward_pass_and_changes_nothing(
    loss: dict[str, Any], cuts: int
) -> None:
    early, extra = (trained(config_of(loss, tokens=t, cuts=cuts)) for t in (WHOLE, SMALL))
    torch.testing.assert_close(weights_of(early), weights_of(extra), rtol=0, atol=1e-5)
    assert chosen(early) == chosen(extra)
    # Over two steps: before the step, and one for each mini-batch.
    assert early.plain.num_forwards == 2 * (cuts + cuts)
    num_micro_batches = count_micro_batches(SMALL, cuts)
    num_in_first = count_micro_batches(SMALL, cuts, only_first=True)
    # Every mini-batch but the first is measured once more.
    assert extra.plain.num_forwards == 3 * num_micro_batches - num_in_first


def count_micro_batches(tokens: int, cuts: int, *, only_first: bool = False) -> int:
    """Of the two steps of `trained`."""
    config, total = config_of(tokens=tokens, cuts=cuts), 0
    for seed in (0, 1):
        batch = build_batch(sampled_groups(seed), config, policy_version=0)
        for rows in batch.minibatches[: 1 if only_first else None]:
            plan = plan_micro_batches(
                batch, rows, num_ranks=1, micro_batch_tokens=tokens, cost=PassCost(per_token=1)
            )
            total += len(plan[0])
    return total


@pytest.mark.parametrize("tokens", [WHOLE, SMALL])
def test_the_clamp_is_computed_in_training_passes_alone_and_reported_of_their_weights(
    tokens: int,
) -> None:
    aent = {"method": "aent", "entropy_coeff": 0.002}
    config = config_of(tokens=tokens, learner=FAST, entropy=aent)
    trainer = make_trainer(config)
    fresh = make_trainer(config)
    (report,) = train_steps(trainer, [sampled_groups(0)])
    assert trainer.plain.num_clamped * 2 == trainer.plain.num_forwards
    batch = build_batch(sampled_groups(0), config, policy_version=0)
    whole = fresh.plain.forward(
        collate(batch, range(len(batch.rows))), temperature=1.0, clamp_p=config.entropy.clamp_p
    )
    record = trainer.records[0]
    for name in ("clamped_entropy", "removed_mass"):
        reported, before = getattr(record, name), torch.zeros(record.mask.shape)
        before[record.mask] = getattr(whole, name).detach().float()
        first, second = (list(rows) for rows in batch.minibatches)
        torch.testing.assert_close(reported[first], before[first])
        assert not torch.allclose(reported[second], before[second], atol=1e-3)
    assert record.clamped_entropy is not None
    seen = float(record.clamped_entropy[record.mask].double().mean())
    assert report.metrics["entropy_clamped"] == seen
    fresh.coefficient.observe(entropy=math.nan, clamped_entropy=seen)
    assert trainer.coefficient.state_dict() == fresh.coefficient.state_dict()


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("tokens", [WHOLE, SMALL])
def test_the_batch_s_start_needs_no_pass_beyond_the_training_passes(tokens: int, cuts: int) -> None:
    by_proximal = {**KL_COV, "selection_logprobs": "proximal"}
    for loss in ({}, by_proximal, {**KL_COV, "scope": "micro"}):
        trainer = trained(config_of(loss, tokens=tokens, cuts=cuts))
        assert trainer.plain.num_forwards == 2 * count_micro_batches(tokens, cuts)


def test_micro_batches_are_packed_beside_the_first_pass_and_by_its_end() -> None:
    trainer, beside = make_trainer(config_of(tokens=SMALL, cuts=1)), []

    def note(*_: object) -> None:
        beside.append(any(each.name.startswith("packing") for each in threading.enumerate()))

    trainer.plain.module.register_forward_pre_hook(note)
    train_steps(trainer, [sampled_groups(0)])
    half = len(beside) // 2
    assert half > 1
    assert beside == [True] * half + [False] * half


def test_selection_by_proximal_log_probs_meets_the_weights_of_the_batch_s_start() -> None:
    by_current = trained(config_of(KL_COV, learner=FAST))
    by_proximal = trained(config_of({**KL_COV, "selection_logprobs": "proximal"}, learner=FAST))
    assert chosen(by_current) != chosen(by_proximal)
    one_update = [
        trained(config_of({**KL_COV, **each}, cuts=1))
        for each in ({}, {"selection_logprobs": "proximal"})
    ]
    assert chosen(one_update[0]) == chosen(one_update[1])
    assert torch.equal(weights_of(one_update[0]), weights_of(one_update[1]))


def test_selection_by_proximal_log_probs_holds_for_micro_batches_too() -> None:
    by = {
        each: trained(
            config_of({**KL_COV, "scope": "micro", "selection_logprobs": each}, learner=FAST)
        )
        for each in ("current", "proximal")
    }
    # One micro-batch a mini-batch: the scope makes no difference.
    whole = trained(config_of({**KL_COV, "selection_logprobs": "proximal"}, learner=FAST))
    assert chosen(by["proximal"]) == chosen(whole)
    assert chosen(by["current"]) != chosen(whole)


@settings(max_examples=15)
@given(
    st.sampled_from(list(CHOOSING)),
    st.integers(1, 200),
    st.permutations([0, 1]),
    st.permutations([2, 3]),
)
def test_a_choice_depends_on_no_micro_batch_and_no_order_of_groups(
    name: str, tokens: int, first: list[int], second: list[int]
) -> None:
    whole = trained(config_of(CHOOSING[name]))
    turned = [[groups[i] for i in [*first, *second]] for groups in map(sampled_groups, (0, 1))]
    split = trained(config_of(CHOOSING[name], tokens=tokens), turned)
    assert chosen(split) == chosen(whole)
    assert any(any(each) for each in chosen(whole)[1].values())
    torch.testing.assert_close(weights_of(split), weights_of(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", CHOOSING.values(), ids=CHOOSING)
def test_a_resumed_run_chooses_the_same_tokens(loss: dict[str, Any]) -> None:
    config = config_of(loss)
    straight, resumed = make_trainer(config, sgd=0.5), make_trainer(config, sgd=0.5)
    batches = [sampled_groups(seed) for seed in range(4)]
    train_steps(straight, batches[:2])
    resumed.plain.module.load_state_dict(straight.plain.module.state_dict())
    train_steps(straight, batches[2:], first_step=3)
    train_steps(resumed, batches[2:], first_step=3)
    assert chosen(straight)[2:] == chosen(resumed)
    assert torch.equal(weights_of(straight), weights_of(resumed))


def test_a_new_step_is_a_new_draw() -> None:
    config = config_of({**CLIP_COV, "clip_cov_ratio": 0.02}, cuts=1)
    groups = sampled_groups(0)
    draws = []
    for step in (1, 2):
        trainer = make_trainer(config)
        train_steps(trainer, [groups], first_step=step)
        draws.append(chosen(trainer))
    assert draws[0] != draws[1]


def test_a_quota_is_that_of_the_tokens_it_is_drawn_from() -> None:
    for scope, tokens in (("global", SMALL), ("micro", SMALL), ("micro", WHOLE)):
        trainer = make_trainer(config_of({**KL_COV, "scope": scope}, tokens=tokens))
        (report,) = train_steps(trainer, [sampled_groups(0)])
        assert report.metrics["selected_tokens"] == report.metrics["selected_quota"]


def test_a_kept_share_is_reported() -> None:
    trainer = make_trainer(config_of(TOP))
    (report,) = train_steps(trainer, [sampled_groups(0)])
    # A few more than asked for: tokens of equal entropy are all kept.
    assert 0.3 <= report.metrics["top_entropy_fraction"] < 0.4


@pytest.mark.parametrize("mode", LOSS_MODES)
@pytest.mark.parametrize("method", OFF_POLICY_WEIGHTS)
def test_every_mode_and_correction_trains_alike_in_small_micro_batches(
    mode: str, method: str
) -> None:
    sections: dict[str, Any] = {
        "off_policy": {"method": method},
        "entropy": {"method": "aent", "entropy_coeff": 0.002},
        "advantage": {"ppl_alpha": 0.05, "position_gamma": 0.1},
        "reference_kl": {"coef": 0.1},
    }
    if method != "none":
        sections["off_policy"]["proximal"] = "interpolated"
    loss = {
        "loss_mode": mode,
        "clip_cov_lb": 0.1,
        "entropy_ratio_clip_low": 0.05,
        "entropy_ratio_clip_high": 0.05,
    }
    batches = [sampled_groups(seed, versions=(0, 1)) for seed in (0, 1)]
    ends = []
    for tokens in (WHOLE, SMALL):
        trainer = make_trainer(config_of(loss, tokens=tokens, **sections), sgd=0.5)
        for step, groups in enumerate(batches, start=1):
            report = trainer.train(groups, step=step, policy_version=1)
        assert report.metrics["nonfinite_loss"] == report.metrics["nonfinite_grad"] == 0
        ends.append(weights_of(trainer))
    start = weights_of(make_trainer(config_of()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert float((ends[0] - start).abs().max()) > 1e-4


def test_the_measured_change_of_the_entropy_is_that_between_two_measurements() -> None:
    config = config_of(cuts=2, diagnostics={"entropy_change_every_steps": 1})
    trainer = make_trainer(config)
    groups = sampled_groups(0)
    reports = train_steps(trainer, [groups] * 4)
    entropies = [report.metrics["entropy"] for report in reports]
    changes = [report.metrics["entropy_change_measured"] for report in reports]
    for number in range(3):
        difference = entropies[number + 1] - entropies[number]
        assert changes[number] == pytest.approx(difference, rel=1e-4, abs=1e-7)
    assert min(map(abs, changes)) > 1e-4


def test_the_change_is_measured_every_so_many_steps_and_costs_one_pass() -> None:
    config = config_of(cuts=1, diagnostics={"entropy_change_every_steps": 3})
    trainer = make_trainer(config)
    passes, measured = [], []
    for step in range(1, 8):
        before = trainer.plain.num_forwards
        (report,) = train_steps(trainer, [sampled_groups(step)], first_step=step)
        passes.append(trainer.plain.num_forwards - before)
        measured.append("entropy_change_measured" in report.metrics)
    assert measured == [step % 3 == 0 for step in range(1, 8)]
    assert passes == [3 if step % 3 == 0 else 2 for step in range(1, 8)]


def test_the_predicted_influence_has_the_sign_of_the_measured_change_in_most_steps() -> None:
    config = config_of(
        {"loss_mode": "unclipped"},
        cuts=1,
        off_policy={"method": "none"},
        diagnostics={"entropy_change_every_steps": 1},
    )
    trainer = make_trainer(config, sgd=0.5)
    batches = [sampled_groups(seed, num_groups=8) for seed in range(24)]
    metrics = [report.metrics for report in train_steps(trainer, batches)]
    pairs = torch.tensor(
        [
            [each["entropy_change_measured"], each["entropy_change_predicted_influence"]]
            for each in metrics
        ]
    )
    agrees = pairs[:, 0] * pairs[:, 1] > 0
    assert float(agrees.float().mean()) >= 0.75
    assert float(torch.corrcoef(pairs.T)[0, 1]) > 0.7


def distances(coefficient: float, *, num_steps: int = 8) -> list[float]:
    """Of the policy to its start, by step."""
    config = config_of(cuts=1, reference_kl={"coef": coefficient})
    trainer = make_trainer(config)
    groups = sampled_groups(0)
    reports = train_steps(trainer, [groups] * num_steps)
    return [report.metrics["reference_kl"] for report in reports]


def test_the_reference_is_the_start_and_its_coefficient_pulls_back() -> None:
    loose, tight = distances(1e-6), distances(3.0)
    assert loose[0] == tight[0] == 0
    assert loose[-1] > 0.01
    assert tight[-1] < 0.5 * loose[-1]


def test_without_a_coefficient_no_reference_is_asked_for() -> None:
    trainer = make_trainer(config_of())
    trainer.plain._reference = None  # type: ignore[assignment]
    (report,) = train_steps(trainer, [sampled_groups(0)])
    assert not {"reference_kl", "reference_loss"} & report.metrics.keys()


def entropy_of(trainer: RecordingTrainer) -> Tensor:
    record = trainer.records[-1]
    return record.entropy[record.mask].double().mean()


@pytest.mark.parametrize("method", ["bonus", "aent"])
def test_a_bonus_holds_the_entropy_up(method: str) -> None:
    entropy = {
        "bonus": {"method": "bonus", "entropy_coeff": 1.0},
        "aent": {"method": "aent", "entropy_coeff": 1.0},
    }[method]
    sections: dict[str, Any] = {"entropy": entropy}
    if method == "aent":
        sections["adaptive_entropy"] = {"clip_high": 1.0, "entropy_high": 3.0}
    batches = [sampled_groups(0)] * 8
    with_bonus = trained(config_of(cuts=1, **sections), batches)
    without = trained(config_of(cuts=1), batches)
    assert entropy_of(with_bonus) > entropy_of(without) + 0.02


def test_a_controller_sees_one_entropy_a_step_and_none_of_a_batch_without_verdicts() -> None:
    config = config_of(
        entropy={"method": "target", "entropy_coeff": 0.0}, target_entropy={"target": 9.0}
    )
    trainer = make_trainer(config)
    train_steps(trainer, [sampled_groups(0), sampled_groups(1)])
    assert trainer.coefficient.at(3) == pytest.approx(2e-4)
    train_steps(trainer, [[]], first_step=3)
    assert trainer.coefficient.at(4) == pytest.approx(2e-4)


class HearingRanks(Ranks):
    """One rank that notes how many numbers it was asked to exchange."""

    heard: ClassVar[list[int]] = []

    def sum_in_place(self, values: Tensor) -> None:
        self.heard.append(values.numel())


@pytest.mark.parametrize("loss", [{}, CLIP_COV], ids=["vanilla", "clip_cov"])
def test_what_ranks_exchange_is_as_much_as_there_are_tokens_however_long_the_longest_row(
    loss: dict[str, Any],
) -> None:
    config = config_of(loss, cuts=1)
    batch = build_batch(sampled_groups(0), config, policy_version=0)
    num_tokens = int(batch.mask.sum())
    assert num_tokens < batch.mask.numel()
    HearingRanks.heard.clear()
    trainer = make_trainer(config, ranks=HearingRanks(0, 1, torch.device("cpu"), None))
    train_steps(trainer, [sampled_groups(0)])
    # Log-prob and entropy before, then of the gradient's weights; who was selected; four losses.
    assert sum(HearingRanks.heard) == num_tokens * (4 + bool(loss)) + 4
