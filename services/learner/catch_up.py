"""Brings replicas that came late, or were left behind, to the published version by a stream.

Beside the loop, and without the engine: what is streamed is the copy that the last publication
left, so a replica is brought up while the learner trains. The groups are not touched. A replica is
either here or in a publication, never in both (`Peer.is_taken`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from protos import rollout_pb2 as pb
from services.learner.peer import Peer, left_behind
from services.learner.publisher import Publisher
from services.learner.refit import Version
from shared.errors import PeerError, StreamError
from shared.metrics.weights import WEIGHT_SYNC_BYTES, WEIGHT_SYNC_STREAMS
from shared.weight_stream import WeightSource, weight_chunks

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at who is behind."""

MAX_STREAMS = 4
"""Replicas that are brought up at a time: they share the learner's network and event loop."""

STREAM_TIMEOUTS = 5
"""A stream may take this many times `weights.timeout_seconds`, besides what its bytes need at
`weights.min_mib_per_second` if MAX_STREAMS share the way: nobody waits for it, and a replica that
dies meanwhile is noticed by its lease."""

MAX_STREAM_SECONDS = 86_400.0
"""Replicas refuse to wait for longer."""


class CatchUp:
    """Follows the leases, and brings up whoever does not serve the published version."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._fleet = publisher.fleet
        self._refitter = publisher.refitter
        self._address = ""
        self._offers: dict[str, Version] = {}
        self._streams: set[asyncio.Task[None]] = set()
        self._seen: Version | None = None
        self._is_settled = False

    @asynccontextmanager
    async def running(self, address: str) -> AsyncIterator[asyncio.Task[None]]:
        """At work in the background; the task given ends by an error only.

        Args:
            address: where replicas reach the learner's gRPC server.
        """
        self._address = address
        following = asyncio.create_task(self._follow(), name="catch-up")
        try:
            yield following
        finally:
            self._address = ""
            tasks = [following, *self._streams]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def chunks(self, ticket: str) -> AsyncIterator[bytes]:
        """The bytes of the version that this ticket is for, until the replica needs it no more.

        Raises:
            KeyError: the ticket is not good.
        """
        staged = self._offers[ticket].staged
        assert staged is not None
        for chunk in weight_chunks(staged):
            # Checked each time: without the offer the memory may become another version's.
            if ticket not in self._offers:
                raise KeyError(ticket)
            yield chunk
            WEIGHT_SYNC_BYTES.inc(len(chunk))

    async def _follow(self) -> None:
        """Consumes leases. Waits LOOK_SECONDS between looks. Stops when cancelled."""
        while True:
            try:
                await self._fleet.meet()
                self._look()
                self._start_streams()
            except StreamError as error:
                logger.warning("cannot see who is there: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """See whether the version is still the one of the last look."""
        version = self._publisher.version
        self._is_settled = version is not None and version is self._seen
        self._seen = version

    def _start_streams(self) -> None:
        """As many as may be."""
        version = self._publisher.version
        if version is None or version.staged is None or not self._address:
            return
        for peer in self._fleet.peers:
            if len(self._streams) >= MAX_STREAMS:
                return
            # Who serves an older version is the next publication's, unless that is long in coming.
            is_due = peer.policy_version is None or self._is_settled
            is_free = not (peer.is_taken or peer.is_resting)
            if peer.policy_version != version.policy_version and is_due and is_free:
                self._start(peer, version)

    def _start(self, peer: Peer, version: Version) -> None:
        peer.is_taken = True
        # Now, not when the stream begins: the next publication takes memory that nobody reads.
        offer = ExitStack()
        ticket = offer.enter_context(self._offering(version))
        stream = asyncio.create_task(
            self._bring_up(peer, version, ticket), name=f"stream to {peer.name}"
        )
        self._streams.add(stream)
        stream.add_done_callback(lambda done: self._end(peer, done, offer))

    def _end(self, peer: Peer, stream: asyncio.Task[None], offer: ExitStack) -> None:
        peer.is_taken = False
        offer.close()
        self._streams.discard(stream)
        if stream.cancelled():
            return
        error = stream.exception()
        if error is not None and not isinstance(error, PeerError):
            logger.error("bringing %s up failed", peer.name, exc_info=error)
            error = PeerError(repr(error))
        if error is not None:
            left_behind({peer: error}, doing="catching up")
        WEIGHT_SYNC_STREAMS.labels(result="ok" if error is None else "error").inc()
        self._start_streams()

    async def _bring_up(self, peer: Peer, version: Version, ticket: str) -> None:
        """Raises PeerError if the replica does not serve the version afterwards."""
        started, seconds = time.monotonic(), self._refitter.timeout_seconds
        status = await peer.ask_status(timeout_seconds=seconds)
        if _serves(status, version):
            peer.confirm(version.policy_version)
            logger.info("%s serves version %d already", peer.name, version.policy_version)
            return
        wire_seconds = self._refitter.wire_seconds(version.manifest, num_copies=MAX_STREAMS)
        stream_seconds = min(STREAM_TIMEOUTS * seconds + wire_seconds, MAX_STREAM_SECONDS)
        source = WeightSource(self._address, ticket, stream_seconds)
        await self._refitter.begin(peer, version.policy_version, version.manifest, source=source)
        await self._refitter.commit(peer, version, wait_seconds=stream_seconds)
        logger.info(
            "brought %s up to version %d in %.2f s",
            peer.name,
            version.policy_version,
            time.monotonic() - started,
        )
        if self._publisher.version is version:
            try:
                await self._publisher.announce(version.policy_version)
            except StreamError as error:
                logger.warning("version %d not announced: %s", version.policy_version, error)

    @contextmanager
    def _offering(self, version: Version) -> Iterator[str]:
        """A ticket for the version's copy, good until the end of the context."""
        ticket = secrets.token_hex(16)
        self._offers[ticket] = version
        version.num_readers += 1
        try:
            yield ticket
        finally:
            version.num_readers -= 1
            del self._offers[ticket]


def _serves(status: pb.GetRolloutStatusResponse, version: Version) -> bool:
    """True for one that was lost sight of only: the same bytes were confirmed before."""
    return (
        status.state == pb.REPLICA_STATE_SERVING
        and status.policy_version == version.policy_version
        and status.checksum == version.checksum
    )
