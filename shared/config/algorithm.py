"""The choices that decide what is learned: advantage, loss, entropy, off-policy correction.

Key names are verl's, so that its recipes can be carried over by copying; the names that others
use are in `shared.config.aliases`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shared.config.entropy import (
    AdaptiveEntropyConfig,
    EntropyConfig,
    EntropyMethod,
    PiEntropyConfig,
    TargetEntropyConfig,
)
from shared.config.offpolicy import OffPolicyConfig
from shared.config.section import Count, Fraction, Index, Nats, Section, refuse_idle

__all__ = [
    "AdaptiveEntropyConfig",
    "AdvantageConfig",
    "DiagnosticsConfig",
    "EntropyConfig",
    "EntropyMethod",
    "LawConfig",
    "LossMode",
    "OffPolicyConfig",
    "PiEntropyConfig",
    "PolicyLossConfig",
    "ReferenceKLConfig",
    "TargetEntropyConfig",
]

LARGE_SELECTION = 0.05
"""A larger share of selected tokens is, most often, a percentage by mistake."""

SELECTING_MODES = ("clip_cov", "kl_cov")
"""Loss modes that act on tokens selected by their covariance."""

GSPO_DEFAULTS = {
    "clip_ratio_low": 3e-4,
    "clip_ratio_high": 4e-4,
    "loss_agg_mode": "seq-mean-token-mean",
}
"""GSPO's ratio is a completion's geometric mean, which moves far less than a token's."""

Estimator = Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo"]
LossMode = Literal["vanilla", "clip_cov", "kl_cov", "gspo", "cispo", "unclipped"]


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    estimator: Estimator = "grpo"
    """`grpo`: (reward - group mean) / group std. `rloo`: reward - mean of the others.
    `reinforce_plus_plus`: reward, whitened over the batch (arXiv 2501.03262);
    `reinforce_plus_plus_baseline`: the group's mean is subtracted before. `opo`: reward - the
    group's mean weighted by length (arXiv 2505.23585)."""

    normalise_std: bool = True
    """GRPO only: divide by the group's standard deviation; false is Dr.GRPO (arXiv 2503.20783)."""

    dynamic_sampling: bool = False
    """Replace groups whose completions all earned the same, which teach nothing, by others before
    a batch is trained on (DAPO, arXiv 2503.14476)."""

    max_degenerate_batches: Count = 10
    """Dynamic sampling: one batch replaces at most this many times groups_per_batch, and then
    takes groups as they come; the task is then too easy or too hard for the model."""

    overlong_buffer_len: Index = 0
    """Tokens below rollout.max_completion_tokens over which the reward falls linearly, so that a
    completion learns to end in time (DAPO's soft overlong punishment); 0 turns it off."""

    overlong_penalty_factor: Annotated[float, Field(gt=0)] = 1.0
    """What a completion of full length loses of its reward."""

    ppl_alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Advantages grow where the completion's perplexity is low in its group, and shrink where it
    is high, by this much per standard deviation (arXiv 2508.02260, there 0.01); 0 is off."""

    position_gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Advantages grow, in size, by up to this towards the end of a completion (arXiv 2508.02260,
    there 0.1); 0 is off."""

    position_steepness: Annotated[float, Field(gt=0)] = 15.0
    """How sharply that bonus sets in around the middle of the completion."""

    @model_validator(mode="after")
    def _every_number_has_an_effect(self) -> Self:
        idle = {
            "normalise_std": (self.estimator != "grpo", f'estimator = "{self.estimator}"'),
            "max_degenerate_batches": (not self.dynamic_sampling, "dynamic_sampling = false"),
            "overlong_penalty_factor": (self.overlong_buffer_len == 0, "overlong_buffer_len = 0"),
            "position_steepness": (self.position_gamma == 0, "position_gamma = 0"),
        }
        for key, (is_idle, choice) in idle.items():
            if is_idle:
                refuse_idle(self, "advantage", [key], choice=choice)
        return self


class PolicyLossConfig(Section):
    """The surrogate objective and how its tokens are chosen and averaged."""

    loss_mode: LossMode = "vanilla"
    """`vanilla`: PPO clip. `clip_cov`, `kl_cov`: arXiv 2505.22617. `gspo`: PPO clip on the
    completion's ratio (arXiv 2507.18071). `cispo`: the ratio is clipped as a weight, so that every
    token keeps its gradient (arXiv 2506.13585). `unclipped`: importance sampling alone."""

    clip_ratio_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The importance ratio is clipped below at 1 - this. GSPO: 3e-4 if not set."""

    clip_ratio_high: Annotated[float, Field(gt=0)] = 0.2
    """The importance ratio is clipped above at 1 + this; above the low side it is clip-higher.
    GSPO: 4e-4 if not set."""

    clip_ratio_c: Annotated[float, Field(gt=1)] | None = 3.0
    """Dual clip: upper bound of the loss ratio where the advantage is negative. `vanilla` only."""

    clip_cov_ratio: Fraction = 2e-4
    """Clip-Cov: share of the mini-batch's tokens whose gradient is dropped."""

    clip_cov_lb: float = 1.0
    """Clip-Cov: tokens with a covariance above this are candidates (normalised advantages)."""

    clip_cov_ub: float = 5.0
    """Clip-Cov: tokens with a covariance below this are candidates."""

    kl_cov_ratio: Fraction = 2e-4
    """KL-Cov: share of the mini-batch's tokens, of highest covariance, that are penalised."""

    ppo_kl_coef: Annotated[float, Field(ge=0)] = 1.0
    """KL-Cov: weight of the penalty. 1 is the paper's; verl's file has 0.1."""

    kl_cov_penalty: Literal["abs", "k2", "k3"] = "abs"
    """KL-Cov: |log-ratio| as the authors' code, or the k2 / k3 estimates of the KL."""

    allow_large_ratio: bool = False
    """Accept selection shares above 0.05, which usually are percentages by mistake."""

    scope: Literal["global", "micro"] = "global"
    """Select over the whole optimiser mini-batch on all ranks, or per micro-batch as verl: then
    the choice moves with learner.micro_batch_tokens, the number of ranks and the model's size,
    which decide what completions share a micro-batch."""

    selection_logprobs: Literal["current", "proximal"] = "current"
    """What selects, by covariance or by entropy: the weights being trained, which costs a forward
    pass for each optimiser step after the first unless a rank's mini-batch is one micro-batch; or
    those at the batch's start, which costs none and is an approximation."""

    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only this share of the mini-batch's tokens, of highest entropy, has a policy loss (arXiv
    2506.01939, there 0.2); 1 is off."""

    entropy_ratio_clip_low: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A token whose entropy has fallen below 1 - this of what it was at the batch's start has no
    gradient (arXiv 2512.05591, there 0.05); not set is off."""

    entropy_ratio_clip_high: Annotated[float, Field(gt=0)] | None = None
    """The same for an entropy that has risen above 1 + this; set both or neither."""

    loss_agg_mode: Literal[
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "seq-mean-token-mean",
    ] = "token-mean"
    """How token losses become one number, over the global batch. `seq-mean-token-sum-norm` divides
    `seq-mean-token-sum` by `loss_scale_factor` (Dr.GRPO). GSPO: `seq-mean-token-mean`."""

    loss_scale_factor: Annotated[float, Field(gt=0)] | None = None
    """`seq-mean-token-sum-norm`: the divisor, in tokens; not set is
    rollout.max_completion_tokens."""

    @model_validator(mode="before")
    @classmethod
    def _gspo_has_defaults_of_its_own(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss_mode") == "gspo":
            return {**GSPO_DEFAULTS, **given}
        return given

    @model_validator(mode="after")
    def _a_share_is_no_percentage(self) -> Self:
        shares = {
            "clip_cov": ("clip_cov_ratio", self.clip_cov_ratio, "0.0002"),
            "kl_cov": ("kl_cov_ratio", self.kl_cov_ratio, "0.0002 to 0.002"),
        }
        key, share, paper = shares.get(self.loss_mode, ("", 0.0, ""))
        if share > LARGE_SELECTION and not self.allow_large_ratio:
            raise ValueError(
                f"policy_loss.{key} = {share}: a share of tokens, the paper has {paper};"
                " set allow_large_ratio = true if you mean it"
            )
        return self

    @model_validator(mode="after")
    def _the_window_is_open(self) -> Self:
        if self.clip_cov_lb >= self.clip_cov_ub:
            raise ValueError(
                f"policy_loss.clip_cov_lb = {self.clip_cov_lb}: must be below"
                f" clip_cov_ub = {self.clip_cov_ub}"
            )
        return self

    @model_validator(mode="after")
    def _gspo_weighs_completions_alike(self) -> Self:
        only = GSPO_DEFAULTS["loss_agg_mode"]
        if self.loss_mode == "gspo" and self.loss_agg_mode != only:
            raise ValueError(
                f'policy_loss.loss_agg_mode = "{self.loss_agg_mode}": GSPO\'s is "{only}"; leave'
                " it out"
            )
        return self

    @model_validator(mode="after")
    def _both_sides_of_the_entropy_ratio_are_clipped(self) -> Self:
        sides = {
            "entropy_ratio_clip_low": self.entropy_ratio_clip_low,
            "entropy_ratio_clip_high": self.entropy_ratio_clip_high,
        }
        missing = [key for key, value in sides.items() if value is None]
        if len(missing) == 1:
            (given,) = sides.keys() - set(missing)
            raise ValueError(
                f"policy_loss.{given} = {sides[given]}: needs {missing[0]} too; the paper has 0.05"
                " for both"
            )
        return self

    @model_validator(mode="after")
    def _every_choice_has_an_effect(self) -> Self:
        selects = self.loss_mode in SELECTING_MODES or self.top_entropy_quantile < 1
        if not selects and self.selection_logprobs != "current":
            raise ValueError(
                f'policy_loss.selection_logprobs = "{self.selection_logprobs}": has no effect with'
                f' loss_mode = "{self.loss_mode}", which selects nothing; leave it out'
            )
        if self.loss_agg_mode != "seq-mean-token-sum-norm":
            choice = f'loss_agg_mode = "{self.loss_agg_mode}"'
            refuse_idle(self, "policy_loss", ["loss_scale_factor"], choice=choice)
        return self


class ReferenceKLConfig(Section):
    """A penalty on the distance from the model that the run started from."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the penalty in the loss; 0 is off and needs no reference model. It holds the
    entropy up but costs accuracy (arXiv 2505.22617, figure 10)."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL divergence, from the sampled token's log-probs: `k1` the difference, `k2` half its
    square, `k3` exp(-x) - 1 + x with x = target - reference."""


class DiagnosticsConfig(Section):
    """Measurements that cost more than a look at what is there."""

    entropy_change_every_steps: Index = 10
    """Steps between comparisons of the entropy's change with what the covariance predicts (arXiv
    2505.22617, section 3), each a forward pass more; 0 is off."""


class LawConfig(Section):
    """The entropy law, score = -a exp(entropy) + b (arXiv 2505.22617, section 2.4)."""

    floor: Nats = 0.02
    """Nats; the entropy that counts as spent, where the law's score is forecast."""

    window: Annotated[int, Field(ge=2)] = 20
    """Newest steps from which the entropy's rate of fall is taken."""
