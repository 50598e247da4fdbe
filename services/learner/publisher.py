"""Brings a policy version to every rollout replica, and never believes that it arrived.

A publication goes in rounds. Each is for the replicas that do not serve the version yet:

    1. connect  replicas that are in no broadcast group join one
    2. begin    each posts its receives; decoding goes on
    3. send     packed buckets, each packed once
    4. commit   each checks the checksum, swaps the weights in, scores the canary
    5. serve    those whose canary matches the learner's log-probs are told to serve

Whoever fails or is silent past a deadline is named, counted and left out of the groups; the next
round tries it again in a new one, unless it failed twice, is gone, or `republish_seconds` have
passed, what is left of which is all that its transfer gets. Where one group reaches all, a member
that breaks it breaks it for everyone: those who can say that they live are not blamed for it. The
version is announced once any replica serves it. Who still does not may serve an older one: it
reads the announcement, and samples nothing once that is beyond `learner.max_staleness`
(`services.rollout.announced`). `services.learner.catch_up` or the next publication looks after it.

Every wait has a deadline: `timeout_seconds` a call or a bucket, `Refitter.wire_seconds` besides for
a whole transfer, and the end of a replica's lease. With a group for each replica the others go in
step with a slow one until it is dropped, `timeout_seconds` behind them, and left to streams for a
while. In one group of all nobody can tell who is slow, and all fail: streams bring up whom they
can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.learner.fleet import Fleet
from services.learner.peer import Peer, ask_each, taking
from services.learner.refit import Refitter, Version
from services.learner.rounds import Rounds, Timed
from shared import tracing
from shared.broadcast import BroadcastGroup
from shared.buckets import Manifest, StagedWeights
from shared.errors import PeerError
from shared.lease import Registry
from shared.metrics.learner import LEARNER_VERSION
from shared.metrics.weights import (
    WEIGHT_SYNC_BYTES,
    WEIGHT_SYNC_LAST_SUCCESS,
    WEIGHT_SYNC_RETRIES,
    WEIGHT_SYNC_SECONDS,
)
from shared.weight_transfer import SendReport, send_weights

logger = logging.getLogger(__name__)

CROWD = 8
"""Newcomers for which a broadcast is made while the learner waits anyway."""

OnEngine = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on the engine's thread, the only one that may touch the model."""


class LearnerWeights(Protocol):
    """What the publisher needs of the learner's engine."""

    def manifest(self) -> Manifest: ...

    def weights(self) -> Iterator[tuple[str, Any]]: ...

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Publication:
    """What one publication did and cost.

    Attributes:
        retries: rounds after the first.
        gather_seconds: until the engine had produced all parameters, over all rounds.
        broadcast_seconds: of sending them, gathering not included.
        load_seconds: from the last byte sent to the last replica that serves.
        pause_seconds: the longest of any replica.
    """

    policy_version: int
    served: tuple[str, ...]
    failed: tuple[str, ...]
    retries: int
    seconds: float
    gather_seconds: float
    broadcast_seconds: float
    load_seconds: float
    pause_seconds: float

    @property
    def phases(self) -> dict[str, float]:
        """Of `metrics.jsonl`: what the time went to."""
        return {
            "publish_gather_seconds": self.gather_seconds,
            "publish_broadcast_seconds": self.broadcast_seconds,
            "publish_load_seconds": self.load_seconds,
            "publish_retries": self.retries,
        }


class Publisher:
    """The learner's only way to the replicas as a group.

    Attributes:
        fleet, refitter: what it works with, and `services.learner.catch_up` too.
        version: the last that was published; None before the first, and while another is sent.
        keeps_copy: stage what is sent, for replicas that come late: one model in host memory, and a
            second while a stream still reads the one before.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        refitter: Refitter,
        registry: Registry,
        engine: LearnerWeights,
        on_engine: OnEngine,
        republish_seconds: float,
        keeps_copy: bool,
    ) -> None:
        self.version: Version | None = None
        self.keeps_copy = keeps_copy
        self.fleet = fleet
        self.refitter = refitter
        self._registry = registry
        self._engine = engine
        self._on_engine = on_engine
        self._republish_seconds = republish_seconds
        self._manifest: Manifest = ()

    @property
    def replicas(self) -> dict[str, str]:
        """What the learner believes of each replica, for people."""
        return {
            name: "stale" if version is None else f"serves {version}"
            for name, version in self.versions.items()
        }

    @property
    def versions(self) -> dict[str, int | None]:
        """What each replica serves, as far as it was confirmed; None for nothing."""
        return {peer.name: peer.policy_version for peer in self.fleet.peers}

    @property
    def unanswered(self) -> dict[str, float]:
        """Seconds since a replica was asked what it has not answered, of each that was."""
        asked = {peer.name: peer.asked_at for peer in self.fleet.peers}
        now = time.monotonic()
        return {name: now - since for name, since in asked.items() if since is not None}

    async def publish(self, policy_version: int) -> Publication:
        """Bring every replica to `policy_version`; those that cannot be are left behind."""
        with tracing.span("publish", policy_version=policy_version):
            return await self._publish(policy_version)

    async def _publish(self, policy_version: int) -> Publication:
        started = time.monotonic()
        await self.fleet.meet()
        if not self._manifest:
            self._manifest = await self._on_engine(self._engine.manifest)
        with taking(self._behind(policy_version)) as targets:
            until = started + self._republish_seconds
            under_way = Rounds(policy_version, list(targets), until)
            await self._publish_in_rounds(under_way)
            unreached = [peer for peer in targets if peer not in under_way.pauses]
            for peer in unreached:
                peer.policy_version = None
        if any(peer.policy_version == policy_version for peer in self.fleet.peers):
            await self.announce(policy_version)
        return Publication(
            policy_version,
            served=tuple(peer.name for peer in targets if peer in under_way.pauses),
            failed=tuple(peer.name for peer in unreached),
            retries=under_way.num_rounds - 1,
            seconds=time.monotonic() - started,
            gather_seconds=under_way.seconds["gather"],
            broadcast_seconds=under_way.seconds["broadcast"],
            load_seconds=under_way.seconds["load"],
            pause_seconds=max(under_way.pauses.values(), default=0.0),
        )

    async def is_worth_repeating(self, policy_version: int) -> bool:
        """True if replicas do not serve this version that a group reaches best.

        Where a copy is kept that is a crowd of newcomers, as at the start; a few are caught up
        with by streams.
        """
        await self.fleet.meet()
        behind = self._behind(policy_version)
        if not self.keeps_copy:
            return bool(behind)
        return sum(not peer.is_taken and not peer.num_failures for peer in behind) >= CROWD

    def _behind(self, policy_version: int) -> list[Peer]:
        """Who does not serve the version; without those that a stream will be tried with later."""
        behind = [peer for peer in self.fleet.peers if peer.policy_version != policy_version]
        if not self.keeps_copy:
            return behind
        return [peer for peer in behind if not (peer.is_resting or peer.is_slow)]

    async def announce(self, policy_version: int) -> None:
        """Some replica serves this version now."""
        await self._registry.announce_version(policy_version)
        LEARNER_VERSION.set(policy_version)
        WEIGHT_SYNC_LAST_SUCCESS.set_to_current_time()

    async def close(self) -> None:
        """Leave every group."""
        await self.fleet.close()

    async def _publish_in_rounds(self, under_way: Rounds) -> None:
        while under_way.num_rounds == 0 or under_way.remaining:
            under_way.num_rounds += 1
            if under_way.num_rounds > 1:
                WEIGHT_SYNC_RETRIES.inc()
                names = ", ".join(peer.name for peer in under_way.remaining)
                logger.info("version %d again, for %s", under_way.policy_version, names)
            await self._round(under_way)
            under_way.drop_the_hopeless()
            if time.monotonic() > under_way.until:
                break
        if under_way.version is None and self.keeps_copy:
            await self._send([], under_way)  # to nobody yet

    async def _round(self, under_way: Rounds) -> None:
        peers = await self.fleet.connect(under_way.remaining, until=under_way.until)
        under_way.failures.update(set(under_way.remaining) - set(peers))
        failed = await ask_each(
            {
                peer: self.refitter.begin(peer, under_way.policy_version, self._manifest)
                for peer in peers
            }
        )
        under_way.count(failed, doing="beginning an update")
        if failed and self.fleet.has_one_group:
            return  # it waits for all its members, and some are not there
        peers = [peer for peer in peers if peer not in failed]
        if peers:
            await self._commit(await self._send(peers, under_way), under_way)

    async def _send(self, peers: list[Peer], under_way: Rounds) -> list[Peer]:
        """Broadcast on the engine's thread; the canary is scored there too."""
        groups = list(dict.fromkeys(group for peer in peers for group in peer.groups))
        is_first = under_way.version is None
        staged = self._make_room() if is_first and self.keeps_copy else None
        gathering = Timed(self._engine.weights)
        limit_seconds = self._limit_seconds(under_way, num_copies=len(groups))

        def send() -> tuple[SendReport, list[float]]:
            report = send_weights(
                groups, gathering, self._manifest, bucket_bytes=self.refitter.bucket_bytes,
                device=groups[0].device if groups else "cpu", limit_seconds=limit_seconds,
                staged=staged,
            )  # fmt: skip
            canary = self._engine.score_tokens(self.refitter.canary_token_ids) if is_first else []
            return report, canary

        report, canary = await self._on_engine(send)
        if is_first:
            self.version = under_way.version = Version(
                under_way.policy_version, self._manifest, report.checksum, canary, staged
            )
        spent = {"gather": gathering.seconds, "broadcast": report.seconds - gathering.seconds}
        for phase, seconds in spent.items():
            WEIGHT_SYNC_SECONDS.labels(phase=phase).observe(seconds)
            under_way.seconds[phase] += seconds
        WEIGHT_SYNC_BYTES.inc(report.num_bytes * len(groups))
        await self._blame_senders(peers, report.failed, under_way)
        return [peer for peer in peers if peer.groups]

    def _limit_seconds(self, under_way: Rounds, *, num_copies: int) -> float:
        """Of a transfer to so many groups."""
        wire_seconds = self.refitter.wire_seconds(self._manifest, num_copies=num_copies)
        limit_seconds = 2 * self.refitter.timeout_seconds + wire_seconds
        if under_way.num_rounds == 1:
            return limit_seconds
        return max(0.0, min(limit_seconds, under_way.until - time.monotonic()))

    def _make_room(self) -> StagedWeights:
        """Memory for a copy: the last one's, unless somebody still reads it."""
        last, self.version = self.version, None
        if last is None or last.staged is None or last.num_readers:
            return StagedWeights(self._manifest, bucket_bytes=self.refitter.bucket_bytes)
        return last.staged

    async def _blame_senders(
        self,
        peers: list[Peer],
        broken: dict[BroadcastGroup, Any],
        under_way: Rounds,
    ) -> None:
        failed: dict[Peer, PeerError] = {
            peer: broken[group] for peer in peers for group in peer.groups if group in broken
        }
        if failed and self.fleet.has_one_group:
            silent = await self.fleet.ask_who_lives(list(failed))
            for peer in failed:
                peer.leave_groups()
            failed = silent or failed
        under_way.count(failed, doing="receiving")

    async def _commit(self, peers: list[Peer], under_way: Rounds) -> None:
        version = under_way.version
        assert version is not None
        started = time.monotonic()

        async def commit(peer: Peer) -> None:
            under_way.pauses[peer] = await self.refitter.commit(
                peer, version, wait_seconds=self.refitter.timeout_seconds
            )

        failed = await ask_each({peer: commit(peer) for peer in peers})
        under_way.seconds["load"] += time.monotonic() - started
        if self.fleet.has_one_group:
            # Who did not get everything is not to blame where another member went silent.
            to_blame = {peer: error for peer, error in failed.items() if error.status != "ABORTED"}
            for peer in failed:
                peer.leave_groups()
            failed = to_blame or failed
        under_way.count(failed, doing="committing an update")
