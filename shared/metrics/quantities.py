"""The learner's gauges: what the newest row of metrics.jsonl says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

QUANTITIES = {
    "entropy": ("policy_entropy_nats", "Full-vocabulary entropy, token mean."),
    "entropy_clamped": ("policy_entropy_clamped_nats", "Clamped entropy (AEnt), token mean."),
    "entropy_seq_mean": (
        "policy_entropy_sequence_mean_nats",
        "Full-vocabulary entropy, mean over completions.",
    ),
    "entropy_after_filter": (
        "policy_entropy_after_filter_nats",
        "The same over prompts that are neither always nor never solved; the law's H.",
    ),
    "entropy_removed_mass": (
        "entropy_removed_mass_ratio",
        "Probability of the tokens that AEnt's clamp leaves out.",
    ),
    "entropy_reward_positive": (
        "policy_entropy_rewarded_nats",
        "Entropy over completions with a reward above 0.",
    ),
    "entropy_reward_other": (
        "policy_entropy_unrewarded_nats",
        "Entropy over the other completions.",
    ),
    "entropy_consumed": (
        "entropy_consumed_ratio",
        "Share of the entropy between the start and the floor spent.",
    ),
    "entropy_rate": ("entropy_rate_nats_per_step", "Slope of the entropy over the last steps."),
    "entropy_change_measured": (
        "entropy_change_nats",
        "Change of the entropy over one step, on the same tokens.",
    ),
    "entropy_change_predicted_pg": (
        "entropy_change_predicted_policy_gradient",
        "-Cov(log p, p A) over tokens; a scale-free guess.",
    ),
    "entropy_change_predicted_npg": (
        "entropy_change_predicted_natural_gradient",
        "-Cov(log p, A) over tokens; scale-free.",
    ),
    "entropy_change_predicted_influence": (
        "entropy_change_predicted_influence",
        "First-order change by the sampled gradient; scale-free.",
    ),
    "entropy_coefficient": ("entropy_coefficient", "Weight of the entropy term."),
    "covariance_mean": ("token_covariance_mean", "Mean covariance of log-prob and advantage."),
    "covariance_response": (
        "response_covariance_mean",
        "Covariance within groups, a completion as one action.",
    ),
    "covariance_in_window_fraction": (
        "token_covariance_in_window_ratio",
        "Share of tokens inside Clip-Cov's window.",
    ),
    "selected_fraction": ("selected_tokens_ratio", "Share of tokens the covariance method chose."),
    "selected_negative_advantage_fraction": (
        "selected_negative_advantage_ratio",
        "Share of the chosen tokens with A < 0.",
    ),
    "selected_probability_mean": (
        "selected_probability_mean",
        "Mean probability of the chosen tokens.",
    ),
    "top_entropy_fraction": (
        "top_entropy_tokens_ratio",
        "Share of tokens that the top-entropy mask keeps.",
    ),
    "entropy_ratio_clipped_fraction": (
        "entropy_ratio_clipped_ratio",
        "Share of tokens without gradient by entropy-ratio clipping.",
    ),
    "clip_fraction_low": ("clip_fraction_low_ratio", "Share of tokens clipped below."),
    "clip_fraction_high": ("clip_fraction_high_ratio", "Share of tokens clipped above."),
    "update_kl": ("kl_update_nats", "KL of the proximal from the trained policy, estimated."),
    "reference_kl": ("kl_reference_nats", "KL of the trained from the reference policy."),
    "importance_weight_ess": (
        "importance_weight_effective_ratio",
        "Effective sample size of the weights, a share.",
    ),
    "reward_mean": ("reward_mean", "Mean reward of the batch."),
    "reward_std": ("reward_stddev", "Standard deviation of the batch's rewards."),
    "loss": ("loss", "Loss of the last batch."),
    "grad_norm": ("grad_norm", "Gradient norm before clipping."),
    "mismatch_kl": (
        "kl_behaviour_nats",
        "KL of the learner's recomputed log-probs against the engine's reported ones.",
    ),
    "learning_rate": ("learning_rate", "Of the optimiser."),
    "eval_score": ("eval_score", "Mean reward on held-out problems."),
    "law_a": ("entropy_law_a", "a of R = -a exp(H) + b."),
    "law_b": ("entropy_law_b", "b of R = -a exp(H) + b."),
    "law_r2": ("entropy_law_r_squared", "Share of the score's variance the law explains."),
    "law_points": ("entropy_law_fit_points", "Evaluations the law is fitted on."),
    "law_ceiling": ("predicted_reward_ceiling", "Score the law predicts at zero entropy."),
    "law_identifiable": (
        "entropy_law_identifiable",
        "1 if the evaluations identify the law, else 0.",
    ),
    "law_condition": ("entropy_law_condition", "Condition number of the law's fit."),
    "law_score_at_floor": (
        "predicted_reward_at_floor",
        "Score the law predicts when the entropy is at its floor.",
    ),
    "law_gain_left": ("predicted_reward_gain_left", "Score the law still predicts to be gained."),
    "law_steps_left": (
        "entropy_steps_left",
        "Steps until the entropy reaches its floor at the present rate.",
    ),
}

PERCENTILES = {
    "policy_entropy_percentile_nats": (
        "Percentiles of token entropy.",
        {"10": "entropy_p10", "50": "entropy_p50", "80": "entropy_p80", "90": "entropy_p90",
         "99": "entropy_p99"},
    ),
    "token_covariance": (
        "Percentiles of the covariance of log-prob and advantage.",
        {"50": "covariance_p50", "90": "covariance_p90", "99": "covariance_p99",
         "99.8": "covariance_p99_8", "100": "covariance_p100"},
    ),
    "importance_ratio": (
        "Mean and largest ratio of target to proximal probability.",
        {"mean": "ratio_mean", "max": "ratio_max", "min": "ratio_min"},
    ),
    "predicted_reward_ceiling_bound": (
        "Ends of the 95 % interval of the ceiling.",
        {"2.5": "law_ceiling_low", "97.5": "law_ceiling_high"},
    ),
    "entropy_law_a_bound": (
        "Ends of the 95 % interval of a.", {"2.5": "law_a_low", "97.5": "law_a_high"}
    ),
    "token_covariance_top_mean": (
        "Mean covariance of the tokens in the top percent named.",
        {"0.02": "covariance_top_0_02", "0.2": "covariance_top_0_2", "2": "covariance_top_2",
         "20": "covariance_top_20", "50": "covariance_top_50"},
    ),
}  # fmt: skip


class LearnerGauges(Collector):
    """The newest value of each quantity of `metrics.jsonl` that has a series of its own.

    One source for both: what `/metrics` shows is what the last line of the file says, and a
    quantity that was never measured has no series.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def show(self, values: Mapping[str, float]) -> None:
        """Replace what is shown: the newest value of each key of metrics.jsonl."""
        self._values = dict(values)

    def collect(self) -> Iterable[Metric]:
        """Called at every scrape."""
        values = self._values
        for key, (name, text) in QUANTITIES.items():
            if key in values:
                yield GaugeMetricFamily(f"isentrope_learner_{name}", text, value=values[key])
        yield from self._percentiles(values)

    def _percentiles(self, values: Mapping[str, float]) -> Iterable[Metric]:
        for name, (text, keys) in PERCENTILES.items():
            family = GaugeMetricFamily(f"isentrope_learner_{name}", text, labels=["percentile"])
            for percentile, key in keys.items():
                if key in values:
                    family.add_metric([percentile], values[key])
            if family.samples:
                yield family
