"""The coefficient of the entropy term: fixed by a schedule, or steered by the measured entropy.

A controller is updated once per global step, after the optimiser step, with the entropy of all
tokens of that step over all ranks. `coefficient` is what the loss of the next step applies.
Its state_dict belongs in the checkpoint: restored, the run goes on exactly as it would have.
"""

import math
from typing import Literal

Shape = Literal["linear", "cosine", "exponential"]


class AEntController:
    """Keeps the clamped entropy inside a band by moving the coefficient inside a box.

        e = min(0, H - entropy_low) + max(0, H - entropy_high) + regularisation * (c - initial)
        c <- clip(c - step_size * e, coefficient_min, coefficient_max)

    AEnt (https://arxiv.org/abs/2509.03493). Between the two bounds nothing moves. The asymmetry
    is the method's: a step up is at most step_size * entropy_low, a step down has no limit.
    """

    def __init__(
        self,
        *,
        initial: float,
        step_size: float,
        entropy_low: float,
        entropy_high: float,
        coefficient_min: float,
        coefficient_max: float,
        warmup_steps: int = 0,
        regularisation: float = 0.0,
    ) -> None:
        """Start at the initial coefficient.

        Args:
            entropy_low, entropy_high: the band, in nats.
            warmup_steps: as in verl's release, the n-th update (from 1) moves the coefficient
                where n >= warmup_steps; 0 and 1 are both no warm-up.
            regularisation: pull back towards initial; 0 is the paper's rule.
        Raises:
            ValueError: an interval is reversed, initial lies outside the box, or a number that
                must not be negative is.
        """
        _check_box(initial, coefficient_min, coefficient_max)
        if not 0 <= entropy_low <= entropy_high:
            raise ValueError(f"need 0 <= low <= high, got [{entropy_low}, {entropy_high}]")
        if not (step_size > 0 and warmup_steps >= 0 and regularisation >= 0):
            raise ValueError(
                "need step_size > 0, warmup_steps >= 0 and regularisation >= 0, got "
                f"{step_size}, {warmup_steps} and {regularisation}"
            )
        self._initial = initial
        self._step_size = step_size
        self._entropy_low = entropy_low
        self._entropy_high = entropy_high
        self._coefficient_min = coefficient_min
        self._coefficient_max = coefficient_max
        self._warmup_steps = warmup_steps
        self._regularisation = regularisation
        self._coefficient = initial
        self._num_updates = 0

    @property
    def coefficient(self) -> float:
        """What the next step's loss applies."""
        return self._coefficient

    def update(self, entropy: float) -> float:
        """Take in the clamped entropy of the step that ended; return the new coefficient.

        Raises:
            ValueError: entropy is not finite; the state is as before.
        """
        _check_entropy(entropy)
        self._num_updates += 1
        if self._num_updates >= self._warmup_steps:
            error = min(0.0, entropy - self._entropy_low) + max(0.0, entropy - self._entropy_high)
            error += self._regularisation * (self._coefficient - self._initial)
            moved = self._coefficient - self._step_size * error
            self._coefficient = _clip(moved, self._coefficient_min, self._coefficient_max)
        return self._coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold; plain numbers."""
        return {"coefficient": self._coefficient, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict; a coefficient outside a changed box is moved into it.

        Raises:
            ValueError: the keys are not those of this controller.
        """
        _check_keys(state, self.state_dict())
        self._coefficient = _clip(
            state["coefficient"], self._coefficient_min, self._coefficient_max
        )
        self._num_updates = int(state["num_updates"])


class TargetEntropyController:
    """Raises the coefficient while the entropy is under a target, lowers it while it is not.

        accumulated <- clip(accumulated +- step_size),    coefficient = accumulated if under else 0

    Skywork-OR1 (https://arxiv.org/abs/2505.22312). `under` is H < target there (is_strict) and
    H <= target in TRL. The gate takes the entropy term out of the loss altogether while the
    entropy is high enough; before the first update it is open in Skywork-OR1 and shut in TRL.
    """

    def __init__(
        self,
        *,
        initial: float,
        target: float,
        step_size: float,
        coefficient_min: float,
        coefficient_max: float,
        is_strict: bool,
    ) -> None:
        """Start at the initial coefficient, behind the gate.

        Args:
            target: nats. step_size: change of the coefficient per update.
            is_strict: whether an entropy equal to the target counts as reached, and the gate
                starts open.
        Raises:
            ValueError: initial lies outside the box, or target or step_size is not above 0.
        """
        _check_box(initial, coefficient_min, coefficient_max)
        if not (target > 0 and step_size > 0):
            raise ValueError(f"need target > 0 and step_size > 0, got {target} and {step_size}")
        self._target = target
        self._step_size = step_size
        self._coefficient_min = coefficient_min
        self._coefficient_max = coefficient_max
        self._is_strict = is_strict
        self._accumulated = initial
        self._is_open = is_strict

    @property
    def coefficient(self) -> float:
        """What the next step's loss applies: 0 while the gate is shut."""
        return self._accumulated if self._is_open else 0.0

    @property
    def accumulated(self) -> float:
        """The coefficient behind the gate."""
        return self._accumulated

    def update(self, entropy: float) -> float:
        """Take in the entropy of the step that ended; return the coefficient to apply next.

        Raises:
            ValueError: entropy is not finite; the state is as before.
        """
        _check_entropy(entropy)
        self._is_open = entropy < self._target if self._is_strict else entropy <= self._target
        moved = self._accumulated + (self._step_size if self._is_open else -self._step_size)
        self._accumulated = _clip(moved, self._coefficient_min, self._coefficient_max)
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold; plain numbers."""
        return {"accumulated": self._accumulated, "is_open": int(self._is_open)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict; a coefficient outside a changed box is moved into it.

        Raises:
            ValueError: the keys are not those of this controller.
        """
        _check_keys(state, self.state_dict())
        self._accumulated = _clip(
            state["accumulated"], self._coefficient_min, self._coefficient_max
        )
        self._is_open = bool(state["is_open"])


class EntropyPIController:
    """Steers the entropy to a target with a signed coefficient: proportional plus integral.

        e = H - target,    coefficient = clip(proportional * e + integral * sum of e, -1, 1)

    EntroPIC (https://arxiv.org/abs/2511.15248), whose loss adds coefficient *
    `shared.rl.loss.high_probability_surrogate`: above the target a positive coefficient sharpens
    the likely tokens, below it a negative one flattens them. Here e is added once per step,
    while the release adds it per micro-batch.

    The sum cannot wind up: it stays within +-integral_limit, and an error that pushes further an
    output that is saturated even without it is not added. However long a saturation lasted, the
    coefficient pushes the wrong way for at most integral_limit / |e| updates of the opposite e.
    """

    def __init__(
        self, *, target: float, proportional: float, integral: float, integral_limit: float
    ) -> None:
        """Start with a coefficient of 0 and an empty sum.

        Args:
            target: nats.
            proportional: coefficient per nat.
            integral: coefficient per nat and update.
            integral_limit: bound of the sum of errors, in nats.
        Raises:
            ValueError: target or integral_limit is not above 0, or a gain is infinite or negative,
                which would drive the entropy away from the target.
        """
        if not (target > 0 and integral_limit > 0):
            raise ValueError(
                f"need target > 0 and integral_limit > 0, got {target} and {integral_limit}"
            )
        if not (0 <= proportional < math.inf and 0 <= integral < math.inf):
            raise ValueError(f"need finite gains >= 0, got {proportional} and {integral}")
        self._target = target
        self._proportional = proportional
        self._integral = integral
        self._integral_limit = integral_limit
        self._coefficient = 0.0
        self._error_sum = 0.0

    @property
    def coefficient(self) -> float:
        """What the next step's loss applies, in [-1, 1]."""
        return self._coefficient

    @property
    def error_sum(self) -> float:
        """The integral part's sum of errors, in nats."""
        return self._error_sum

    def update(self, entropy: float) -> float:
        """Take in the entropy of the step that ended; return the new coefficient.

        Raises:
            ValueError: entropy is not finite; the state is as before.
        """
        _check_entropy(entropy)
        error = entropy - self._target
        output = self._output(error)
        is_saturated = output >= 1 if error > 0 else output <= -1
        if not is_saturated:
            moved = self._error_sum + error
            self._error_sum = _clip(moved, -self._integral_limit, self._integral_limit)
        self._coefficient = _clip(self._output(error), -1.0, 1.0)
        return self._coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold; plain numbers."""
        return {"coefficient": self._coefficient, "error_sum": self._error_sum}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict; a sum outside a changed limit is moved into it.

        Raises:
            ValueError: the keys are not those of this controller.
        """
        _check_keys(state, self.state_dict())
        self._coefficient = _clip(state["coefficient"], -1.0, 1.0)
        self._error_sum = _clip(state["error_sum"], -self._integral_limit, self._integral_limit)

    def _output(self, error: float) -> float:
        return self._proportional * error + self._integral * self._error_sum


def scheduled_coefficient(
    step: int, *, start: float, end: float, num_steps: int, shape: Shape
) -> float:
    """The coefficient at a step of a schedule from start to end; end for good afterwards.

        linear       start + (end - start) f                f = step / num_steps in [0, 1]
        cosine       end + (start - end) (1 + cos(pi f)) / 2
        exponential  start (end / start)^f

    Raises:
        ValueError: step < 0, num_steps < 1, an exponential end point is not above 0, or the
            shape is unknown.
    """
    if step < 0 or num_steps < 1:
        raise ValueError(f"need step >= 0 and num_steps >= 1, got {step} and {num_steps}")
    done = min(step / num_steps, 1.0)
    if shape == "linear":
        return start * (1 - done) + end * done
    if shape == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
        return start * left + end * (1 - left)
    if shape == "exponential":
        if not (start > 0 and end > 0):
            raise ValueError(f"an exponential schedule needs ends above 0, got {start} and {end}")
        return float(start ** (1 - done) * end**done)
    raise ValueError(f"unknown shape {shape!r}; use linear, cosine or exponential")


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _check_box(initial: float, low: float, high: float) -> None:
    if not 0 <= low <= initial <= high:
        raise ValueError(f"need 0 <= min <= initial <= max, got initial {initial}, [{low}, {high}]")


def _check_entropy(entropy: float) -> None:
    # A NaN would pass min and max unseen and stay in the coefficient for ever.
    if not math.isfinite(entropy):
        raise ValueError(f"the entropy must be finite, got {entropy}")


def _check_keys(state: dict[str, float], expected: dict[str, float]) -> None:
    if state.keys() != expected.keys():
        raise ValueError(f"need the keys {sorted(expected)}, got {sorted(state)}")
