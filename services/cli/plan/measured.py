"""Rates of a run that was made: what its rows say, and what they do not say, found by simulation.

A row has the learner's seconds for each part of a step, and the tokens. It does not say how fast
one engine is. That is found by making the simulated run wait as long for groups as the measured one
did; where the run hardly waited, it only bounds how slow an engine can be.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from services.cli.measurements import Row, is_step, number, read_rows, staleness_counts, values
from services.cli.plan.rates import Decode, Lengths, Publishing, Rates, Shape, lengths_of
from services.cli.plan.simulation import Simulation
from services.cli.run_folder import RunFolder
from shared.config import RunConfig, load_run
from shared.errors import ConfigError

MIN_STEPS = 5
MIN_WAIT = 0.03
"""Share of a step; a learner that waits less says little of its replicas."""

_DOUBLINGS = 4
"""The first guess is right to this power of two, or something else than engines was slow."""

_HALVINGS = 7
_SEARCH_STEPS = 42
_SEARCH_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run says.

    Attributes:
        num_steps: that were used; those at the start, while the pipeline filled, were not.
        skipped_steps: those.
        seconds_per_step: from one step to the next, everything included.
        wait_seconds: of it the learner waited for groups.
        staleness: completions by staleness.
        is_bound: the learner hardly waited: engines are at least as fast as `rates` has it.
    """

    shape: Shape
    rates: Rates
    num_steps: int
    skipped_steps: int
    seconds_per_step: float
    wait_seconds: float
    staleness: dict[int, int]
    is_bound: bool


def measured(
    folder: RunFolder,
    *,
    batch_cost: float = 0.0,
    response_p99: float | None = None,
    max_concurrent_groups: int | None = None,
) -> Measured:
    """The rates of a run, finished or not.

    Args:
        batch_cost: share of a token's time, with all places of a replica in use, that grows with
            the number of sequences; a run alone does not tell it.
        response_p99: of the completion lengths; else from how their means scatter.
        max_concurrent_groups: that a replica really held; else as many as the run file allows.
    Raises:
        ConfigError: the run is too short or lacks what is needed, or its lengths cannot have that
            percentile.
    """
    config = load_run(folder.run_file)
    rows = [row for row in read_rows(folder.metrics) if is_step(row)]
    skipped = config.learner.max_staleness + 2
    used = rows[skipped:]
    if len(used) < MIN_STEPS:
        raise ConfigError(
            f"--from {folder.path}: {len(rows)} steps; at least {skipped + MIN_STEPS} are needed,"
            f" since the first {skipped} only fill the pipeline: let the run go on"
        )
    shape = _shape(config, used, max_concurrent_groups)
    wait_seconds = statistics.fmean(values(used, "wait_data_seconds"))
    seconds = statistics.fmean(period for _, period in _periods(rows[skipped - 1 :]))
    rates = _rates(config, rows[skipped - 1 :], response_p99)
    search = _Search(rates, shape, batch_cost, min(len(used), _SEARCH_STEPS), skipped)
    return Measured(
        shape=shape,
        rates=search.waiting(wait_seconds, guess=_guess(shape, rates, seconds)),
        num_steps=len(used),
        skipped_steps=skipped,
        seconds_per_step=seconds,
        wait_seconds=wait_seconds,
        staleness=_staleness(used),
        is_bound=wait_seconds < MIN_WAIT * seconds,
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """For the engine's speed, by simulating the run that was measured."""

    rates: Rates
    shape: Shape
    batch_cost: float
    num_steps: int
    skipped_steps: int

    def waiting(self, seconds: float, *, guess: float) -> Rates:
        """With the engine that makes the learner wait so long for each batch.

        Args:
            guess: seconds for a token, to begin with.
        """
        slow = guess / 2**_DOUBLINGS
        for _ in range(2 * _DOUBLINGS):
            if self._wait_seconds(slow) > seconds:
                break
            slow *= 2
        fast = slow / 2
        for _ in range(_HALVINGS):
            middle = (slow * fast) ** 0.5
            slow, fast = (middle, fast) if self._wait_seconds(middle) > seconds else (slow, middle)
        return self._with_engine((slow * fast) ** 0.5)

    def _wait_seconds(self, token_seconds: float) -> float:
        rates = self._with_engine(token_seconds)
        simulation = Simulation(rates, self.shape, seed=_SEARCH_SEED)
        outcome = simulation.run(num_steps=self.num_steps, skipped_steps=self.skipped_steps)
        return outcome.wait_seconds

    def _with_engine(self, token_seconds: float) -> Rates:
        """Whose token takes so long with all of a replica's places in use."""
        places = self.shape.max_concurrent_groups * self.shape.group_size
        return replace(
            self.rates,
            decode=Decode(
                fixed_seconds=(1 - self.batch_cost) * token_seconds,
                sequence_seconds=self.batch_cost * token_seconds / places,
            ),
        )


def _guess(shape: Shape, rates: Rates, seconds_per_step: float) -> float:
    """Seconds for a token, if replicas were busy all the time and all completions alike."""
    places = shape.num_replicas * shape.max_concurrent_groups
    rounds = max(1.0, shape.groups_per_batch / places)
    return seconds_per_step / rounds / rates.lengths.mean


def _shape(config: RunConfig, rows: Sequence[Row], max_concurrent_groups: int | None) -> Shape:
    evaluation, verifier = config.evaluation, config.verifier
    return Shape(
        num_replicas=_num_replicas(config, rows),
        max_staleness=config.learner.max_staleness,
        groups_per_batch=config.learner.groups_per_batch,
        group_size=config.rollout.group_size,
        max_concurrent_groups=max_concurrent_groups or config.rollout.max_concurrent_groups,
        num_verifiers=verifier.num_replicas * verifier.num_workers,
        evaluation_every=evaluation.every_steps,
        evaluation_problems=evaluation.num_problems,
        evaluation_group_size=evaluation.group_size,
        checkpoint_every=config.checkpoint.every_steps,
    )


def _num_replicas(config: RunConfig, rows: Sequence[Row]) -> int:
    """That most batches came from; a cluster may run another number than the run file says."""
    counts = [len(by) for row in rows if isinstance(by := row.get("replica_groups"), dict)]
    return statistics.mode(counts) if counts else max(1, config.rollout.num_replicas)


def _rates(config: RunConfig, rows: Sequence[Row], response_p99: float | None) -> Rates:
    """All but the engine's speed; the first row only tells when the second step began.

    Verifying takes no time of its own here: it is part of the time that engines seem to take. Nor
    does writing a checkpoint: what training waits for is what the rows show, be it the copy, the
    checkpoint before, or all of it where `checkpoint.asynchronous` is false.
    """
    used, every = rows[1:], config.checkpoint.every_steps
    for key in ("train_seconds", "publish_seconds", "tokens", "completion_length_mean"):
        if len(values(used, key)) < MIN_STEPS:
            raise ConfigError(
                f"{key} is missing in metrics.jsonl: an older release wrote it, or its steps had"
                " nothing to train on; plan from another run"
            )
    between = _between(rows)
    written = [seconds for step, seconds in between.items() if (step - 1) % every == 0]
    usual = [seconds for step, seconds in between.items() if (step - 1) % every]
    pause = statistics.fmean(usual) if usual else 0.0
    replaced = sum(values(used, "groups_replaced"))
    return Rates(
        lengths=_lengths(config, used, response_p99),
        decode=Decode(),
        train_seconds_per_token=tuple(
            seconds / tokens
            for row in used
            if (seconds := number(row, "train_seconds")) and (tokens := number(row, "tokens"))
        ),
        publishing=tuple(
            Publishing(seconds, number(row, "pause_seconds") or 0.0)
            for row in used
            if (seconds := number(row, "publish_seconds")) is not None
        ),
        step_seconds=pause + statistics.fmean(_rest(row) for row in used),
        checkpoint_seconds=max(0.0, statistics.fmean(written) - pause) if written else 0.0,
        replaced_share=replaced / (replaced + len(used) * config.learner.groups_per_batch),
    )


def _rest(row: Row) -> float:
    """Seconds of a step beside waiting, training and publishing."""
    parts = ("wait_data_seconds", "train_seconds", "publish_seconds")
    spent = sum(number(row, part) or 0.0 for part in parts)
    return max(0.0, (number(row, "seconds") or 0.0) - spent)


def _lengths(config: RunConfig, rows: Sequence[Row], response_p99: float | None) -> Lengths:
    """Of completions.

    The deviation comes from neighbouring steps, whose policies hardly differ: of means over n
    completions each, the differences have the variance 2 sigma^2 / n. Completions of one prompt
    are alike, so that this is rather too much.
    """
    means, longest = values(rows, "completion_length_mean"), config.rollout.max_completion_tokens
    mean = statistics.fmean(means)
    if response_p99 is not None:
        return lengths_of(mean, response_p99, longest)
    count = config.learner.groups_per_batch * config.rollout.group_size
    variance = statistics.fmean((b - a) ** 2 for a, b in pairwise(means)) * count / 2
    return Lengths.from_deviation(mean, variance**0.5, longest)


def _periods(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Each row that directly follows another, and the time between their ends."""
    return [
        (row, row["time"] - before["time"])
        for before, row in pairwise(rows)
        if row["step"] == before["step"] + 1 and row["time"] > before["time"]
    ]


def _between(rows: Sequence[Row]) -> dict[int, float]:
    """By step, the time between the end of the one before and its beginning."""
    return {
        int(row["step"]): max(0.0, period - (number(row, "seconds") or 0.0))
        for row, period in _periods(rows)
    }


def _staleness(rows: Sequence[Row]) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(staleness_counts(row))
    return dict(sorted(counts.items()))
