"""What the planner is told of a fleet: how long things take, how long completions are, how many.

Rates come from a run (`measured`) or from a model of the hardware (`model`); the
simulation cannot tell which.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from shared.errors import ConfigError

_SAMPLED_GROUPS = 500
_Z99 = NormalDist().inv_cdf(0.99)
MAX_P99_RATIO = math.exp(_Z99**2 / 2)
"""A lognormal's 99th percentile is at most so many times its mean."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Completion lengths in tokens: lognormal, cut at `maximum`.

    Args:
        mean: before the cut.
        sigma: standard deviation of the logarithm; 0 makes all alike.
    """

    mean: float
    sigma: float
    maximum: int

    @classmethod
    def from_deviation(cls, mean: float, deviation: float, maximum: int) -> Lengths:
        """With that mean and standard deviation."""
        return cls(mean, math.sqrt(math.log1p((deviation / mean) ** 2)), maximum)

    def resident(self, count: int) -> float:
        """Tokens of `count` completions together that an engine holds, on average over the time
        until the last of them ends; prompts not included."""
        source = random.Random(0)
        groups = [[self.draw(source) for _ in range(count)] for _ in range(_SAMPLED_GROUPS)]
        held = sum(length**2 / 2 for group in groups for length in group)
        return held / sum(max(group) for group in groups)

    def draw(self, source: random.Random) -> int:
        """One completion's length."""
        if self.sigma == 0:
            return max(1, min(round(self.mean), self.maximum))
        log_mean = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(round(source.lognormvariate(log_mean, self.sigma)), self.maximum))


def lengths_of(mean: float, p99: float, maximum: int) -> Lengths:
    """Lengths with that mean and 99th percentile.

    Raises:
        ConfigError: no lognormal has them.
    """
    if not mean <= p99 <= MAX_P99_RATIO * mean:
        raise ConfigError(
            f"--response-p99 {p99:g}: must be 1 to {MAX_P99_RATIO:.1f} times the mean length, which"
            f" is {mean:g}"
        )
    # p99 / mean = exp(z sigma - sigma^2 / 2), solved for the smaller sigma.
    sigma = _Z99 - math.sqrt(max(0.0, _Z99**2 - 2 * math.log(p99 / mean)))
    return Lengths(mean, sigma, maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Seconds an engine takes for one token of every sequence it holds.

        fixed + sequence n + max(memory + context c, compute n)

    for n sequences that hold c tokens together: reading weights and KV cache overlaps with the
    arithmetic, and what does not depend on either is added.
    """

    fixed_seconds: float = 0.0
    sequence_seconds: float = 0.0
    memory_seconds: float = 0.0
    context_seconds: float = 0.0
    compute_seconds: float = 0.0

    def token_seconds(self, num_sequences: int, context_tokens: float) -> float:
        """One token of each of `num_sequences`."""
        reading = self.memory_seconds + self.context_seconds * context_tokens
        work = max(reading, self.compute_seconds * num_sequences)
        return self.fixed_seconds + self.sequence_seconds * num_sequences + work


class Publishing(NamedTuple):
    """One publication: the learner is busy with it, and each replica stands still for a part."""

    seconds: float
    pause_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How long each part takes by itself; of several samples one is drawn for each step.

    Attributes:
        prompt_tokens: of each prompt.
        prompt_seconds: an engine stands still for so long to read a group's prompt.
        train_seconds_per_token: of completions.
        step_seconds: of each step beside waiting, training and publishing.
        verify_seconds: one group in one verifier process.
        checkpoint_seconds: training waits for so long at each checkpoint.
        checkpoint_write_seconds: then until the disk has it, beside training; the next one waits.
        replaced_share: groups that taught nothing and were replaced (dynamic sampling).
    """

    lengths: Lengths
    decode: Decode
    train_seconds_per_token: tuple[float, ...]
    publishing: tuple[Publishing, ...]
    prompt_tokens: float = 0.0
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0
    verify_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    checkpoint_write_seconds: float = 0.0
    replaced_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much of everything there is; names are those of the run file.

    Attributes:
        max_concurrent_groups: of one replica.
        num_verifiers: processes that score, of all replicas together.
        evaluation_every, checkpoint_every: steps; 0 is never.
    """

    num_replicas: int
    max_staleness: int
    groups_per_batch: int
    group_size: int
    max_concurrent_groups: int
    num_verifiers: int = 1
    evaluation_every: int = 0
    evaluation_problems: int = 0
    evaluation_group_size: int = 1
    checkpoint_every: int = 0
