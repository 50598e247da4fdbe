"""What a training step measures: names, definitions, one function a subject.

Keys are those of `metrics.jsonl`. A key is there only if its quantity was measured in this step
and is finite: a run without clamping has no `entropy_clamped`, a step whose loss was NaN no
`loss`. Values per token are matrices [R, C] of the whole batch, all ranks together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.batch import Batch, is_usable
from shared.config.algorithm import PolicyLossConfig
from shared.records import Outcome, ScoredGroup
from shared.rl.covariance import covariance_percentiles, token_covariance
from shared.rl.loss import MAX_LOG_RATIO
from shared.rl.offpolicy import effective_sample_size, mismatch_kl

Metrics = dict[str, float]

ENTROPY_PERCENTILES = (10, 50, 80, 90, 99)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What `LearnerEngine.train` measured.

    Attributes:
        metrics: one finite number a name.
        histograms: value and count, by rising value; `staleness` counts completions.
    """

    metrics: Metrics
    histograms: dict[str, list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Update:
    """One optimiser mini-batch; losses and the gradient's norm are nan where not finite.

    Attributes:
        entropy_loss, entropy_coefficient: None without an entropy term.
        grad_norm: before clipping.
        has_finite_loss: on every rank.
        is_applied: False if the optimiser step was skipped.
    """

    policy_loss: float
    entropy_loss: float | None
    entropy_coefficient: float | None
    grad_norm: float
    learning_rate: float
    has_finite_loss: bool
    is_applied: bool


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Values per token of a step, [R, C] each, and what was counted along the way.

    Attributes:
        entropy: at temperature 1, before the update.
        clamped_entropy, removed_mass: before the update, at the training temperature.
        proximal_logprobs: before the update. target_logprobs: of the weights each token's
            gradient was taken at. Both at the training temperature.
        weights: off-policy, None without correction.
        clipped: where PPO's clip bound, (low, high); None without it.
        selected: by the covariance method, None without one; `quota` is what it could select.
    """

    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    entropy: Tensor
    proximal_logprobs: Tensor
    target_logprobs: Tensor
    clamped_entropy: Tensor | None = None
    removed_mass: Tensor | None = None
    weights: Tensor | None = None
    clipped: tuple[Tensor, Tensor] | None = None
    selected: Tensor | None = None
    quota: int = 0


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
    if record is not None:
        metrics |= entropy_metrics(batch, record) | covariance_metrics(record, policy_loss)
        metrics |= selection_metrics(record) | ratio_metrics(record) | mismatch_metrics(record)
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    staleness = Counter(row.staleness for row in batch.rows)
    return StepReport(metrics=finite, histograms={"staleness": sorted(staleness.items())})


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
    usable = [score for _, score in pairs if is_usable(score)]
    rewards = torch.tensor([score.reward for score in usable], dtype=torch.float64)
    passed = [score.outcome is Outcome.PASS for score in usable]
    lengths: dict[Outcome, list[int]] = {outcome: [] for outcome in Outcome}
    for completion, score in pairs:
        lengths[score.outcome].append(len(completion.token_ids))
    timeouts = len(lengths[Outcome.TIMEOUT])
    verdicts = [_group_verdict(group) for group in groups]
    return {
        "reward_mean": _mean(rewards.tolist()),
        "reward_std": float(rewards.std(correction=0)) if usable else math.nan,
        "pass_rate": _mean(passed),
        "groups_all_correct": verdicts.count(True),
        "groups_all_wrong": verdicts.count(False),
        "completion_length_mean": _mean([n for each in lengths.values() for n in each]),
        "completion_length_correct": _mean(lengths[Outcome.PASS]),
        "completion_length_incorrect": _mean(lengths[Outcome.FAIL]),
        "truncated_fraction": _mean([completion.is_truncated for completion, _ in pairs]),
        "verifier_errors": len(pairs) - len(usable) - timeouts,
        "verifier_timeouts": timeouts,
    }


def trajectory_metrics(batch: Batch) -> Metrics:
    """How much was trained on, and how old it was."""
    ages = [row.staleness for row in batch.rows]
    return {
        "completions": len(batch.rows),
        "tokens": int(batch.mask.sum()),
        "staleness_mean": _mean(ages),
        "staleness_max": max(ages, default=math.nan),
        "mixed_version_fraction": _mean([row.num_versions > 1 for row in batch.rows]),
    }


def update_metrics(updates: Sequence[Update]) -> Metrics:
    """Means over the optimiser mini-batches; nonfinite_* count those that were skipped."""
    policy = [update.policy_loss for update in updates]
    entropy = [update.entropy_loss for update in updates if update.entropy_loss is not None]
    coefficients = [
        update.entropy_coefficient for update in updates if update.entropy_coefficient is not None
    ]
    rates = [update.learning_rate for update in updates]
    return {
        "loss": _mean(policy) + (_mean(entropy) if entropy else 0.0),
        "policy_loss": _mean(policy),
        "entropy_loss": _mean(entropy),
        "entropy_coefficient": _mean(coefficients),
        "grad_norm": _mean([update.grad_norm for update in updates if update.is_applied]),
        "learning_rate": rates[-1] if rates else math.nan,
        "nonfinite_loss": sum(not update.has_finite_loss for update in updates),
        "nonfinite_grad": sum(
            update.has_finite_loss and not update.is_applied for update in updates
        ),
    }


def entropy_metrics(batch: Batch, record: TokenRecord) -> Metrics:
    """Entropy before the update, in nats.

    entropy is the mean over tokens, entropy_seq_mean the mean over completions of their means,
    entropy_after_filter the same over groups that are neither all correct nor all wrong (the
    H of the entropy law).
    """
    per_row = _row_means(record.entropy, record.mask)
    mixed = [_group_verdict(group) is None for group in batch.groups]
    kept = [number for number, row in enumerate(batch.rows) if mixed[row.group]]
    tokens = record.entropy[record.mask].double()
    points = torch.tensor(ENTROPY_PERCENTILES, dtype=torch.float64, device=tokens.device) / 100
    metrics = {
        "entropy": float(tokens.mean()),
        "entropy_seq_mean": float(per_row.mean()),
        "entropy_after_filter": _mean(per_row[kept].tolist()),
    }
    for percent, value in zip(ENTROPY_PERCENTILES, _quantiles(tokens, points), strict=True):
        metrics[f"entropy_p{percent}"] = value
    if record.clamped_entropy is not None and record.removed_mass is not None:
        metrics["entropy_clamped"] = float(record.clamped_entropy[record.mask].double().mean())
        metrics["entropy_removed_mass"] = float(record.removed_mass[record.mask].double().mean())
    return metrics


def covariance_metrics(record: TokenRecord, policy_loss: PolicyLossConfig) -> Metrics:
    """Covariance of log-prob and advantage over the batch, before the update.

    covariance_top_p is the mean over the top p percent of the tokens; the window is that of
    Clip-Cov, (clip_cov_lb, clip_cov_ub).
    """
    covariance = token_covariance(record.proximal_logprobs, record.advantages, record.mask)
    tail = covariance_percentiles(covariance, record.mask)
    tokens = covariance[record.mask].double()
    in_window = (tokens > policy_loss.clip_cov_lb) & (tokens < policy_loss.clip_cov_ub)
    metrics = {
        "covariance_mean": float(tokens.mean()),
        "covariance_in_window_fraction": float(in_window.double().mean()),
    }
    metrics |= {f"covariance_p{_spell(p)}": value for p, value in tail.percentiles.items()}
    metrics |= {f"covariance_top_{_spell(p)}": value for p, value in tail.top_means.items()}
    return metrics


def selection_metrics(record: TokenRecord) -> Metrics:
    """Which tokens the covariance method chose; {} without one."""
    if record.selected is None:
        return {}
    advantages = record.advantages[record.selected]
    probabilities = record.target_logprobs[record.selected].exp()
    return {
        "selected_tokens": len(advantages),
        "selected_quota": record.quota,
        "selected_negative_advantage_fraction": _mean((advantages < 0).tolist()),
        "selected_probability_mean": _mean(probabilities.tolist()),
    }


def ratio_metrics(record: TokenRecord) -> Metrics:
    """The importance ratio target / proximal, and the shares of tokens where PPO's clip bound."""
    difference = (record.target_logprobs - record.proximal_logprobs)[record.mask]
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).double().exp()
    metrics = {"ratio_max": float(ratio.max()), "ratio_mean": float(ratio.mean())}
    if record.clipped is not None:
        low, high = record.clipped
        metrics["clip_fraction_low"] = float(low.sum()) / len(ratio)
        metrics["clip_fraction_high"] = float(high.sum()) / len(ratio)
    return metrics


def mismatch_metrics(record: TokenRecord) -> Metrics:
    """proximal against behaviour; importance_weight_ess is a share of the tokens."""
    mismatch = mismatch_kl(record.proximal_logprobs, record.behaviour_logprobs, record.mask)
    metrics = {
        "mismatch_kl": float(mismatch.kl),
        "mismatch_abs_mean": float(mismatch.mean_abs),
        "mismatch_abs_max": float(mismatch.max_abs),
    }
    if record.weights is not None:
        size = effective_sample_size(record.weights, record.mask)
        metrics["importance_weight_mean"] = float(record.weights[record.mask].double().mean())
        metrics["importance_weight_ess"] = float(size) / int(record.mask.sum())
    return metrics


def _group_verdict(group: ScoredGroup) -> bool | None:
    """True if every usable completion passed, False if each failed, None otherwise."""
    verdicts = {score.outcome is Outcome.PASS for score in group.scores if is_usable(score)}
    return verdicts.pop() if len(verdicts) == 1 else None


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, values, 0.0).double()
    return kept.sum(-1) / mask.sum(-1).clamp(min=1)


def _quantiles(values: Tensor, points: Tensor) -> list[float]:
    """Linearly interpolated; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    places = points * (len(ordered) - 1)
    below, above = ordered[places.floor().long()], ordered[places.ceil().long()]
    quantiles: list[float] = torch.lerp(below, above, places.frac()).tolist()
    return quantiles


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _spell(percent: float) -> str:
    """99.8 as 99_8, 2.0 as 2."""
    return f"{percent:g}".replace(".", "_")
