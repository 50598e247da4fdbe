"""Takes scored groups off the stream and sorts them: to train on, to evaluate, to drop.

Consumes `scored`. Waits for the groups of one batch. Unblocked by verifiers. Every entry that was
claimed is remembered until a checkpoint contains its effect; only then is it acknowledged, so
that a crash before it finds the entry pending and trains on it again, in the same order.

A group whose usable rewards are all equal cannot tell good from bad. With dynamic sampling (DAPO,
https://arxiv.org/abs/2503.14476) it is skipped and another prompt takes its place in the batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from services.learner.evaluation import Evaluator
from services.learner.feeder import Feeder
from services.learner.ledger import Ledger
from services.learner.reader import Arrival, Reader
from shared import tracing
from shared.dead_letters import bury
from shared.errors import StreamError
from shared.metrics.learner import LEARNER_ABANDONED, LEARNER_DEGENERATE, LEARNER_DROPPED
from shared.records import Outcome, Purpose, ScoredGroup
from shared.rl.staleness import staleness
from shared.stream import SCORED, Stream

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""An entry claimed this long ago that this process does not know of: the reply was lost."""

MIN_JUDGED = 2

MOST_AHEAD = 2
"""So many batches' groups are read ahead to find one that is likely to be trained on."""


class Inbox:
    """What came on `scored`, sorted.

    Args:
        vocabulary: token ids of the model are below it.
        max_length: of prompt and completion, in tokens.

    Attributes:
        dropped: groups of this process that were not trained on, by reason.
        num_replaced: groups that were skipped for the batch taken last.
    """

    def __init__(
        self,
        *,
        scored: Stream,
        dead_letter: Stream,
        ledger: Ledger,
        feeder: Feeder,
        evaluator: Evaluator,
        on_evaluated: Callable[[dict[str, Any]], None],
        vocabulary: int,
        max_length: int,
        max_staleness: int,
        max_attempts: int,
        replace_degenerate: bool,
        max_degenerate_batches: int,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self.dropped: dict[str, int] = {}
        self.num_replaced = 0
        self._batch: dict[int, ScoredGroup] = {}
        self._scored = scored
        self._dead_letter = dead_letter
        self._ledger = ledger
        self._feeder = feeder
        self._evaluator = evaluator
        self._on_evaluated = on_evaluated
        self._max_staleness = max_staleness
        self._max_attempts = max_attempts
        self._replace_degenerate = replace_degenerate
        self._max_degenerate_batches = max_degenerate_batches
        self._unacknowledged: list[str] = []
        self._reader = Reader(
            scored, vocabulary=vocabulary, max_length=max_length, lost_seconds=lost_seconds
        )

    @property
    def num_unacknowledged(self) -> int:
        """Entries that the next checkpoint takes off the stream."""
        return len(self._unacknowledged)

    @property
    def done_with(self) -> Collection[str]:
        """Ids of entries that are on the stream only until the next checkpoint."""
        return self._unacknowledged

    @property
    def in_hand(self) -> Collection[int]:
        """Positions whose groups were taken for the batch that is being filled."""
        return self._batch.keys()

    @property
    def heard_at(self) -> float:
        """When a group last came, or a wait for some began; monotonic seconds."""
        return self._reader.heard_at

    async def recover(self) -> None:
        """As `Reader.recover`."""
        await self._reader.recover()

    def reading_ahead(
        self, count: int, *, then: Callable[[Sequence[ScoredGroup]], None]
    ) -> AbstractContextManager[None]:
        """Within it groups for the next batch are read; none is sorted before it is taken.

        Args:
            then: called with `count` groups that are likely to be that batch, once all have come.
        """

        def room(arrivals: Sequence[Arrival]) -> int:
            return min(count - len(self._likely(arrivals)), MOST_AHEAD * count - len(arrivals))

        def guess() -> None:
            likely = self._likely(self._reader.ahead)
            if len(likely) >= count:
                then(likely[:count])

        return self._reader.reading_ahead(room, then=guess)

    async def close(self) -> None:
        """As `Reader.close`."""
        await self._reader.close()

    async def take_batch(
        self, count: int, *, policy_version: int, while_waiting: Callable[[int], Awaitable[None]]
    ) -> list[ScoredGroup]:
        """`count` groups to train on, none of a token staler than the bound.

        With dynamic sampling none of them is degenerate, until max_degenerate_batches x `count`
        were replaced for this batch: then they are taken as they come, so that a task that is
        all solved or all failed does not stop the run.

        `while_waiting` is called with the number of groups still missing whenever none came, or
        none goes on because dead letters are full; if it raises, the groups taken so far stay
        pending.
        """
        max_replaced = self._max_degenerate_batches * count if self._replace_degenerate else 0
        batch = self._batch = {}
        ids: list[str] = []
        self._reader.heard_at = time.monotonic()
        while len(batch) < count:
            arrivals = await self._reader.next(count - len(batch))
            for arrival in arrivals:
                group = await self._sort(
                    arrival, while_full=lambda: while_waiting(count - len(batch))
                )
                if group is None or not await self._is_trainable(
                    group, policy_version, batch, max_replaced
                ):
                    self._unacknowledged.append(arrival.entry.id)
                else:
                    batch[self._ledger.position(group.rollout.prompt.uid)] = group
                    ids.append(arrival.entry.id)
            if not arrivals:
                await while_waiting(count - len(batch))
        self._unacknowledged += ids
        self.num_replaced = self._ledger.num_replaced
        if self._replace_degenerate:
            self._report_degenerate(list(batch.values()))
        return list(batch.values())

    async def take_evaluations(self, *, while_waiting: Callable[[int], Awaitable[None]]) -> None:
        """Take what comes until no evaluation is under way; training groups stay pending."""
        while self._evaluator.num_under_way:
            arrivals = await self._reader.next(64)
            for arrival in arrivals:
                if await self._sort(arrival, while_full=lambda: while_waiting(0)) is None:
                    self._unacknowledged.append(arrival.entry.id)
            if not arrivals:
                await while_waiting(0)

    async def acknowledge(self, count: int | None = None) -> None:
        """A checkpoint contains the effect of the first `count` that are not acknowledged yet.

        Args:
            count: `num_unacknowledged` at the moment of the checkpoint; all, if None.
        """
        contained = self._unacknowledged[:count]
        await self._scored.acknowledge(contained)
        self._reader.forget(contained)
        del self._unacknowledged[: len(contained)]

    def _likely(self, arrivals: Sequence[Arrival]) -> list[ScoredGroup]:
        """Those of them that will be trained on, unless they are too stale or come twice."""
        groups = [each.content for each in arrivals if isinstance(each.content, ScoredGroup)]
        return [
            group
            for group in groups
            if group.rollout.prompt.purpose is Purpose.TRAIN
            and not (self._replace_degenerate and is_degenerate(group))
        ]

    async def _sort(
        self, arrival: Arrival, *, while_full: Callable[[], Awaitable[None]]
    ) -> ScoredGroup | None:
        """The training group that came; what else it may be is dealt with here.

        `while_full` is called now and then while there is no room for a dead letter.
        """
        group = arrival.content
        if isinstance(group, StreamError):
            LEARNER_DROPPED.labels(reason="malformed").inc()
            await bury(
                arrival.entry,
                self._scored,
                self._dead_letter,
                error=str(group),
                while_full=while_full,
            )
            return None
        if group.rollout.prompt.purpose is Purpose.TRAIN:
            return group
        metrics = self._evaluator.add(group)
        if metrics is not None:
            self._on_evaluated(metrics)
        return None

    async def _is_trainable(
        self,
        group: ScoredGroup,
        policy_version: int,
        batch: Collection[int],
        max_replaced: int,
    ) -> bool:
        """False if the group was dropped; then its prompt is on its way again, unless done."""
        uid = group.rollout.prompt.uid
        if not self._ledger.is_wanted(uid) or self._ledger.position(uid) in batch:
            self._drop(group, "duplicate")
        elif sum(score.outcome.is_verdict for score in group.scores) < MIN_JUDGED:
            await self._retry(group, "incomplete_group", policy_version)
        elif group_staleness(group, policy_version) > self._max_staleness:
            await self._retry(group, "stale", policy_version)
        elif self._ledger.num_replaced < max_replaced and is_degenerate(group):
            await self._replace(group, policy_version)
        else:
            return True
        return False

    async def _retry(self, group: ScoredGroup, reason: str, policy_version: int) -> None:
        """Issue the prompt again, or give it up after too many attempts.

        Not if a later attempt is out: then this one was answered before, as happens when it is
        read again after a crash, or was overtaken.
        """
        self._drop(group, reason)
        uid = group.rollout.prompt.uid
        position = self._ledger.position(uid)
        if uid.attempt < self._ledger.attempt(position):
            return
        if reason != "stale" and self._ledger.fail(position) >= self._max_attempts:
            logger.error("gave up %s: no verdict in any attempt", uid)
            LEARNER_ABANDONED.labels(reason=reason).inc()
            self._ledger.abandon(position)
            await self._feeder.fill(policy_version=policy_version)
        else:
            await self._feeder.reissue(position, reason=reason, policy_version=policy_version)

    async def _replace(self, group: ScoredGroup, policy_version: int) -> None:
        """Skip a degenerate group; the next prompt of the order is issued for it."""
        self._drop(group, "degenerate")
        # Groups that are trained on are counted with their step; this one is in none.
        passed = {score.outcome is Outcome.PASS for score in group.scores if score.is_usable}
        if len(passed) == 1:
            reason = "all_correct" if passed.pop() else "all_wrong"
            LEARNER_DEGENERATE.labels(reason=reason).inc()
        self._ledger.skip(self._ledger.position(group.rollout.prompt.uid))
        await self._feeder.fill(policy_version=policy_version)

    def _report_degenerate(self, batch: Collection[ScoredGroup]) -> None:
        num_degenerate = sum(map(is_degenerate, batch))
        if num_degenerate:
            logger.warning(
                "%d of %d groups of a batch have equal rewards and teach nothing, after %d were"
                " replaced (advantage.dynamic_sampling), the most that"
                " advantage.max_degenerate_batches = %d allows: the task is too easy or too hard",
                num_degenerate,
                len(batch),
                self.num_replaced,
                self._max_degenerate_batches,
            )

    def _drop(self, group: ScoredGroup, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        LEARNER_DROPPED.labels(reason=reason).inc(len(group.scores))
        trace_end("drop", group, began=time.time(), reason=reason)


def trace_end(
    name: str, group: ScoredGroup, *, began: float, **attributes: str | int | float
) -> None:
    """What the learner did with a group from `began`, Unix seconds; the end of its trace."""
    context = group.rollout.prompt.trace_context
    tracing.record(name, context, stream=SCORED, since=group.scored_at, began=began, **attributes)


def is_degenerate(group: ScoredGroup) -> bool:
    """Whether the group teaches nothing: no two of its usable rewards differ.

    These are the verifier's rewards, without a penalty for length: two correct completions of
    unlike lengths do not make a group worth keeping.
    """
    return len({score.reward for score in group.scores if score.is_usable}) <= 1


def group_staleness(group: ScoredGroup, policy_version: int) -> int:
    """The staleness of the group's worst trajectory."""
    return max(
        staleness(policy_version, [run.policy_version for run in completion.version_runs])
        for completion in group.rollout.completions
    )
