"""The choices that decide what is learned: advantage, loss, entropy, off-policy correction.

Key names are verl's, so that its recipes can be carried over by copying.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Fraction, Index, Section

LARGE_SELECTION = 0.05
"""A larger share of selected tokens is, most often, a percentage by mistake."""

LossMode = Literal["vanilla", "clip_cov", "kl_cov"]
EntropyMethod = Literal["none", "bonus", "aent"]


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    estimator: Literal["grpo", "rloo"] = "grpo"
    """`grpo`: (reward - group mean) / group std. `rloo`: reward - mean of the others."""

    normalise_std: bool = True
    """GRPO only: divide by the group's standard deviation; false is Dr.GRPO."""


class PolicyLossConfig(Section):
    """The surrogate objective and how its tokens are chosen and averaged."""

    loss_mode: LossMode = "vanilla"
    """`vanilla`: PPO clip. `clip_cov`, `kl_cov`: arXiv 2505.22617."""

    clip_ratio_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The importance ratio is clipped below at 1 - this."""

    clip_ratio_high: Annotated[float, Field(gt=0)] = 0.2
    """The importance ratio is clipped above at 1 + this; above the low side it is clip-higher."""

    clip_ratio_c: Annotated[float, Field(gt=1)] | None = 3.0
    """Dual clip: upper bound of the loss ratio where the advantage is negative."""

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
    """Select over the whole optimiser mini-batch on all ranks, or per micro-batch as verl."""

    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean"
    """How token losses become one number, over the global batch."""

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


class EntropyConfig(Section):
    """The entropy term of the loss."""

    method: EntropyMethod = "none"
    """`bonus`: full entropy, fixed coefficient. `aent`: clamped entropy, adaptive coefficient
    (arXiv 2509.03493)."""

    entropy_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy term; with `aent` its initial value."""

    clamp_p: Annotated[float, Field(ge=0, lt=1)] = 0.33
    """AEnt: share of the vocabulary, of smallest logits, left out of the clamped entropy."""

    @model_validator(mode="after")
    def _the_coefficient_has_an_effect(self) -> Self:
        if self.method == "none" and self.entropy_coeff > 0:
            raise ValueError(
                f"entropy.entropy_coeff = {self.entropy_coeff}: has no effect with"
                ' method = "none"; set method = "bonus" or "aent"'
            )
        if self.method == "bonus" and self.entropy_coeff == 0:
            raise ValueError('entropy.method = "bonus": needs entropy_coeff above 0')
        return self


class AdaptiveEntropyConfig(Section):
    """AEnt's controller: the coefficient follows the clamped entropy into a band."""

    entropy_low: Annotated[float, Field(ge=0)] = 0.15
    """Nats; below it the coefficient rises."""

    entropy_high: Annotated[float, Field(ge=0)] = 0.24
    """Nats; above it the coefficient falls."""

    entropy_coeff_lr: Annotated[float, Field(gt=0)] = 0.002
    """How far the coefficient moves per step and nat outside the band."""

    clip_low: Annotated[float, Field(ge=0)] = 6e-4
    """Smallest coefficient."""

    clip_high: Annotated[float, Field(ge=0)] = 9e-3
    """Largest coefficient."""

    warmup: Index = 0
    """Steps before the first adjustment."""

    @model_validator(mode="after")
    def _the_band_and_the_box_are_open(self) -> Self:
        for low, high in (("entropy_low", "entropy_high"), ("clip_low", "clip_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"adaptive_entropy.{low} = {getattr(self, low)}: must be below"
                    f" {high} = {getattr(self, high)}"
                )
        return self


class OffPolicyConfig(Section):
    """Correction for tokens sampled by older weights or by a differing engine."""

    method: Literal["none", "truncate", "mask", "sequence_mask"] = "truncate"
    """`truncate`: exp(proximal - behaviour) capped (TIS). `mask`: zero outside the bounds
    (IcePop). `sequence_mask`: whole completions by their geometric mean."""

    cap: Annotated[float, Field(gt=0)] = 2.0
    """`truncate`: largest weight."""

    lower: Annotated[float, Field(gt=0)] = 0.5
    """`mask`, `sequence_mask`: smallest weight that is kept."""

    upper: Annotated[float, Field(gt=0)] = 5.0
    """`mask`, `sequence_mask`: largest weight that is kept."""

    @model_validator(mode="after")
    def _the_bounds_are_open(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"off_policy.lower = {self.lower}: must be below upper = {self.upper}")
        return self
