"""Fleets side by side: each simulated with several seeds, the best value marked, and why."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from services.cli.plan.rates import Rates, Shape
from services.cli.plan.simulation import Outcome, Simulation
from shared.rl.student_t import t_quantile

CONFIDENCE = 0.95
BUSY = 0.95
"""Of the time; whoever has so much to do is what the run waits for."""

FULL = 0.8
"""Of a replica's places; fewer in use while the learner waits are empty for want of prompts."""

_AROUND = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_STALENESS_QUANTILE = 0.95


class Gpus(NamedTuple):
    """What a run pays for."""

    learner: int
    replica: int

    def of(self, num_replicas: int) -> int:
        """All of them."""
        return self.learner + num_replicas * self.replica


class Effort(NamedTuple):
    """How long and how often each fleet is simulated."""

    num_steps: int
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One fleet; means over seeds.

    Attributes:
        steps_margin: half of the interval around `steps_per_hour`, from the seeds; None with one.
        staleness: share of trained groups by staleness.
        dropped_share: groups that became too stale, of all that were scored.
        bound_by: what it waits for.
    """

    num_replicas: int
    max_staleness: int
    num_gpus: int
    steps_per_hour: float
    steps_margin: float | None
    learner_idle: float
    replica_idle: float
    places_used: float
    verifier_busy: float
    staleness: dict[int, float]
    dropped_share: float
    bound_by: str

    @property
    def gpu_hours_per_step(self) -> float:
        """What a step costs."""
        return self.num_gpus / self.steps_per_hour

    @property
    def staleness_mean(self) -> float:
        """In versions."""
        return sum(age * share for age, share in self.staleness.items())

    @property
    def staleness_p95(self) -> int:
        """In versions."""
        reached = 0.0
        for age, share in sorted(self.staleness.items()):
            reached += share
            if reached >= _STALENESS_QUANTILE - 1e-9:
                return age
        return max(self.staleness, default=0)


def candidate(rates: Rates, shape: Shape, gpus: Gpus, effort: Effort) -> Candidate:
    """One fleet, simulated."""
    # Versions go round with max_staleness; the pipeline is full after that many batches.
    skipped = shape.max_staleness + 2
    outcomes = [
        Simulation(rates, shape, seed=seed).run(num_steps=effort.num_steps, skipped_steps=skipped)
        for seed in range(effort.num_seeds)
    ]
    speeds = [outcome.steps_per_hour for outcome in outcomes]
    ages = sum((outcome.staleness for outcome in outcomes), Counter[int]())
    trained, dropped = ages.total(), sum(outcome.num_dropped for outcome in outcomes)
    return Candidate(
        num_replicas=shape.num_replicas,
        max_staleness=shape.max_staleness,
        num_gpus=gpus.of(shape.num_replicas),
        steps_per_hour=statistics.fmean(speeds),
        steps_margin=_margin(speeds),
        learner_idle=statistics.fmean(outcome.learner_idle for outcome in outcomes),
        replica_idle=statistics.fmean(outcome.replica_idle for outcome in outcomes),
        places_used=statistics.fmean(outcome.places_used for outcome in outcomes),
        verifier_busy=statistics.fmean(outcome.verifier_busy for outcome in outcomes),
        staleness={age: count / trained for age, count in sorted(ages.items())},
        dropped_share=dropped / (trained + dropped),
        bound_by=_bound_by(outcomes),
    )


def candidates(
    rates: Rates,
    shape: Shape,
    gpus: Gpus,
    effort: Effort,
    *,
    replicas: Sequence[int],
    staleness: Sequence[int],
) -> list[Candidate]:
    """All of them, by max_staleness and number of replicas."""
    return [
        candidate(rates, replace(shape, num_replicas=number, max_staleness=bound), gpus, effort)
        for bound in sorted(set(staleness))
        for number in sorted(set(replicas))
    ]


def recommended(found: Sequence[Candidate]) -> Candidate:
    """That whose steps cost the fewest GPU hours."""
    return min(found, key=lambda each: (each.gpu_hours_per_step, each.num_gpus))


def replicas_around_balance(rates: Rates, shape: Shape) -> list[int]:
    """Numbers of replicas below and above that which samples as fast as the learner trains."""
    mean = rates.lengths.mean
    sequences = shape.max_concurrent_groups * shape.group_size
    context = sequences * (rates.prompt_tokens + mean / 2)
    sampled = sequences / rates.decode.token_seconds(sequences, context)
    tokens = shape.groups_per_batch * shape.group_size * mean
    train_seconds = tokens * statistics.fmean(rates.train_seconds_per_token)
    publishing = statistics.fmean(each.seconds for each in rates.publishing)
    balance = tokens / (train_seconds + publishing + rates.step_seconds) / sampled
    return sorted({1, shape.num_replicas, *(math.ceil(share * balance) for share in _AROUND)})


def _bound_by(outcomes: Sequence[Outcome]) -> str:
    """What would have to be faster, or allowed, for the run to be faster."""
    if statistics.fmean(outcome.verifier_busy for outcome in outcomes) > BUSY:
        return "verifiers"
    if statistics.fmean(outcome.learner_idle for outcome in outcomes) < 1 - BUSY:
        return "learner"
    if statistics.fmean(outcome.places_used for outcome in outcomes) > FULL:
        return "replicas"
    return "max_staleness"


def _margin(values: Sequence[float]) -> float | None:
    """Half of the interval around a mean; None of one value."""
    if len(values) < 2:
        return None
    quantile = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
