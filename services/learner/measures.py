"""What a training step measures: names, definitions, one function a subject.

Keys are those of `metrics.jsonl`. A key is there only if its quantity was measured in this step
and is finite: a run without clamping has no `entropy_clamped`, a step whose loss was NaN no
`loss`. `services.learner.diagnostics` has what is measured per token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.learner.batch import Batch
from services.learner.diagnostics import (
    Metrics,
    Profiles,
    TokenRecord,
    covariance_metrics,
    entropy_change_metrics,
    entropy_metrics,
    entropy_profiles,
    group_verdict,
    mean,
    mismatch_metrics,
    ratio_metrics,
    selection_metrics,
)
from shared.config.algorithm import PolicyLossConfig
from shared.records import Outcome, ScoredGroup


@dataclass(frozen=True, slots=True)
class StepReport:
    """What `LearnerEngine.train` measured.

    Attributes:
        metrics: one finite number a name.
        histograms: value and count, by rising value; `staleness` counts completions by their
            stalest token, `version_lag` counts tokens by their own.
        profiles: numbers in a fixed order a name.
    """

    metrics: Metrics
    histograms: dict[str, list[tuple[int, int]]]
    profiles: Profiles


@dataclass(frozen=True, slots=True)
class Update:
    """One optimiser mini-batch; losses and the gradient's norm are nan where not finite.

    Attributes:
        entropy_loss, entropy_coefficient: None without an entropy term.
        reference_loss: None without a reference model.
        grad_norm: before clipping.
        has_finite_loss: on every rank.
        is_applied: False if the optimiser step was skipped.
    """

    policy_loss: float
    entropy_loss: float | None
    entropy_coefficient: float | None
    reference_loss: float | None
    grad_norm: float
    learning_rate: float
    has_finite_loss: bool
    is_applied: bool


def step_report(
    batch: Batch,
    record: TokenRecord | None,
    updates: Sequence[Update],
    policy_loss: PolicyLossConfig,
) -> StepReport:
    """Everything that a step measured.

    Args:
        record: None if the batch had no usable completion.
    """
    metrics = reward_metrics(batch.groups) | trajectory_metrics(batch) | update_metrics(updates)
    profiles: Profiles = {}
    if record is not None:
        metrics |= entropy_metrics(batch, record) | entropy_change_metrics(record)
        metrics |= covariance_metrics(batch, record, policy_loss)
        metrics |= selection_metrics(record) | ratio_metrics(record) | mismatch_metrics(record)
        profiles = entropy_profiles(record)
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    staleness = Counter(row.staleness for row in batch.rows)
    return StepReport(
        metrics=finite,
        histograms={"staleness": sorted(staleness.items()), "version_lag": _version_lag(batch)},
        profiles=profiles,
    )


def _version_lag(batch: Batch) -> list[tuple[int, int]]:
    counts = torch.bincount(batch.staleness[batch.mask]).tolist()
    return [(lag, count) for lag, count in enumerate(counts) if count]


def reward_metrics(groups: Sequence[ScoredGroup]) -> Metrics:
    """Rewards, verdicts and lengths of all completions of the batch.

    reward_mean, reward_std (population) and pass_rate are over usable completions, lengths and
    truncated_fraction over all, groups_all_correct and groups_all_wrong are numbers of groups.
    """
    pairs = [
        pair
        for group in groups
        for pair in zip(group.rollout.completions, group.scores, strict=True)
    ]
    usable = [score for _, score in pairs if score.is_usable]
    rewards = torch.tensor([score.reward for score in usable], dtype=torch.float64)
    passed = [score.outcome is Outcome.PASS for score in usable]
    lengths: dict[Outcome, list[int]] = {outcome: [] for outcome in Outcome}
    for completion, score in pairs:
        lengths[score.outcome].append(len(completion.token_ids))
    timeouts = len(lengths[Outcome.TIMEOUT])
    verdicts = [group_verdict(group) for group in groups]
    return {
        "reward_mean": mean(rewards.tolist()),
        "reward_std": float(rewards.std(correction=0)) if usable else math.nan,
        "pass_rate": mean(passed),
        "groups_all_correct": verdicts.count(True),
        "groups_all_wrong": verdicts.count(False),
        "completion_length_mean": mean([n for each in lengths.values() for n in each]),
        "completion_length_correct": mean(lengths[Outcome.PASS]),
        "completion_length_incorrect": mean(lengths[Outcome.FAIL]),
        "truncated_fraction": mean([completion.is_truncated for completion, _ in pairs]),
        "verifier_errors": len(pairs) - len(usable) - timeouts,
        "verifier_timeouts": timeouts,
    }


def trajectory_metrics(batch: Batch) -> Metrics:
    """How much was trained on, and how old it was."""
    ages = [row.staleness for row in batch.rows]
    return {
        "completions": len(batch.rows),
        "tokens": int(batch.mask.sum()),
        "staleness_mean": mean(ages),
        "staleness_max": max(ages, default=math.nan),
        "mixed_version_fraction": mean([row.num_versions > 1 for row in batch.rows]),
    }


def update_metrics(updates: Sequence[Update]) -> Metrics:
    """Means over the optimiser mini-batches; nonfinite_* count those that were skipped."""
    policy = [update.policy_loss for update in updates]
    entropy = [update.entropy_loss for update in updates if update.entropy_loss is not None]
    reference = [update.reference_loss for update in updates if update.reference_loss is not None]
    coefficients = [
        update.entropy_coefficient for update in updates if update.entropy_coefficient is not None
    ]
    rates = [update.learning_rate for update in updates]
    return {
        "loss": sum(mean(part) for part in (policy, entropy, reference) if part),
        "policy_loss": mean(policy),
        "entropy_loss": mean(entropy),
        "entropy_coefficient": mean(coefficients),
        "reference_loss": mean(reference),
        "grad_norm": mean([update.grad_norm for update in updates if update.is_applied]),
        "learning_rate": rates[-1] if rates else math.nan,
        "nonfinite_loss": sum(not update.has_finite_loss for update in updates),
        "nonfinite_grad": sum(
            update.has_finite_loss and not update.is_applied for update in updates
        ),
    }
