"""Brings a policy version to every rollout replica, and never believes that it arrived.

A publication, for the replicas that do not serve the version yet:

    1. connect  replicas that are new join a broadcast group
    2. begin    each posts its receives; decoding goes on
    3. send     packed buckets, each packed once
    4. commit   each checks the checksum, swaps the weights in, scores the canary
    5. serve    those whose canary matches the learner's log-probs are told to serve

Whoever fails or is silent past a deadline is named, counted and left behind: it is STALE, and the
next publication tries it again. The version is announced once every other one serves it.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from protos import rollout_pb2 as pb
from services.learner.fleet import CANARY, Fleet, Peer, each, left_behind
from shared.broadcast import SendReport, send_weights
from shared.buckets import Manifest
from shared.codec import pack_token_ids, unpack_logprobs
from shared.errors import PeerError
from shared.lease import Registry
from shared.metrics import (
    LEARNER_VERSION,
    WEIGHT_SYNC_BYTES,
    WEIGHT_SYNC_LAST_SUCCESS,
    WEIGHT_SYNC_OPERATIONS,
    WEIGHT_SYNC_PAUSE,
    WEIGHT_SYNC_SECONDS,
)
from shared.rpc import call

logger = logging.getLogger(__name__)

OnEngine = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on the engine's thread, the only one that may touch the model."""


class WeightSource(Protocol):
    """What the publisher needs of the learner's engine."""

    def manifest(self) -> Manifest: ...

    def weights(self) -> Iterator[tuple[str, Any]]: ...

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Publication:
    """What one publication did and cost; `pause_seconds` is the longest of any replica."""

    policy_version: int
    served: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float
    pause_seconds: float


class Publisher:
    """The learner's only way to the replicas."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        registry: Registry,
        engine: WeightSource,
        on_engine: OnEngine,
        bucket_bytes: int,
        timeout_seconds: float,
        canary_token_ids: array[int],
        canary_tolerance: float,
    ) -> None:
        self._fleet = fleet
        self._registry = registry
        self._engine = engine
        self._on_engine = on_engine
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._canary_token_ids = canary_token_ids
        self._canary_tolerance = canary_tolerance
        self._manifest: Manifest = ()

    @property
    def replicas(self) -> dict[str, str]:
        """What the learner believes of each replica, for people."""
        return {
            peer.name: "stale" if peer.policy_version is None else f"serves {peer.policy_version}"
            for peer in self._fleet.peers
        }

    async def publish(self, policy_version: int) -> Publication:
        """Bring every replica to `policy_version`; those that cannot be are left behind."""
        started = time.monotonic()
        await self._fleet.meet()
        targets = [peer for peer in self._fleet.peers if peer.policy_version != policy_version]
        begun = await self._begin(await self._fleet.connect(targets), policy_version)
        pauses: dict[Peer, float] = {}
        if begun:
            sent, report, canary = await self._send(begun)
            pauses = await self._commit(sent, policy_version, report.checksum, canary)
        if any(peer.policy_version == policy_version for peer in self._fleet.peers):
            await self._announce(policy_version)
        return Publication(
            policy_version,
            served=tuple(peer.name for peer in targets if peer in pauses),
            failed=tuple(peer.name for peer in targets if peer not in pauses),
            seconds=time.monotonic() - started,
            pause_seconds=max(pauses.values(), default=0.0),
        )

    async def is_reached(self, policy_version: int) -> bool:
        """True if every replica that holds a lease serves this version."""
        await self._fleet.meet()
        return all(peer.policy_version == policy_version for peer in self._fleet.peers)

    async def close(self) -> None:
        """Leave every group."""
        await self._fleet.close()

    async def _begin(self, peers: list[Peer], policy_version: int) -> list[Peer]:
        if not self._manifest:
            self._manifest = await self._on_engine(self._engine.manifest)
        specs = [
            pb.ParameterSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape)
            for spec in self._manifest
        ]

        async def begin(peer: Peer) -> None:
            request = pb.BeginUpdateRequest(
                epoch=peer.epoch,
                policy_version=policy_version,
                manifest=specs,
                bucket_bytes=self._bucket_bytes,
            )
            await self._call(peer, peer.stub.BeginUpdate, request)

        return await each({peer: begin(peer) for peer in peers}, doing="beginning an update")

    async def _send(self, peers: list[Peer]) -> tuple[list[Peer], SendReport, list[float]]:
        """Broadcast on the engine's thread; the canary is scored there too."""
        groups = list(dict.fromkeys(group for peer in peers for group in peer.groups))

        def send() -> tuple[SendReport, list[float]]:
            report = send_weights(
                groups, self._engine.weights(), self._manifest, bucket_bytes=self._bucket_bytes,
                device=groups[0].device,
            )  # fmt: skip
            return report, self._engine.score_tokens(self._canary_token_ids)

        report, canary = await self._on_engine(send)
        WEIGHT_SYNC_SECONDS.labels(phase="broadcast").observe(report.seconds)
        WEIGHT_SYNC_BYTES.inc(report.num_bytes * len(groups))
        for group, error in report.failed.items():
            left_behind(
                [peer for peer in peers if group in peer.groups], doing="receiving", error=error
            )
        return [peer for peer in peers if peer.groups], report, canary

    async def _commit(
        self, peers: list[Peer], policy_version: int, checksum: int, canary: list[float]
    ) -> dict[Peer, float]:
        """Returns the pause of each replica that serves the version now."""
        pauses: dict[Peer, float] = {}

        async def commit(peer: Peer) -> None:
            request = pb.CommitUpdateRequest(
                policy_version=policy_version,
                checksum=checksum,
                canary_token_ids=pack_token_ids(self._canary_token_ids),
                timeout_seconds=self._timeout_seconds,
            )
            answer = await self._call(peer, peer.stub.CommitUpdate, request)
            await self._judge(peer, policy_version, unpack_logprobs(answer.canary_logprobs), canary)
            await self._call(peer, peer.stub.Serve, pb.ServeRequest(policy_version=policy_version))
            peer.policy_version = policy_version
            pauses[peer] = answer.pause_seconds
            WEIGHT_SYNC_OPERATIONS.labels(result="ok").inc()
            WEIGHT_SYNC_PAUSE.inc(answer.pause_seconds)
            WEIGHT_SYNC_SECONDS.labels(phase="load").observe(answer.load_seconds)

        await each({peer: commit(peer) for peer in peers}, doing="committing an update")
        return pauses

    async def _judge(
        self, peer: Peer, policy_version: int, theirs: array[float], ours: list[float]
    ) -> None:
        """Compare canaries; on a mismatch the replica must not serve.

        Raises:
            PeerError: they differ by more than the tolerance.
        """
        differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
        if all(difference <= self._canary_tolerance for difference in differences):
            return
        request = pb.AbortUpdateRequest(policy_version=policy_version)
        await self._call(peer, peer.stub.AbortUpdate, request)
        raise PeerError(
            f"{peer.name}: canary log-probs differ by {max(differences):.3g} nats, more than"
            f" weights.canary_tolerance = {self._canary_tolerance}",
            status=CANARY,
        )

    async def _announce(self, policy_version: int) -> None:
        await self._registry.announce_version(policy_version)
        LEARNER_VERSION.set(policy_version)
        WEIGHT_SYNC_LAST_SUCCESS.set_to_current_time()

    async def _call(self, peer: Peer, method: Any, request: Any) -> Any:
        return await call(
            method, request, peer=peer.name, timeout_seconds=2 * self._timeout_seconds
        )
