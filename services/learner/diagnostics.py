"""What a step's tokens tell about entropy, covariance, selection, ratios and mismatch.

Values per token are matrices [R, C] of the whole batch, all ranks together. Entropies are in
nats and of the weights before the update unless named otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.batch import Batch
from shared.config.algorithm import PolicyLossConfig
from shared.records import Outcome, ScoredGroup
from shared.rl.covariance import covariance_percentiles, token_covariance
from shared.rl.entropy import entropy_influence
from shared.rl.kl import reference_kl
from shared.rl.loss import MAX_LOG_RATIO
from shared.rl.offpolicy import effective_sample_size, mismatch_kl

Metrics = dict[str, float]
Profiles = dict[str, list[float]]

ENTROPY_PERCENTILES = (10, 50, 80, 90, 99)

ENTROPY_EDGES = (0.0, 0.05, *(tenth / 10 for tenth in range(1, 13)), math.inf)
"""Of `entropy_histogram`: the release of arXiv 2505.22617 has them, without the last."""

ACCURACY_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Upper ends: prompts solved never, in up to a quarter of their completions, ..., in up to all."""

NUM_POSITIONS = 10


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Values per token of a step, [R, C] each, and what was counted along the way.

    Attributes:
        advantages: as the loss had them, shaping included.
        entropy: at temperature 1; everything else at the training temperature.
        entropy_before, measured_logprobs: of the learner's weights before the update.
        entropy_after, mean_pull: after and before it, in steps that compare the entropy's change
            with its prediction.
        proximal_logprobs: what ratio and weight are taken against.
        target_logprobs, clamped_entropy, removed_mass: of the weights each token's gradient was
            taken at.
        weights: off-policy, None without correction.
        clipped: where the surrogate's clip bound, (low, high); None without it.
        selected: by the covariance method, None without one; `quota` is what it could select.
        kept: by the top-entropy mask. entropy_ratio_kept: by entropy-ratio clipping.
    """

    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    entropy: Tensor
    entropy_before: Tensor
    measured_logprobs: Tensor
    proximal_logprobs: Tensor
    target_logprobs: Tensor
    entropy_after: Tensor | None = None
    mean_pull: Tensor | None = None
    clamped_entropy: Tensor | None = None
    removed_mass: Tensor | None = None
    reference_logprobs: Tensor | None = None
    weights: Tensor | None = None
    clipped: tuple[Tensor, Tensor] | None = None
    selected: Tensor | None = None
    kept: Tensor | None = None
    entropy_ratio_kept: Tensor | None = None
    quota: int = 0


def entropy_metrics(batch: Batch, record: TokenRecord) -> Metrics:
    """Entropy of the policy over the sampled tokens.

    entropy is the mean over tokens, entropy_seq_mean the mean over completions of their means,
    entropy_after_filter the same over groups that are neither all correct nor all wrong (the
    H of the entropy law). entropy_reward_positive is over completions with a reward above 0,
    entropy_reward_other over the rest, entropy_by_accuracy_* over those of prompts by how often
    they were solved. entropy_sampled is the mean -log-prob that the sampler reported: the same
    quantity estimated from the samples, if the engines agree.
    """
    per_row = _row_means(record.entropy, record.mask)
    mixed = [group_verdict(group) is None for group in batch.groups]
    tokens = record.entropy[record.mask].double()
    points = torch.tensor(ENTROPY_PERCENTILES, dtype=torch.float64, device=tokens.device) / 100
    is_positive = torch.tensor([row.reward > 0 for row in batch.rows], device=tokens.device)
    metrics = {
        "entropy": float(tokens.mean()),
        "entropy_seq_mean": float(per_row.mean()),
        "entropy_after_filter": mean(per_row[[mixed[row.group] for row in batch.rows]].tolist()),
        "entropy_sampled": -float(record.behaviour_logprobs[record.mask].double().mean()),
        "entropy_reward_positive": mean(per_row[is_positive].tolist()),
        "entropy_reward_other": mean(per_row[~is_positive].tolist()),
    }
    for percent, value in zip(ENTROPY_PERCENTILES, _quantiles(tokens, points), strict=True):
        metrics[f"entropy_p{percent}"] = value
    metrics |= _by_accuracy("entropy", batch, [row.group for row in batch.rows], per_row.tolist())
    if record.clamped_entropy is not None and record.removed_mass is not None:
        per_row = _row_means(record.clamped_entropy, record.mask)
        metrics["entropy_clamped"] = float(record.clamped_entropy[record.mask].double().mean())
        metrics["entropy_clamped_seq_mean"] = float(per_row.mean())
        metrics["entropy_removed_mass"] = float(record.removed_mass[record.mask].double().mean())
    return metrics


def entropy_profiles(record: TokenRecord) -> Profiles:
    """entropy_histogram: tokens between ENTROPY_EDGES. entropy_by_position: by tenth of a row."""
    tokens = record.entropy[record.mask].double()
    edges = torch.tensor(ENTROPY_EDGES[1:-1], dtype=torch.float64, device=tokens.device)
    bins = torch.bucketize(tokens, edges, right=True)
    place = (record.mask.cumsum(-1) - 1) / record.mask.sum(-1, keepdim=True).clamp(min=1)
    tenth = (place[record.mask] * NUM_POSITIONS).long().clamp(max=NUM_POSITIONS - 1)
    sums = torch.zeros(NUM_POSITIONS, dtype=torch.float64, device=tokens.device)
    counts = tenth.bincount(minlength=NUM_POSITIONS)
    means = sums.index_add(0, tenth, tokens) / counts
    return {
        "entropy_histogram": bins.bincount(minlength=len(ENTROPY_EDGES) - 1).tolist(),
        "entropy_by_position": means.tolist(),
    }


def entropy_change_metrics(record: TokenRecord) -> Metrics:
    """The change of the entropy over the step, on the same tokens, and what predicts it.

    The predictions are per unit of a step in logit space, which the optimiser's is not: compare
    their sign and their course. pg and npg are -Cov(log p, p A) and -Cov(log p, A) over tokens
    (theorems 1 and 2 of arXiv 2505.22617, whose p A and A are over actions); influence is exact to
    first order for the sampled gradient of a softmax over free logits. {} in other steps.
    """
    if record.entropy_after is None or record.mean_pull is None:
        return {}
    mask, logprobs, advantages = record.mask, record.measured_logprobs, record.advantages
    influence = entropy_influence(logprobs, record.entropy_before, record.mean_pull, advantages)
    change = (record.entropy_after - record.entropy_before)[mask].double()
    of_products = token_covariance(logprobs, logprobs.exp() * advantages, mask)
    of_advantages = token_covariance(logprobs, advantages, mask)
    return {
        "entropy_change_measured": float(change.mean()),
        "entropy_change_predicted_pg": -float(of_products[mask].double().mean()),
        "entropy_change_predicted_npg": -float(of_advantages[mask].double().mean()),
        "entropy_change_predicted_influence": float(influence[mask].double().mean()),
    }


def covariance_metrics(batch: Batch, record: TokenRecord, policy_loss: PolicyLossConfig) -> Metrics:
    """Covariance of log-prob and advantage over the batch, before the update.

    covariance_top_p is the mean over the top p percent of the tokens; the window is that of
    Clip-Cov, (clip_cov_lb, clip_cov_ub). covariance_response takes a completion for one action
    of its prompt, with its mean log-prob l: the mean over groups of Cov(l, exp(l) A), Eq. 9 of
    arXiv 2505.22617; covariance_by_accuracy_* is the same by how often the prompt was solved.
    """
    covariance = token_covariance(record.measured_logprobs, record.advantages, record.mask)
    tail = covariance_percentiles(covariance, record.mask)
    tokens = covariance[record.mask].double()
    in_window = (tokens > policy_loss.clip_cov_lb) & (tokens < policy_loss.clip_cov_ub)
    of_groups = _response_covariances(batch, record)
    metrics = {
        "covariance_mean": float(tokens.mean()),
        "covariance_in_window_fraction": float(in_window.double().mean()),
        "covariance_response": mean(of_groups.values()),
    }
    metrics |= {f"covariance_p{_spell(p)}": value for p, value in tail.percentiles.items()}
    metrics |= {f"covariance_top_{_spell(p)}": value for p, value in tail.top_means.items()}
    return metrics | _by_accuracy("covariance", batch, of_groups.keys(), of_groups.values())


def selection_metrics(record: TokenRecord) -> Metrics:
    """Which tokens the methods chose; only the keys of those that are on."""
    metrics: Metrics = {}
    num_tokens = int(record.mask.sum())
    if record.selected is not None:
        advantages = record.advantages[record.selected]
        probabilities = record.target_logprobs[record.selected].exp()
        metrics |= {
            "selected_tokens": len(advantages),
            "selected_quota": record.quota,
            "selected_fraction": len(advantages) / num_tokens,
            "selected_negative_advantage_fraction": mean((advantages < 0).tolist()),
            "selected_abs_advantage_mean": mean(advantages.abs().tolist()),
            "selected_probability_mean": mean(probabilities.tolist()),
        }
    if record.kept is not None:
        metrics["top_entropy_fraction"] = int(record.kept.sum()) / num_tokens
    if record.entropy_ratio_kept is not None:
        dropped = record.mask & ~record.entropy_ratio_kept
        metrics["entropy_ratio_clipped_fraction"] = int(dropped.sum()) / num_tokens
    return metrics


def ratio_metrics(record: TokenRecord) -> Metrics:
    """The importance ratio target / proximal, and the shares of tokens where the clip bound.

    update_kl estimates KL(proximal || target), from the tokens; reference_kl that to the
    reference model, KL(target || reference); both by k3.
    """
    difference = (record.target_logprobs - record.proximal_logprobs)[record.mask]
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).double().exp()
    metrics = {
        "ratio_max": float(ratio.max()),
        "ratio_min": float(ratio.min()),
        "ratio_mean": float(ratio.mean()),
        "update_kl": float((ratio - 1 - ratio.log()).mean()),
    }
    if record.clipped is not None:
        low, high = record.clipped
        metrics["clip_fraction_low"] = float(low.sum()) / len(ratio)
        metrics["clip_fraction_high"] = float(high.sum()) / len(ratio)
    if record.reference_logprobs is not None:
        distance = reference_kl(record.target_logprobs, record.reference_logprobs, estimator="k3")
        metrics["reference_kl"] = float(distance[record.mask].double().mean())
    return metrics


def mismatch_metrics(record: TokenRecord) -> Metrics:
    """The learner's weights against the sampler's report; importance_weight_ess is a share."""
    mismatch = mismatch_kl(record.measured_logprobs, record.behaviour_logprobs, record.mask)
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


def group_verdict(group: ScoredGroup) -> bool | None:
    """True if every usable completion passed, False if each failed, None otherwise."""
    verdicts = {score.outcome is Outcome.PASS for score in group.scores if score.is_usable}
    return verdicts.pop() if len(verdicts) == 1 else None


def mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _response_covariances(batch: Batch, record: TokenRecord) -> dict[int, float]:
    """By group with a row: the covariance of length-normalised log-prob l and exp(l) A."""
    logprobs = _row_means(record.measured_logprobs, record.mask)
    advantages = torch.tensor(
        [row.advantage for row in batch.rows], dtype=torch.float64, device=logprobs.device
    )
    numbers = [row.group for row in batch.rows]
    groups = torch.tensor(numbers, device=logprobs.device)
    products = logprobs.exp() * advantages
    covariances = {}
    for group in dict.fromkeys(numbers):
        rows = groups == group
        centred = logprobs[rows] - logprobs[rows].mean()
        covariances[group] = float((centred * (products[rows] - products[rows].mean())).mean())
    return covariances


def _by_accuracy(
    name: str, batch: Batch, groups: Iterable[int], values: Iterable[float]
) -> Metrics:
    """Means over the values of prompts with an accuracy in each bucket."""
    accuracies = [_accuracy(group) for group in batch.groups]
    buckets: list[list[float]] = [[] for _ in ACCURACY_BUCKETS]
    for group, value in zip(groups, values, strict=True):
        place = next(i for i, end in enumerate(ACCURACY_BUCKETS) if accuracies[group] <= end)
        buckets[place].append(value)
    return {
        f"{name}_by_accuracy_{_spell(end)}": mean(of_bucket)
        for end, of_bucket in zip(ACCURACY_BUCKETS, buckets, strict=True)
    }


def _accuracy(group: ScoredGroup) -> float:
    """Share of the usable completions that passed."""
    return mean([score.outcome is Outcome.PASS for score in group.scores if score.is_usable])


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, values, 0.0).double()
    return kept.sum(-1) / mask.sum(-1).clamp(min=1)


def _quantiles(values: Tensor, points: Tensor) -> Sequence[float]:
    """Linearly interpolated; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    places = points * (len(ordered) - 1)
    below, above = ordered[places.floor().long()], ordered[places.ceil().long()]
    quantiles: list[float] = torch.lerp(below, above, places.frac()).tolist()
    return quantiles


def _spell(number: float) -> str:
    """99.8 as 99_8, 2.0 as 2."""
    return f"{number:g}".replace(".", "_")
