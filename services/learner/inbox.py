"""Takes scored groups off the stream and sorts them: to train on, to evaluate, to drop.

Consumes `scored`. Waits for the groups of one batch. Unblocked by verifiers. Every entry that was
claimed is remembered until a checkpoint contains its effect; only then is it acknowledged, so
that a crash before it finds the entry pending and trains on it again, in the same order.

A group whose usable rewards are all equal cannot tell good from bad. With dynamic sampling (DAPO,
https://arxiv.org/abs/2503.14476) it is skipped and another prompt takes its place in the batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from services.learner.evaluation import Evaluator
from services.learner.feeder import Feeder
from services.learner.ledger import Ledger
from shared import tracing
from shared.codec import decode_scored_group
from shared.dead_letters import bury
from shared.errors import StreamError
from shared.metrics import LEARNER_ABANDONED, LEARNER_DEGENERATE, LEARNER_DROPPED
from shared.records import Outcome, Purpose, ScoredGroup
from shared.rl.staleness import staleness
from shared.stream import SCORED, Entry, Stream

logger = logging.getLogger(__name__)

CONSUMER = "learner"
CLAIM_WAIT_SECONDS = 0.5
LOST_SECONDS = 30.0
"""An entry claimed this long ago that this process does not know of: the reply was lost."""

MIN_JUDGED = 2


class Inbox:
    """The only consumer of `scored`.

    Args:
        vocabulary: token ids of the model are below it.
        max_length: of prompt and completion, in tokens.

    Attributes:
        dropped: groups of this process that were not trained on, by reason.
        num_replaced: groups that were skipped for the batch taken last.
        heard_at: when a group last came, or a wait for some began; monotonic seconds.
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
        self.heard_at = time.monotonic()
        self._batch: dict[int, ScoredGroup] = {}
        self._scored = scored
        self._dead_letter = dead_letter
        self._ledger = ledger
        self._feeder = feeder
        self._evaluator = evaluator
        self._on_evaluated = on_evaluated
        self._vocabulary = vocabulary
        self._max_length = max_length
        self._max_staleness = max_staleness
        self._max_attempts = max_attempts
        self._replace_degenerate = replace_degenerate
        self._max_degenerate_batches = max_degenerate_batches
        self._lost_seconds = lost_seconds
        self._backlog: deque[Entry] = deque()
        self._unacknowledged: list[str] = []
        self._held: set[str] = set()
        self._looked_at = time.monotonic()

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

    async def recover(self) -> None:
        """After a crash: what was claimed and not acknowledged comes first, in its old order."""
        entries = await self._scored.pending(CONSUMER)
        self._backlog.extend(entries)
        self._held.update(entry.id for entry in entries)
        logger.info("reads %d pending entries again", len(self._backlog))

    async def take_batch(
        self, count: int, *, policy_version: int, while_waiting: Callable[[int], Awaitable[None]]
    ) -> list[ScoredGroup]:
        """`count` groups to train on, none of a token staler than the bound.

        With dynamic sampling none of them is degenerate, until max_degenerate_batches x `count`
        were replaced for this batch: then they are taken as they come, so that a task that is
        all solved or all failed does not stop the run.

        `while_waiting` is called with the number of groups still missing whenever none came; if
        it raises, the groups taken so far stay pending.
        """
        max_replaced = self._max_degenerate_batches * count if self._replace_degenerate else 0
        batch = self._batch = {}
        ids: list[str] = []
        self.heard_at = time.monotonic()
        while len(batch) < count:
            entries = await self._next(count - len(batch))
            for entry in entries:
                group = await self._sort(entry)
                if group is None or not await self._is_trainable(
                    group, policy_version, batch, max_replaced
                ):
                    self._unacknowledged.append(entry.id)
                else:
                    batch[self._ledger.position(group.rollout.prompt.uid)] = group
                    ids.append(entry.id)
            if not entries:
                await while_waiting(count - len(batch))
        self._unacknowledged += ids
        self.num_replaced = self._ledger.num_replaced
        if self._replace_degenerate:
            self._report_degenerate(list(batch.values()))
        return list(batch.values())

    async def take_evaluations(self, *, while_waiting: Callable[[int], Awaitable[None]]) -> None:
        """Take what comes until no evaluation is under way; training groups stay pending."""
        while self._evaluator.num_under_way:
            entries = await self._next(64)
            for entry in entries:
                if await self._sort(entry) is None:
                    self._unacknowledged.append(entry.id)
            if not entries:
                await while_waiting(0)

    async def acknowledge(self, count: int | None = None) -> None:
        """A checkpoint contains the effect of the first `count` that are not acknowledged yet.

        Args:
            count: `num_unacknowledged` at the moment of the checkpoint; all, if None.
        """
        contained = self._unacknowledged[:count]
        await self._scored.acknowledge(contained)
        self._held.difference_update(contained)
        del self._unacknowledged[: len(contained)]

    async def _next(self, count: int) -> list[Entry]:
        if self._backlog:
            return [self._backlog.popleft() for _ in range(min(count, len(self._backlog)))]
        entries = await self._find_lost(count) or await self._scored.claim(
            CONSUMER, count=count, wait_seconds=CLAIM_WAIT_SECONDS
        )
        self._held.update(entry.id for entry in entries)
        if entries:
            self.heard_at = time.monotonic()
        return entries

    async def _find_lost(self, count: int) -> list[Entry]:
        """Now and then, also while others keep coming: a group keeps its place in the admission
        until it is found, and ages."""
        if time.monotonic() - self._looked_at < self._lost_seconds / 3:
            return []
        self._looked_at = time.monotonic()
        return await self._scored.reclaim(
            CONSUMER,
            idle_seconds=self._lost_seconds,
            alive={CONSUMER},
            count=count,
            held=self._held,
        )

    async def _sort(self, entry: Entry) -> ScoredGroup | None:
        """The training group in `entry`; what else it may be is dealt with here."""
        try:
            group = decode_scored_group(entry.payload)
            check_fits(group, vocabulary=self._vocabulary, max_length=self._max_length)
        except StreamError as error:
            await self._bury(entry, error)
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

    async def _bury(self, entry: Entry, error: StreamError) -> None:
        LEARNER_DROPPED.labels(reason="malformed").inc()
        await bury(entry, self._scored, self._dead_letter, error=str(error))


def check_fits(group: ScoredGroup, *, vocabulary: int, max_length: int) -> None:
    """Whether the model can take the group; what it cannot would end the learner, or its step.

    Raises:
        StreamError: a token id that the model does not have, a trajectory that is too long, or a
            log-prob that is not finite.
    """
    prompt = group.rollout.prompt.prompt_token_ids
    for completion in group.rollout.completions:
        largest = max(max(prompt), max(completion.token_ids))
        if largest >= vocabulary:
            raise StreamError(f"token id {largest}: the model has {vocabulary}")
        length = len(prompt) + len(completion.token_ids)
        if length > max_length:
            raise StreamError(f"a trajectory of {length} tokens: the model takes {max_length}")
        # Sums of finite float32 do not overflow; one that is not finite stays in the sum.
        if not math.isfinite(sum(completion.behaviour_logprobs)):
            raise StreamError("a behaviour log-prob is not finite")


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
