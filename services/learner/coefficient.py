"""The entropy term's coefficient over a run: fixed, scheduled, or moved by a controller.

A controller sees one entropy a step: the mean over all tokens of the step on all ranks, of the
weights that each token's gradient was taken at. It is the clamped entropy for AEnt, else the full
one. What it makes of it applies from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from shared.config import RunConfig
from shared.rl.entropy_control import (
    AEntController,
    EntropyPIController,
    TargetEntropyController,
    scheduled_coefficient,
)


class Controller(Protocol):
    """What the controllers of `shared.rl.entropy_control` have in common."""

    @property
    def coefficient(self) -> float: ...

    def update(self, entropy: float) -> float: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class EntropyCoefficient:
    """The coefficient of a run; `state_dict` belongs in the checkpoint."""

    def __init__(self, config: RunConfig) -> None:
        """As at the first step."""
        self._config = config
        make = CONTROLLERS.get(config.entropy.method)
        self._controller = None if make is None else make(config)
        self._follows_clamped = config.entropy.method == "aent"

    def at(self, step: int) -> float:
        """What the loss of a step applies; steps count from 1."""
        if self._controller is not None:
            return self._controller.coefficient
        entropy = self._config.entropy
        if entropy.schedule == "constant":
            return entropy.entropy_coeff
        assert entropy.entropy_coeff_end is not None
        return scheduled_coefficient(
            step - 1,
            start=entropy.entropy_coeff,
            end=entropy.entropy_coeff_end,
            num_steps=entropy.schedule_steps or self._config.run.num_steps,
            shape=entropy.schedule,
        )

    def observe(self, *, entropy: float, clamped_entropy: float) -> None:
        """Show the controller the entropy of the step that ended; NaN where there was none."""
        seen = clamped_entropy if self._follows_clamped else entropy
        if self._controller is not None and math.isfinite(seen):
            self._controller.update(seen)

    def state_dict(self) -> dict[str, float] | None:
        """The controller's; None without one."""
        return None if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Continue from a state_dict.

        Raises:
            ValueError: it is of another kind of controller.
        """
        if self._controller is not None and state is not None:
            self._controller.load_state_dict(state)


def _aent(config: RunConfig) -> AEntController:
    band = config.adaptive_entropy
    return AEntController(
        initial=config.entropy.entropy_coeff,
        step_size=band.entropy_coeff_lr,
        entropy_low=band.entropy_low,
        entropy_high=band.entropy_high,
        coefficient_min=band.clip_low,
        coefficient_max=band.clip_high,
        warmup_steps=band.warmup,
        regularisation=band.entropy_coeff_reg,
    )


def _target(config: RunConfig) -> TargetEntropyController:
    numbers = config.target_entropy
    return TargetEntropyController(
        initial=config.entropy.entropy_coeff,
        target=numbers.target,
        step_size=numbers.delta,
        coefficient_min=numbers.coeff_min,
        coefficient_max=numbers.coeff_max,
        is_strict=numbers.comparison == "strict",
    )


def _pi(config: RunConfig) -> EntropyPIController:
    numbers = config.pi_entropy
    return EntropyPIController(
        target=numbers.target,
        proportional=numbers.proportional,
        integral=numbers.integral,
        integral_limit=numbers.integral_limit,
    )


CONTROLLERS: dict[str, Callable[[RunConfig], Controller]] = {
    "aent": _aent,
    "target": _target,
    "pi": _pi,
}
