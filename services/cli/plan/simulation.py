"""The run as a discrete-event simulation: learner, replicas and verifiers in seconds and tokens.

What decides is the system's own: admission and staleness are `shared.rl.staleness`. What carries is
reduced to its order: each stream is first in, first out, and a prompt goes to the replica with the
most free places. A step of the learner is that of `services.learner.loop`: fill, wait for a batch,
train, publish, evaluate and checkpoint when due. A publication stops each replica for the last
part of it, so that nothing ends and nothing begins there; what is in work stays, and a group that
begins after it samples from the new version. A checkpoint stops the learner for the copy, and is
written beside the next steps. Nothing fails.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from services.cli.plan.rates import Rates, Shape
from services.cli.plan.replica import Group, SimulatedReplica
from shared.rl.staleness import admissible, staleness

Deed = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a number of steps came to; shares are of their time.

    Attributes:
        learner_idle: waits for groups.
        replica_idle: nothing in work, mean over replicas; publications not included.
        places_used: groups in work, of those that the replicas could hold.
        verifier_busy: mean over verifier processes.
        staleness: trained groups by staleness.
        num_dropped: groups that became too stale and were sampled again, in these steps.
        num_issued, num_trained, num_replaced, num_outstanding: positions, from the very start.
    """

    seconds: float
    num_steps: int
    tokens: int
    learner_idle: float
    replica_idle: float
    places_used: float
    verifier_busy: float
    staleness: Counter[int]
    num_dropped: int
    num_issued: int
    num_trained: int
    num_replaced: int
    num_outstanding: int

    @property
    def steps_per_hour(self) -> float:
        """Training steps."""
        return 3600 * self.num_steps / self.seconds

    @property
    def wait_seconds(self) -> float:
        """Of the learner, in each step."""
        return self.learner_idle * self.seconds / self.num_steps


@dataclass(slots=True)
class _Spent:
    """What accumulates; the difference of two is what happened between."""

    now: float = 0.0
    waited: float = 0.0
    busy: float = 0.0
    places: float = 0.0
    verified: float = 0.0
    tokens: int = 0
    num_dropped: int = 0


@dataclass(slots=True)
class _Learner:
    """The learner's state; `began` is when it began to wait, None while it does not; `written`,
    when the disk has the last checkpoint."""

    step: int = 0
    version: int = 0
    began: float | None = None
    written: float = 0.0
    batch: list[Group] = field(default_factory=list)
    outstanding: set[int] = field(default_factory=set)
    num_issued: int = 0
    num_trained: int = 0
    num_replaced: int = 0


class Simulation:
    """One run; the same seed gives the same run."""

    def __init__(self, rates: Rates, shape: Shape, *, seed: int) -> None:
        self._rates, self._shape = rates, shape
        self._lengths, self._draws = random.Random(f"{seed}/lengths"), random.Random(seed)
        self._events: list[tuple[float, int, Deed]] = []
        self._order = itertools.count()
        self._learner = _Learner()
        self._prompts: deque[Group] = deque()
        self._rollouts: deque[Group] = deque()
        self._scored: deque[Group] = deque()
        self._num_verifying = 0
        self._replicas = [
            SimulatedReplica(
                rates.decode,
                prompt_tokens=rates.prompt_tokens,
                prompt_seconds=rates.prompt_seconds,
                max_groups=shape.max_concurrent_groups,
            )
            for _ in range(shape.num_replicas)
        ]
        self._stamps = [0] * shape.num_replicas
        self._spent = _Spent()
        self._staleness: Counter[int] = Counter()

    def run(self, *, num_steps: int, skipped_steps: int) -> Outcome:
        """So many steps, after some that are not counted: the pipeline is empty at first."""
        self._evaluate()
        self._begin_step()
        self._until_step(skipped_steps)
        before, self._staleness = self._account(), Counter()
        self._until_step(skipped_steps + num_steps)
        return self._outcome(before, self._account(), num_steps)

    def _until_step(self, step: int) -> None:
        while self._learner.step < step:
            now, _, deed = heapq.heappop(self._events)
            self._spent.now = now
            deed()

    def _at(self, seconds: float, deed: Deed) -> None:
        """Do it that much later."""
        heapq.heappush(self._events, (self._spent.now + seconds, next(self._order), deed))

    # --- the learner ----------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._fill()
        self._learner.began = self._spent.now
        self._take()

    def _fill(self) -> None:
        learner, shape = self._learner, self._shape
        room = admissible(
            len(learner.outstanding),
            max_staleness=shape.max_staleness,
            groups_per_batch=shape.groups_per_batch,
        )
        for _ in range(room):
            learner.outstanding.add(learner.num_issued)
            self._put(learner.num_issued)
            learner.num_issued += 1
        self._claim()

    def _put(self, position: int) -> None:
        lengths = self._draw_lengths(self._shape.group_size)
        self._prompts.append(Group(position, lengths))

    def _draw_lengths(self, count: int) -> tuple[int, ...]:
        return tuple(self._rates.lengths.draw(self._lengths) for _ in range(count))

    def _take(self) -> None:
        """Fill the batch from what was scored, and train when it is full."""
        learner = self._learner
        while learner.began is not None and self._scored:
            self._sort(self._scored.popleft())
            if len(learner.batch) == self._shape.groups_per_batch:
                self._spent.waited += self._spent.now - learner.began
                learner.began = None
                self._train()

    def _sort(self, group: Group) -> None:
        learner = self._learner
        age = staleness(learner.version, [group.version])
        if age > self._shape.max_staleness:
            self._spent.num_dropped += 1
            self._put(group.position)
            self._claim()
        elif self._draws.random() < self._rates.replaced_share:
            learner.num_replaced += 1
            learner.outstanding.remove(group.position)
            self._fill()
        else:
            learner.batch.append(group)
            self._staleness[age] += 1

    def _train(self) -> None:
        tokens = sum(group.tokens for group in self._learner.batch)
        self._spent.tokens += tokens
        rate = self._draws.choice(self._rates.train_seconds_per_token)
        self._at(tokens * rate, self._end_training)

    def _end_training(self) -> None:
        learner = self._learner
        learner.outstanding.difference_update(group.position for group in learner.batch)
        learner.num_trained += len(learner.batch)
        learner.batch.clear()
        publishing = self._draws.choice(self._rates.publishing)
        pause_seconds = min(publishing.pause_seconds, publishing.seconds)
        self._at(publishing.seconds - pause_seconds, partial(self._pause, pause_seconds))
        self._at(publishing.seconds, self._end_publication)

    def _pause(self, seconds: float) -> None:
        for index, replica in enumerate(self._replicas):
            replica.pause(self._spent.now, seconds)
            self._await_end(index)

    def _end_publication(self) -> None:
        learner, shape = self._learner, self._shape
        learner.version += 1
        self._claim()
        seconds = self._rates.step_seconds
        step = learner.step + 1
        if shape.evaluation_every and step % shape.evaluation_every == 0:
            self._evaluate()
        if shape.checkpoint_every and step % shape.checkpoint_every == 0:
            seconds += self._checkpoint(self._spent.now + seconds)
        self._at(seconds, self._end_step)

    def _checkpoint(self, now: float) -> float:
        """How long training waits: until the one before is written, and for the copy."""
        learner, rates = self._learner, self._rates
        seconds = max(0.0, learner.written - now) + rates.checkpoint_seconds
        learner.written = now + seconds + rates.checkpoint_write_seconds
        return seconds

    def _evaluate(self) -> None:
        if not self._shape.evaluation_every:
            return
        for _ in range(self._shape.evaluation_problems):
            lengths = self._draw_lengths(self._shape.evaluation_group_size)
            self._prompts.append(Group(-1, lengths, is_evaluation=True))
        self._claim()

    def _end_step(self) -> None:
        self._learner.step += 1
        self._begin_step()

    # --- replicas and verifiers -----------------------------------------------------------------

    def _claim(self) -> None:
        """Prompts to whoever has most room."""
        begun = set()
        while self._prompts:
            index, replica = max(enumerate(self._replicas), key=lambda each: each[1].num_free)
            if not replica.num_free:
                break
            group = self._prompts.popleft()
            replica.begin(group, self._spent.now, version=self._learner.version)
            begun.add(index)
        for index in sorted(begun):
            self._await_end(index)

    def _await_end(self, index: int) -> None:
        """The end of a replica's next sequence, unless something happens to it before."""
        self._stamps[index] += 1
        stamp, end = self._stamps[index], self._replicas[index].next_end()
        if end is not None:
            self._at(end - self._spent.now, partial(self._end_sequence, index, stamp))

    def _end_sequence(self, index: int, stamp: int) -> None:
        if stamp != self._stamps[index]:
            return
        group = self._replicas[index].end_next(self._spent.now)
        self._await_end(index)
        if group is not None:
            self._rollouts.append(group)
            self._claim()
            self._verify()

    def _verify(self) -> None:
        while self._rollouts and self._num_verifying < self._shape.num_verifiers:
            group = self._rollouts.popleft()
            self._num_verifying += 1
            self._spent.verified += self._rates.verify_seconds
            self._at(self._rates.verify_seconds, partial(self._end_verifying, group))

    def _end_verifying(self, group: Group) -> None:
        self._num_verifying -= 1
        self._verify()
        if not group.is_evaluation:
            self._scored.append(group)
            self._take()

    # --- what it came to ------------------------------------------------------------------------

    def _account(self) -> _Spent:
        spent = self._spent
        for replica in self._replicas:
            replica.advance(spent.now)
        return _Spent(
            spent.now,
            spent.waited,
            sum(replica.busy_seconds for replica in self._replicas),
            sum(replica.place_seconds for replica in self._replicas),
            spent.verified,
            spent.tokens,
            spent.num_dropped,
        )

    def _outcome(self, before: _Spent, after: _Spent, num_steps: int) -> Outcome:
        shape, learner = self._shape, self._learner
        seconds = after.now - before.now
        replicas = seconds * shape.num_replicas
        return Outcome(
            seconds=seconds,
            num_steps=num_steps,
            tokens=after.tokens - before.tokens,
            learner_idle=(after.waited - before.waited) / seconds,
            replica_idle=max(0.0, 1 - (after.busy - before.busy) / replicas),
            places_used=(after.places - before.places) / replicas / shape.max_concurrent_groups,
            verifier_busy=(after.verified - before.verified) / seconds / shape.num_verifiers,
            staleness=Counter(self._staleness),
            num_dropped=after.num_dropped - before.num_dropped,
            num_issued=learner.num_issued,
            num_trained=learner.num_trained,
            num_replaced=learner.num_replaced,
            num_outstanding=len(learner.outstanding),
        )
