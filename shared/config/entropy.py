"""The entropy term of the loss, and what moves its coefficient."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Index, Nats, Section, refuse_idle

EntropyMethod = Literal["none", "bonus", "aent", "target", "pi"]
Schedule = Literal["constant", "linear", "cosine", "exponential"]

SECTION_OF_METHOD = {"aent": "adaptive_entropy", "target": "target_entropy", "pi": "pi_entropy"}
"""Where each method that has a controller keeps its numbers."""


class EntropyConfig(Section):
    """The entropy term of the loss."""

    method: EntropyMethod = "none"
    """`bonus`: full entropy, a coefficient that is fixed or scheduled. `aent`: clamped entropy,
    coefficient kept by a band (arXiv 2509.03493). `target`: full entropy, coefficient that rises
    below a target and is 0 above it (Skywork-OR1, arXiv 2505.22312). `pi`: no bonus; likely
    tokens are reweighted by a PI controller (EntroPIC, arXiv 2511.15248)."""

    entropy_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy term; with a schedule, `aent` and `target` its initial value."""

    clamp_p: Annotated[float, Field(ge=0, lt=1)] = 0.33
    """AEnt: share of the vocabulary, of smallest logits, left out of the clamped entropy."""

    schedule: Schedule = "constant"
    """Bonus: how the weight goes from `entropy_coeff` to `entropy_coeff_end`."""

    entropy_coeff_end: Annotated[float, Field(ge=0)] | None = None
    """Bonus: weight at the end of the schedule, and from then on."""

    schedule_steps: Index = 0
    """Bonus: training steps that the schedule takes; 0 is the whole run."""

    @model_validator(mode="after")
    def _the_coefficient_has_an_effect(self) -> Self:
        if self.method == "none" and self.entropy_coeff > 0:
            raise ValueError(
                f"entropy.entropy_coeff = {self.entropy_coeff}: has no effect with"
                ' method = "none"; set method = "bonus" or "aent"'
            )
        if self.method == "pi" and self.entropy_coeff > 0:
            raise ValueError(
                f"entropy.entropy_coeff = {self.entropy_coeff}: has no effect with"
                ' method = "pi"; set [pi_entropy] proportional and integral'
            )
        if self.method == "bonus" and self.entropy_coeff == 0 and not self.entropy_coeff_end:
            raise ValueError('entropy.method = "bonus": needs entropy_coeff above 0')
        return self

    @model_validator(mode="after")
    def _the_clamp_has_an_effect(self) -> Self:
        if self.method != "aent":
            refuse_idle(self, "entropy", ["clamp_p"], choice=f'method = "{self.method}"')
        return self

    @model_validator(mode="after")
    def _the_schedule_is_whole(self) -> Self:
        if self.schedule == "constant":
            keys = ["entropy_coeff_end", "schedule_steps"]
            refuse_idle(self, "entropy", keys, choice='schedule = "constant"')
            return self
        chosen = f'entropy.schedule = "{self.schedule}"'
        if self.method != "bonus":
            raise ValueError(
                f'{chosen}: has no effect with method = "{self.method}"; set method = "bonus" or'
                " leave the schedule out"
            )
        if self.entropy_coeff_end is None:
            raise ValueError(f"{chosen}: has no end; set entropy_coeff_end")
        if self.schedule == "exponential" and not (self.entropy_coeff and self.entropy_coeff_end):
            raise ValueError(
                f"{chosen}: needs both ends above 0, not entropy_coeff = {self.entropy_coeff} and"
                f" entropy_coeff_end = {self.entropy_coeff_end}; raise the end that is 0"
            )
        return self


class AdaptiveEntropyConfig(Section):
    """AEnt's controller: the coefficient follows the clamped entropy into a band."""

    entropy_low: Nats = 0.15
    """Nats; below it the coefficient rises."""

    entropy_high: Nats = 0.24
    """Nats; above it the coefficient falls."""

    entropy_coeff_lr: Annotated[float, Field(gt=0)] = 0.002
    """How far the coefficient moves per step and nat outside the band."""

    entropy_coeff_reg: Annotated[float, Field(ge=0)] = 0.0
    """Pull of the coefficient back to its initial value, per step and unit of distance, times
    `entropy_coeff_lr`; 0 is the paper's rule."""

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


class TargetEntropyConfig(Section):
    """Skywork-OR1's controller: the coefficient climbs while the entropy is under a target."""

    target: Annotated[float, Field(gt=0)] = 0.2
    """Nats; the entropy that the bonus defends. Above it the bonus is off."""

    delta: Annotated[float, Field(gt=0)] = 1e-4
    """What one step adds to the coefficient, or takes off it. TRL has 0.005."""

    coeff_min: Annotated[float, Field(ge=0)] = 0.0
    """Smallest coefficient."""

    coeff_max: Annotated[float, Field(gt=0)] = 0.005
    """Largest coefficient. TRL has 1."""

    comparison: Literal["strict", "inclusive"] = "strict"
    """Whether an entropy equal to the target is under it: `strict` no (Skywork-OR1), `inclusive`
    yes (TRL)."""

    @model_validator(mode="after")
    def _a_step_fits_into_the_box(self) -> Self:
        if self.coeff_min >= self.coeff_max:
            raise ValueError(
                f"target_entropy.coeff_min = {self.coeff_min}: must be below"
                f" coeff_max = {self.coeff_max}"
            )
        if self.delta > self.coeff_max - self.coeff_min:
            raise ValueError(
                f"target_entropy.delta = {self.delta}: one step crosses the whole range from"
                f" coeff_min = {self.coeff_min} to coeff_max = {self.coeff_max}; lower it"
            )
        return self


class PiEntropyConfig(Section):
    """EntroPIC's controller; the paper's gains are not published, the defaults are ours."""

    target: Annotated[float, Field(gt=0)] = 0.2
    """Nats; the entropy that is held."""

    proportional: Annotated[float, Field(ge=0)] = 1.0
    """Coefficient per nat of error."""

    integral: Annotated[float, Field(ge=0)] = 0.01
    """Coefficient per nat of error summed over steps; removes a lasting error."""

    integral_limit: Annotated[float, Field(gt=0)] = 100.0
    """Largest sum of errors, in nats; keeps a long excursion from being remembered for ever."""

    high_probability: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Tokens above this probability when they were sampled are reweighted."""

    @model_validator(mode="after")
    def _something_controls(self) -> Self:
        if self.proportional == 0 and self.integral == 0:
            raise ValueError(
                "pi_entropy.proportional = 0.0: nothing controls with integral = 0.0; raise one"
            )
        return self
