"""Finds groups that were issued, are not done, and are nowhere; issues them again or gives up.

A group is nowhere when Redis lost it, in a wipe, a fail-over or the crash of its machine, or when
it lies in `dead_letter`. Nobody would ever bring it, and the run would wait for it for ever. So
while nothing comes the streams are asked what they hold.

The streams are read in the order in which groups move, `prompts`, `rollouts`, `scored`. An entry
moves in one step, and forward: it is found before or after its move, never missed. What the inbox
has in hand counts as held, since a wiped stream no longer shows it. Labels are read, not payloads:
a few hundred KB where the groups may be a GiB. A person who puts a dead letter back moves it the
other way; if that is missed, the group is issued once more, and its second arrival is dropped by
the ledger like every duplicate. For the same reason nothing here can train a group twice.

With each look the policy version is announced again, as Redis may have fallen back to an older
one: replicas that hear it would take themselves for ahead of the learner, and wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.learner.evaluation import Evaluator
from services.learner.feeder import Feeder
from services.learner.inbox import Inbox
from services.learner.labels import read_label
from services.learner.ledger import Ledger
from shared.metrics.learner import LEARNER_ABANDONED
from shared.records import GroupUid, Purpose
from shared.stream import Stream

logger = logging.getLogger(__name__)


class RunStreams(Protocol):
    """What this module needs of `shared.redis_stream.Streams`."""

    @property
    def prompts(self) -> Stream: ...

    @property
    def rollouts(self) -> Stream: ...

    @property
    def scored(self) -> Stream: ...

    @property
    def dead_letter(self) -> Stream: ...

    async def server(self) -> str: ...


@dataclass(slots=True)
class Held:
    """The groups that some streams hold, by purpose."""

    train: list[GroupUid] = field(default_factory=list)
    evaluation: list[GroupUid] = field(default_factory=list)


class Reconciler:
    """Compares what is out with what is somewhere.

    Args:
        announce: tells the replicas which version is published.
        seconds: without a group coming, between two looks.
        max_attempts: a prompt of which as many groups became dead letters is given up.
    """

    def __init__(
        self,
        *,
        streams: RunStreams,
        ledger: Ledger,
        feeder: Feeder,
        evaluator: Evaluator,
        inbox: Inbox,
        announce: Callable[[int], Awaitable[None]],
        on_evaluated: Callable[[dict[str, Any]], None],
        seconds: float,
        max_attempts: int,
    ) -> None:
        self._streams = streams
        self._ledger = ledger
        self._feeder = feeder
        self._evaluator = evaluator
        self._inbox = inbox
        self._announce = announce
        self._on_evaluated = on_evaluated
        self._seconds = seconds
        self._max_attempts = max_attempts
        self._server = ""
        self._looked_at = time.monotonic()

    async def drop_lost_evaluations(self, *, step: int) -> None:
        """After a crash: take evaluations of steps after `step`, to which the run went back, away.

        Their weights are lost, and the steps will be evaluated when they come again. Until then
        these groups would hold the places of the replicas, which wait for the version; and results
        that are there already would count for other weights.
        """
        streams = self._streams
        for stream in (streams.prompts, streams.rollouts, streams.scored):
            lost = [
                id
                for id, (purpose, uid) in (await self._groups_in(stream)).items()
                if purpose is Purpose.EVAL and uid.epoch > step
            ]
            await stream.acknowledge(lost)
            if lost:
                logger.info("took %d lost evaluation groups off %s", len(lost), stream.name)

    async def recover(self, *, policy_version: int) -> None:
        """After a crash: adopt what the streams hold, issue again what they lost."""
        await self._announce(policy_version)
        held = await self._held()
        self._ledger.adopt(held.train)
        logger.info("recovered: the streams hold %d groups", len(held.train))
        await self._issue_missing(held, policy_version=policy_version)

    async def look_if_due(self, *, policy_version: int) -> None:
        """Called while nothing comes: looks after a time, and at once after another server came.

        A restarted server may have lost the end of what it held, one that took over as well.
        """
        server = await self._streams.server()
        is_other, self._server = self._server not in ("", server), server
        last = max(self._looked_at, self._inbox.heard_at)
        if is_other or time.monotonic() - last >= self._seconds:
            await self._announce(policy_version)
            await self._issue_missing(await self._held(), policy_version=policy_version)

    async def _held(self) -> Held:
        """What is on its way to the loop: what it is done with lies on `scored` for a while."""
        streams, held = self._streams, Held()
        for stream in (streams.prompts, streams.rollouts):
            await self._add(held, stream)
        await self._add(held, streams.scored, without=set(self._inbox.done_with))
        return held

    async def _add(
        self, held: Held, stream: Stream, *, without: Collection[str] = frozenset()
    ) -> None:
        for id, (purpose, uid) in (await self._groups_in(stream)).items():
            if id not in without:
                (held.train if purpose is Purpose.TRAIN else held.evaluation).append(uid)

    async def _groups_in(self, stream: Stream) -> dict[str, tuple[Purpose, GroupUid]]:
        """What the entries of a stream are, by id."""
        found = {}
        for id, label in (await stream.labels()).items():
            try:
                found[id] = read_label(label, run_id=self._ledger.run_id)
            except ValueError:
                logger.warning("%s holds an entry labelled %r", stream.name, label)
        return found

    async def _issue_missing(self, held: Held, *, policy_version: int) -> None:
        self._looked_at = time.monotonic()
        dead = Held()
        await self._add(dead, self._streams.dead_letter)
        found = {*map(self._ledger.position, held.train), *self._inbox.in_hand}
        missing = self._ledger.missing(found)
        self._warn(missing)
        dead_attempts = {(self._ledger.position(uid), uid.attempt) for uid in dead.train}
        for position in missing:
            if (position, self._ledger.attempt(position)) in dead_attempts:
                await self._try_again(position, policy_version)
            else:
                await self._feeder.reissue(position, reason="lost", policy_version=policy_version)
        await self._feeder.fill(policy_version=policy_version)
        for metrics in await self._evaluator.issue_missing(
            held.evaluation, dead.evaluation, max_attempts=self._max_attempts
        ):
            self._on_evaluated(metrics)

    async def _try_again(self, position: int, policy_version: int) -> None:
        """Another attempt at a position whose newest group is a dead letter, or no more of them."""
        failures = self._ledger.fail(position)
        if failures < self._max_attempts:
            await self._feeder.reissue(
                position, reason="dead_letter", policy_version=policy_version
            )
            return
        logger.error(
            "gave up position %d of the prompt order: a dead letter after %d attempts"
            " (redis.max_attempts)",
            position,
            failures,
        )
        LEARNER_ABANDONED.labels(reason="dead_letter").inc()
        self._ledger.abandon(position)

    def _warn(self, missing: list[int]) -> None:
        if missing:
            logger.warning(
                "%d groups that are out are in no stream, and are issued again: positions %s%s",
                len(missing),
                ", ".join(map(str, missing[:10])),
                " ..." if len(missing) > 10 else "",
            )
