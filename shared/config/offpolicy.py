"""Correction for tokens that another policy than the learner's sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Section, refuse_idle

OffPolicyMethod = Literal[
    "none",
    "truncate",
    "mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "decoupled",
]

DECOUPLED_CAP = 5.0
"""AReaL's `behav_imp_weight_cap`."""

_READS = {
    "none": (),
    "truncate": ("cap",),
    "sequence_truncate": ("cap",),
    "decoupled": ("cap",),
    "mask": ("lower", "upper"),
    "sequence_mask": ("lower", "upper"),
    "geometric_mask": ("lower", "upper"),
}


class OffPolicyConfig(Section):
    """Correction for tokens sampled by older weights or by a differing engine.

    A token's weight is exp(proximal - behaviour) and multiplies its loss.
    """

    method: OffPolicyMethod = "truncate"
    """`truncate`: the weight capped (TIS). `mask`: zero outside the bounds (IcePop, arXiv
    2510.18855). `decoupled`: zero above the cap (AReaL, arXiv 2505.24298). `sequence_truncate`,
    `sequence_mask`: the same as the first two for the product of a completion's weights, on all
    its tokens; `geometric_mask` for their geometric mean."""

    cap: Annotated[float, Field(gt=0)] = 2.0
    """`truncate`, `sequence_truncate`: largest weight. `decoupled`: largest weight that is kept,
    5 if not set."""

    lower: Annotated[float, Field(ge=0)] = 0.5
    """`mask`, `sequence_mask`, `geometric_mask`: smallest weight that is kept."""

    upper: Annotated[float, Field(gt=0)] = 5.0
    """`mask`, `sequence_mask`, `geometric_mask`: largest weight that is kept."""

    proximal: Literal["exact", "interpolated"] = "exact"
    """Where proximal log-probs come from. `exact`: a forward pass of the learner at the batch's
    start. `interpolated`: between behaviour and target by staleness (A-3PO, arXiv 2512.06547);
    here the pass is made all the same, because it also measures the entropy."""

    @model_validator(mode="before")
    @classmethod
    def _decoupled_has_a_cap_of_its_own(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") == "decoupled":
            return {"cap": DECOUPLED_CAP, **given}
        return given

    @model_validator(mode="after")
    def _the_bounds_are_open(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"off_policy.lower = {self.lower}: must be below upper = {self.upper}")
        return self

    @model_validator(mode="after")
    def _every_number_has_an_effect(self) -> Self:
        idle = [key for key in ("cap", "lower", "upper") if key not in _READS[self.method]]
        refuse_idle(self, "off_policy", idle, choice=f'method = "{self.method}"')
        if self.proximal == "interpolated" and self.method == "none":
            raise ValueError(
                'off_policy.proximal = "interpolated": nothing corrects for its distance from the'
                ' behaviour policy with method = "none"; set method = "truncate"'
            )
        return self
