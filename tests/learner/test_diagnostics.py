"""What is measured per token, against loops over small examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.learner.batch import Batch, build_batch
from services.learner.diagnostics import (
    ENTROPY_EDGES,
    TokenRecord,
    covariance_metrics,
    entropy_change_metrics,
    entropy_metrics,
    entropy_profiles,
    mismatch_metrics,
    ratio_metrics,
    selection_metrics,
)
from services.learner.measures import StepReport, Update, step_report
from shared.config.algorithm import PolicyLossConfig
from shared.records import Outcome, ScoredGroup
from shared.rl.entropy import predicted_entropy_change_sampled
from tests.learner.fakes import run_config, scored_group

PASS, FAIL, ERROR = Outcome.PASS, Outcome.FAIL, Outcome.ERROR
NAN = math.nan
POLICY_LOSS = PolicyLossConfig()

GROUPS = [
    scored_group(0, [PASS, PASS], lengths=[2, 3]),
    scored_group(1, [FAIL, FAIL, ERROR], lengths=[1, 4, 2]),
    scored_group(2, [PASS, FAIL, FAIL, FAIL, ERROR], lengths=[5, 2, 1, 3, 9]),
    scored_group(3, [PASS, FAIL, PASS, FAIL], lengths=[4, 4, 2, 1]),
    scored_group(4, [PASS, FAIL, PASS], lengths=[3, 1, 2]),
    scored_group(5, [FAIL, FAIL, FAIL, FAIL, PASS], lengths=[1, 2, 2, 3, 1]),
]
BUCKETS = {"0": [1], "0_25": [2, 5], "0_5": [3], "0_75": [4], "1": [0]}


def batch_of(groups: Sequence[ScoredGroup] = GROUPS) -> Batch:
    return build_batch(groups, run_config(), policy_version=0)


def record_of(batch: Batch, seed: int = 0) -> TokenRecord:
    """Random quantities, NaN wherever nothing was sampled."""
    generator = torch.Generator().manual_seed(seed)
    mask = batch.mask

    def draw(size: float) -> Tensor:
        values = torch.rand(mask.shape, generator=generator) * size
        return values.masked_fill(~mask, NAN)

    measured = -draw(3.0)
    return TokenRecord(
        mask=mask,
        advantages=batch.advantages,
        behaviour_logprobs=measured + draw(0.4) - 0.2,
        entropy=draw(1.5),
        entropy_before=draw(1.5),
        measured_logprobs=measured,
        proximal_logprobs=measured,
        target_logprobs=measured + draw(0.6) - 0.3,
    )


def tokens(values: Tensor, mask: Tensor) -> list[list[float]]:
    """By row, those in the mask."""
    return [line[kept].tolist() for line, kept in zip(values.double(), mask, strict=True)]


def report_of(batch: Batch, record: TokenRecord | None, updates: Sequence[Update]) -> StepReport:
    return step_report(batch, record, updates, POLICY_LOSS)


def covariance(left: list[float], right: list[float]) -> float:
    means = fmean(left), fmean(right)
    return fmean((x - means[0]) * (y - means[1]) for x, y in zip(left, right, strict=True))


def test_entropy_is_split_by_reward_and_by_how_often_the_prompt_was_solved() -> None:
    batch = batch_of()
    record = record_of(batch)
    found = entropy_metrics(batch, record)
    rows = [fmean(each) for each in tokens(record.entropy, record.mask)]
    flat = [value for each in tokens(record.entropy, record.mask) for value in each]
    positive = [value for value, row in zip(rows, batch.rows, strict=True) if row.reward > 0]
    other = [value for value, row in zip(rows, batch.rows, strict=True) if row.reward <= 0]
    mixed = [value for value, row in zip(rows, batch.rows, strict=True) if row.group > 1]
    reported = [value for each in tokens(record.behaviour_logprobs, record.mask) for value in each]
    expected = {
        "entropy": fmean(flat),
        "entropy_seq_mean": fmean(rows),
        "entropy_after_filter": fmean(mixed),
        "entropy_sampled": -fmean(reported),
        "entropy_reward_positive": fmean(positive),
        "entropy_reward_other": fmean(other),
    }
    for name, groups in BUCKETS.items():
        expected[f"entropy_by_accuracy_{name}"] = fmean(
            value for value, row in zip(rows, batch.rows, strict=True) if row.group in groups
        )
    assert expected.items() <= {k: pytest.approx(v, rel=1e-9) for k, v in found.items()}.items()


def test_a_reward_of_minus_one_is_not_positive_and_half_of_one_is() -> None:
    group = scored_group(0, [FAIL, PASS], lengths=[1, 1], rewards=[-1.0, 0.5])
    batch = batch_of([group])
    record = replace(record_of(batch), entropy=torch.tensor([[0.25], [0.75]]))
    found = entropy_metrics(batch, record)
    assert (found["entropy_reward_other"], found["entropy_reward_positive"]) == (0.25, 0.75)


def test_a_bucket_that_no_prompt_is_in_has_no_entropy() -> None:
    batch = batch_of(GROUPS[:1])
    metrics = report_of(batch, record_of(batch), []).metrics
    assert "entropy_by_accuracy_1" in metrics
    assert "covariance_by_accuracy_1" in metrics
    absent = [f"{kind}_by_accuracy_{each}" for kind in ("entropy", "covariance") for each in "0"]
    assert not {*absent, "entropy_by_accuracy_0_5", "entropy_reward_other"} & metrics.keys()


def test_percentiles_of_the_entropy_are_interpolated() -> None:
    batch = batch_of([scored_group(0, [PASS], lengths=[11])])
    values = torch.arange(11.0).flip(0).unsqueeze(0)
    found = entropy_metrics(batch, replace(record_of(batch), entropy=values))
    points = [found[f"entropy_p{percent}"] for percent in (10, 50, 80, 90, 99)]
    assert points == pytest.approx([1, 5, 8, 9, 9.9])


def test_the_clamped_entropy_is_averaged_over_tokens_and_over_completions() -> None:
    batch = batch_of([scored_group(0, [PASS, FAIL], lengths=[1, 3])])
    record = replace(
        record_of(batch),
        clamped_entropy=torch.tensor([[4.0, NAN, NAN], [1.0, 2.0, 3.0]]),
        removed_mass=torch.tensor([[0.1, NAN, NAN], [0.2, 0.2, 0.3]]),
    )
    found = entropy_metrics(batch, record)
    assert found["entropy_clamped"] == 2.5
    assert found["entropy_clamped_seq_mean"] == 3
    assert found["entropy_removed_mass"] == pytest.approx(0.2)


def test_the_histogram_counts_a_token_on_an_edge_in_the_bin_above() -> None:
    values = [0.0, 0.049, 0.05, 0.099, 0.1, 0.15, 0.2, 0.3, 0.7, 1.1, 1.199, 1.2, 3.0, 11.0]
    batch = batch_of([scored_group(0, [PASS], lengths=[len(values)])])
    entropy = torch.tensor([values], dtype=torch.float64)
    counts = entropy_profiles(replace(record_of(batch), entropy=entropy))["entropy_histogram"]
    expected = [
        sum(low <= value < high for value in values) for low, high in pairwise(ENTROPY_EDGES)
    ]
    assert counts == expected == [2, 2, 2, 1, 1, 0, 0, 0, 1, 0, 0, 0, 2, 3]
    assert ENTROPY_EDGES[:4] == (0, 0.05, 0.1, 0.2)
    assert ENTROPY_EDGES[-2:] == (1.2, math.inf)


@given(st.lists(st.integers(1, 130), min_size=1, max_size=4))
def test_entropy_by_position_is_the_mean_of_each_tenth_of_the_completions(
    lengths: list[int],
) -> None:
    batch = batch_of([scored_group(0, [PASS] * len(lengths), lengths=lengths)])
    record = record_of(batch)
    tenths: list[list[float]] = [[] for _ in range(10)]
    for row in tokens(record.entropy, record.mask):
        for place, value in enumerate(row):
            tenths[10 * place // len(row)].append(value)
    found = entropy_profiles(record)["entropy_by_position"]
    expected = [fmean(each) if each else NAN for each in tenths]
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_the_covariance_of_completions_is_the_mean_over_prompts_of_equation_9() -> None:
    batch = batch_of()
    record = record_of(batch)
    found = covariance_metrics(batch, record, POLICY_LOSS)
    by_group: dict[int, list[tuple[float, float]]] = {}
    rows = tokens(record.measured_logprobs, record.mask)
    for row, logprobs in zip(batch.rows, rows, strict=True):
        by_group.setdefault(row.group, []).append((fmean(logprobs), row.advantage))
    of_group = {
        group: covariance([x for x, _ in pairs], [math.exp(x) * a for x, a in pairs])
        for group, pairs in by_group.items()
    }
    assert found["covariance_response"] == pytest.approx(fmean(of_group.values()), rel=1e-9)
    for name, groups in BUCKETS.items():
        expected = fmean(of_group[group] for group in groups)
        assert found[f"covariance_by_accuracy_{name}"] == pytest.approx(expected, rel=1e-9)
    assert of_group[2] != 0


def test_the_covariance_of_tokens_is_equation_10() -> None:
    batch = batch_of()
    record = record_of(batch)
    logprobs = [v for row in tokens(record.measured_logprobs, record.mask) for v in row]
    advantages = [v for row in tokens(record.advantages, record.mask) for v in row]
    means = fmean(logprobs), fmean(advantages)
    terms = [(x - means[0]) * (a - means[1]) for x, a in zip(logprobs, advantages, strict=True)]
    window = PolicyLossConfig(loss_mode="clip_cov", clip_cov_lb=0.2, clip_cov_ub=0.9)
    found = covariance_metrics(batch, record, window)
    inside = [0.2 < term < 0.9 for term in terms]
    assert found["covariance_mean"] == pytest.approx(fmean(terms), rel=1e-5)
    assert found["covariance_in_window_fraction"] == pytest.approx(fmean(inside))
    assert found["covariance_p100"] == pytest.approx(max(terms), rel=1e-5)
    assert found["covariance_top_100"] == pytest.approx(fmean(terms), rel=1e-5)
    assert found["covariance_top_0_02"] == pytest.approx(max(terms), rel=1e-5)
    assert 0 < fmean(inside) < 1


def test_predicted_changes_of_the_entropy_are_their_slow_loops() -> None:
    batch = batch_of()
    generator = torch.Generator().manual_seed(2)
    shape = (*batch.mask.shape, 6)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    actions = torch.randint(0, 6, batch.mask.shape, generator=generator)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    logprob = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    pull = (log_probs.exp().square() * (log_probs + entropy.unsqueeze(-1))).sum(-1)
    after = entropy + torch.randn(entropy.shape, generator=generator) * 0.1
    advantages = batch.advantages.double()
    hidden = ~batch.mask
    record = replace(
        record_of(batch),
        advantages=advantages,
        measured_logprobs=logprob.masked_fill(hidden, NAN),
        entropy_before=entropy.masked_fill(hidden, NAN),
        entropy_after=after.masked_fill(hidden, NAN),
        mean_pull=pull.masked_fill(hidden, NAN),
    )
    found = entropy_change_metrics(record)
    log_p = logprob[batch.mask].tolist()
    a = advantages[batch.mask].tolist()
    products = [math.exp(x) * each for x, each in zip(log_p, a, strict=True)]
    influence = predicted_entropy_change_sampled(logits, actions, advantages, learning_rate=1.0)
    assert found == {
        "entropy_change_measured": pytest.approx(float((after - entropy)[batch.mask].mean())),
        "entropy_change_predicted_pg": pytest.approx(-covariance(log_p, products)),
        "entropy_change_predicted_npg": pytest.approx(-covariance(log_p, a)),
        "entropy_change_predicted_influence": pytest.approx(float(influence[batch.mask].mean())),
    }
    assert all(abs(value) > 1e-3 for value in found.values())


def test_the_update_s_distances_are_those_of_the_ratios() -> None:
    batch = batch_of()
    record = record_of(batch)
    x = (record.target_logprobs - record.proximal_logprobs)[record.mask].tolist()
    ratios = [math.exp(each) for each in x]
    expected = {
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
        "ratio_mean": fmean(ratios),
        "update_kl": fmean(math.exp(each) - 1 - each for each in x),
    }
    assert ratio_metrics(record) == pytest.approx(expected, rel=1e-6)
    assert expected["ratio_min"] < 1 < expected["ratio_max"]


def test_without_an_update_every_distance_is_0() -> None:
    record = record_of(batch_of())
    found = ratio_metrics(replace(record, target_logprobs=record.proximal_logprobs))
    assert found == {"ratio_max": 1, "ratio_min": 1, "ratio_mean": 1, "update_kl": 0}


def test_absurd_ratios_are_cut_and_stay_finite() -> None:
    record = record_of(batch_of([scored_group(0, [PASS], lengths=[2])]))
    target = record.proximal_logprobs + torch.tensor([[-800.0, 800.0]])
    found = ratio_metrics(replace(record, target_logprobs=target))
    assert found["ratio_min"] == pytest.approx(math.exp(-20))
    assert found["ratio_max"] == pytest.approx(math.exp(20))
    assert math.isfinite(found["update_kl"])


def test_the_distance_to_the_reference_is_k3_from_target_to_reference() -> None:
    record = record_of(batch_of())
    reference = record.measured_logprobs + 0.3
    x = (record.target_logprobs - reference)[record.mask].tolist()
    found = ratio_metrics(replace(record, reference_logprobs=reference))
    expected = fmean(math.exp(-each) - 1 + each for each in x)
    assert found["reference_kl"] == pytest.approx(expected, rel=1e-5)


def test_clip_fractions_are_shares_of_all_tokens() -> None:
    batch = batch_of([scored_group(0, [PASS, FAIL], lengths=[1, 3])])
    low = torch.tensor([[False] * 3, [True, True, False]])
    high = torch.tensor([[True, False, False], [False] * 3])
    found = ratio_metrics(replace(record_of(batch), clipped=(low, high)))
    assert (found["clip_fraction_low"], found["clip_fraction_high"]) == (0.5, 0.25)


def test_selected_tokens_are_described() -> None:
    batch = batch_of([scored_group(0, [PASS, FAIL, FAIL], lengths=[1, 3, 1])])
    record = replace(
        record_of(batch),
        advantages=torch.tensor([[2.0, 0, 0], [-1.0, -0.5, 3.0], [0.25, 0, 0]]),
        target_logprobs=torch.tensor([[0.5, NAN, NAN], [0.25, 0.125, 1.0], [1, NAN, NAN]]).log(),
        selected=torch.tensor([[True, False, False], [True, True, False], [False] * 3]),
        quota=4,
    )
    assert selection_metrics(record) == pytest.approx(
        {
            "selected_tokens": 3,
            "selected_quota": 4,
            "selected_fraction": 0.6,
            "selected_negative_advantage_fraction": 2 / 3,
            "selected_abs_advantage_mean": 3.5 / 3,
            "selected_probability_mean": 0.875 / 3,
        }
    )


def test_a_selection_of_nothing_has_a_size_and_no_means() -> None:
    batch = batch_of([scored_group(0, [PASS, FAIL])])
    nothing = replace(record_of(batch), selected=torch.zeros_like(batch.mask), quota=1)
    metrics = report_of(batch, nothing, []).metrics
    assert metrics["selected_tokens"] == metrics["selected_fraction"] == 0
    assert "selected_abs_advantage_mean" not in metrics


def test_what_the_masks_keep_and_drop_are_shares_of_all_tokens() -> None:
    batch = batch_of([scored_group(0, [PASS, FAIL], lengths=[1, 3])])
    record = replace(
        record_of(batch),
        kept=torch.tensor([[True, False, False], [False] * 3]),
        entropy_ratio_kept=torch.tensor([[True, False, False], [True, True, False]]),
    )
    found = selection_metrics(record)
    assert found == {"top_entropy_fraction": 0.25, "entropy_ratio_clipped_fraction": 0.25}


def test_the_mismatch_is_between_the_learner_s_weights_and_the_sampler_s_report() -> None:
    batch = batch_of()
    record = record_of(batch)
    x = (record.measured_logprobs - record.behaviour_logprobs)[record.mask].tolist()
    weights = (record.measured_logprobs - record.behaviour_logprobs).exp()
    w = weights[record.mask].tolist()
    found = mismatch_metrics(replace(record, weights=weights))
    expected = {
        "mismatch_kl": fmean(math.exp(each) - 1 - each for each in x),
        "mismatch_abs_mean": fmean(abs(each) for each in x),
        "mismatch_abs_max": max(abs(each) for each in x),
        "importance_weight_mean": fmean(w),
        "importance_weight_ess": sum(w) ** 2 / sum(each**2 for each in w) / len(w),
    }
    assert found == pytest.approx(expected, rel=1e-4)


UPDATE = Update(
    policy_loss=0.5,
    entropy_loss=None,
    entropy_coefficient=None,
    reference_loss=None,
    grad_norm=2.0,
    learning_rate=1e-3,
    has_finite_loss=True,
    is_applied=True,
)
CONDITIONAL = {
    "entropy_clamped": "clamped_entropy",
    "entropy_clamped_seq_mean": "clamped_entropy",
    "entropy_removed_mass": "clamped_entropy",
    "entropy_change_measured": "entropy_after",
    "entropy_change_predicted_pg": "entropy_after",
    "entropy_change_predicted_npg": "entropy_after",
    "entropy_change_predicted_influence": "entropy_after",
    "reference_kl": "reference_logprobs",
    "importance_weight_mean": "weights",
    "importance_weight_ess": "weights",
    "clip_fraction_low": "clipped",
    "clip_fraction_high": "clipped",
    "selected_tokens": "selected",
    "selected_quota": "selected",
    "selected_fraction": "selected",
    "selected_negative_advantage_fraction": "selected",
    "selected_abs_advantage_mean": "selected",
    "selected_probability_mean": "selected",
    "top_entropy_fraction": "kept",
    "entropy_ratio_clipped_fraction": "entropy_ratio_kept",
}


@pytest.mark.parametrize("part", sorted(set(CONDITIONAL.values())))
def test_a_key_is_there_only_if_its_quantity_was_measured(part: str) -> None:
    batch = batch_of()
    record = record_of(batch)
    parts: dict[str, dict[str, object]] = {
        "clamped_entropy": {"clamped_entropy": record.entropy, "removed_mass": record.entropy},
        "entropy_after": {"entropy_after": record.entropy, "mean_pull": record.entropy},
        "reference_logprobs": {"reference_logprobs": record.measured_logprobs},
        "weights": {"weights": record.entropy},
        "clipped": {"clipped": (record.mask, record.mask)},
        "selected": {"selected": record.mask},
        "kept": {"kept": record.mask},
        "entropy_ratio_kept": {"entropy_ratio_kept": record.mask},
    }
    plain = report_of(batch, record, [UPDATE]).metrics.keys()
    added = replace(record, **parts[part])  # type: ignore[arg-type]
    rich = report_of(batch, added, [UPDATE]).metrics.keys()
    assert rich - plain == {key for key, needs in CONDITIONAL.items() if needs == part}
    assert not plain - rich


def test_losses_are_means_over_updates_of_the_terms_that_there_are() -> None:
    batch = batch_of()
    plain = report_of(batch, None, [UPDATE, replace(UPDATE, policy_loss=1.5)])
    assert plain.metrics["loss"] == plain.metrics["policy_loss"] == 1.0
    absent = {"entropy_loss", "entropy_coefficient", "reference_loss", "entropy"}
    assert not absent & plain.metrics.keys()
    assert plain.profiles == {}
    full = replace(UPDATE, entropy_loss=-0.25, entropy_coefficient=0.01, reference_loss=0.125)
    metrics = report_of(batch, None, [full]).metrics
    assert metrics["loss"] == 0.375
    assert metrics["reference_loss"] == 0.125
    assert metrics["entropy_coefficient"] == 0.01


def test_a_loss_that_is_not_finite_is_counted_and_not_shown() -> None:
    broken = replace(UPDATE, policy_loss=NAN, has_finite_loss=False, is_applied=False)
    metrics = report_of(batch_of(), None, [broken]).metrics
    assert metrics["nonfinite_loss"] == 1
    assert metrics["nonfinite_grad"] == 0
    assert not {"loss", "policy_loss", "grad_norm"} & metrics.keys()
