"""A rollout replica as the learner sees it, and how it is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from shared.broadcast import SLOW, BroadcastGroup
from shared.errors import PeerError
from shared.lease import Member
from shared.metrics.weights import WEIGHT_SYNC_OPERATIONS
from shared.rpc import call

logger = logging.getLogger(__name__)

Response = TypeVar("Response")

PROBE_SECONDS = 5.0
"""Whoever lives says within this time what it does: the answer needs no engine."""

MAX_REST_SECONDS = 10.0
"""Between two attempts on a replica that fails again and again."""

SLOW_SECONDS = 600.0
"""One that was too slow for a broadcast is left to streams for this long: the others went in step
with it, and would again."""

GONE = "GONE"
"""`PeerError.status` of a replica whose lease ran out while it was waited for."""

CANARY = "CANARY"
"""`PeerError.status` of a replica whose canary's log-probs differ."""


@dataclass(eq=False, slots=True)
class Peer:
    """A rollout replica.

    Attributes:
        policy_version: what it serves, as far as the learner confirmed it; None if nothing.
        groups: the learner's ends of the broadcast groups that reach its workers. Peers of one
            group share the list: a group that was left is left for all of them.
        epoch: in which those groups were formed.
        num_failures: refits that failed since the last that did not.
        rests_until: on the monotonic clock; nobody is to begin another before.
        slow_until: on the monotonic clock; a group is not for it before.
        is_taken: somebody brings a version to it; nobody else may.
        gone: set when its lease has run out.
        asked_at: monotonic seconds at which it was asked what it has not answered; else None.
    """

    member: Member
    channel: grpc.aio.Channel
    stub: pb_grpc.RolloutAsyncStub
    num_workers: int
    policy_version: int | None = None
    groups: list[BroadcastGroup] = field(default_factory=list)
    epoch: int = 0
    num_failures: int = 0
    rests_until: float = 0.0
    slow_until: float = 0.0
    is_taken: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    asked_at: float | None = None

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.member.name

    @property
    def is_resting(self) -> bool:
        """Whether it failed so lately that to ask again would be in vain."""
        return time.monotonic() < self.rests_until

    @property
    def is_slow(self) -> bool:
        """Whether it was too slow for a broadcast lately."""
        return time.monotonic() < self.slow_until

    def confirm(self, policy_version: int) -> None:
        """It serves this version, with the learner's own weights."""
        self.policy_version = policy_version
        self.num_failures, self.rests_until = 0, 0.0

    def leave_groups(self) -> None:
        """Close the learner's ends; the peer must join again before the next transfer."""
        for group in self.groups:
            group.close()
        self.groups.clear()

    async def ask(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Any,
        *,
        timeout_seconds: float,
    ) -> Response:
        """One call; it ends with the deadline, or with the peer's lease.

        Raises:
            PeerError: it failed, or the peer is gone.
        """
        asking = asyncio.ensure_future(
            call(method, request, peer=self.name, timeout_seconds=timeout_seconds)
        )
        leaving = asyncio.ensure_future(self.gone.wait())
        self.asked_at = time.monotonic()
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            # Closing a channel cancels its calls: that is not a cancellation of ours.
            if asking.done() and not asking.cancelled():
                return asking.result()
            raise PeerError(f"{self.name}: its lease ran out meanwhile", status=GONE)
        finally:
            self.asked_at = None
            asking.cancel()
            leaving.cancel()

    async def ask_status(self, *, timeout_seconds: float) -> pb.GetRolloutStatusResponse:
        """What the peer says of itself, soon or not at all."""
        return await self.ask(
            self.stub.GetStatus,
            pb.GetRolloutStatusRequest(),
            timeout_seconds=min(PROBE_SECONDS, timeout_seconds),
        )


def rest_seconds(num_failures: int) -> float:
    """How long to leave one in peace that failed so often in a row."""
    # For one that failed for hours 2 ** num_failures is no float any more.
    return min(2.0 ** min(num_failures - 1, 10), MAX_REST_SECONDS)


@contextmanager
def taking(peers: Iterable[Peer]) -> Iterator[list[Peer]]:
    """Those of the peers that nobody else brings a version to, until the end of the context."""
    taken = [peer for peer in peers if not peer.is_taken]
    for peer in taken:
        peer.is_taken = True
    try:
        yield taken
    finally:
        for peer in taken:
            peer.is_taken = False


async def ask_each(calls: Mapping[Peer, Awaitable[object]]) -> dict[Peer, PeerError]:
    """Wait for one call to each peer, all at once; returns those that failed, and why."""
    results = await asyncio.gather(*calls.values(), return_exceptions=True)
    failed = {}
    for peer, result in zip(calls, results, strict=True):
        if isinstance(result, PeerError):
            failed[peer] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


def left_behind(failed: Mapping[Peer, PeerError], *, doing: str) -> None:
    """These serve nothing the learner vouches for, until a refit succeeds."""
    results = {"DEADLINE_EXCEEDED": "timeout", SLOW: "timeout", CANARY: "canary"}
    for peer, error in failed.items():
        WEIGHT_SYNC_OPERATIONS.labels(result=results.get(error.status, "error")).inc()
        logger.warning("left %s behind while %s: %s", peer.name, doing, error)
        peer.policy_version = None
        if error.status == SLOW:
            peer.slow_until = time.monotonic() + SLOW_SECONDS
        peer.num_failures += 1
        peer.rests_until = time.monotonic() + rest_seconds(peer.num_failures)
        peer.leave_groups()
