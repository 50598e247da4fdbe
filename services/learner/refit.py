"""One replica's refit, whichever way the weights come: begin, commit, judge, serve.

The two ways are a broadcast (`services.learner.publisher`) and a stream of the learner's copy
(`services.learner.catch_up`). A replica serves only after the checksum of what it received and the
log-probs of the canary under what it loaded were seen to be the learner's.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

from protos import rollout_pb2 as pb
from services.learner.peer import CANARY, Peer
from shared.buckets import Manifest, StagedWeights
from shared.codec import pack_token_ids, unpack_logprobs
from shared.errors import PeerError
from shared.metrics.weights import WEIGHT_SYNC_OPERATIONS
from shared.weight_stream import WeightSource


@dataclass(slots=True)
class Version:
    """The weights that the learner stands behind.

    Attributes:
        checksum: of the packed bytes; other bytes are not swapped in.
        canary_logprobs: the learner's own.
        staged: the copy that late replicas fetch; None if none is kept.
        num_readers: of the copy, now; its memory is another version's only after the last.
    """

    policy_version: int
    manifest: Manifest
    checksum: int
    canary_logprobs: list[float]
    staged: StagedWeights | None
    num_readers: int = 0


class Refitter:
    """The calls of a refit."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        timeout_seconds: float,
        min_bytes_per_second: float,
        canary_token_ids: array[int],
        canary_tolerance: float,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self.timeout_seconds = timeout_seconds
        self._min_bytes_per_second = min_bytes_per_second
        self.canary_token_ids = canary_token_ids
        self._canary_tolerance = canary_tolerance

    def wire_seconds(self, manifest: Manifest, *, num_copies: int) -> float:
        """How long the bytes of so many copies may travel, one network for all."""
        num_bytes = sum(spec.num_bytes for spec in manifest)
        return num_copies * num_bytes / self._min_bytes_per_second

    async def begin(
        self,
        peer: Peer,
        policy_version: int,
        manifest: Manifest,
        *,
        source: WeightSource | None = None,
    ) -> None:
        """Have the peer receive, in its group or else from the source.

        Raises:
            PeerError: it does not.
        """
        request = pb.BeginUpdateRequest(
            epoch=peer.epoch,
            policy_version=policy_version,
            manifest=[
                pb.ParameterSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape)
                for spec in manifest
            ],
            bucket_bytes=self.bucket_bytes,
            is_left_behind=source is not None and peer.policy_version is None,
        )
        if source is not None:
            request.source.address = source.address
            request.source.ticket = source.ticket
            request.source.timeout_seconds = source.timeout_seconds
        # In a group, those that have begun wait for the first bucket until all have.
        share = 0.5 if source is None else 1.0
        await peer.ask(peer.stub.BeginUpdate, request, timeout_seconds=share * self.timeout_seconds)

    async def commit(self, peer: Peer, version: Version, *, wait_seconds: float) -> float:
        """Have the peer swap the version in and serve it; returns how long it paused.

        Args:
            wait_seconds: how long the peer may wait for the weights to arrive.
        Raises:
            PeerError: it does not serve the version.
        """
        request = pb.CommitUpdateRequest(
            policy_version=version.policy_version,
            checksum=version.checksum,
            canary_token_ids=pack_token_ids(self.canary_token_ids),
            timeout_seconds=wait_seconds,
        )
        answer = await peer.ask(
            peer.stub.CommitUpdate, request, timeout_seconds=wait_seconds + self.timeout_seconds
        )
        await self._judge(peer, version, unpack_logprobs(answer.canary_logprobs))
        await peer.ask(
            peer.stub.Serve,
            pb.ServeRequest(policy_version=version.policy_version),
            timeout_seconds=self.timeout_seconds,
        )
        peer.confirm(version.policy_version)
        WEIGHT_SYNC_OPERATIONS.labels(result="ok").inc()
        return answer.pause_seconds

    async def _judge(self, peer: Peer, version: Version, theirs: array[float]) -> None:
        """Compare canaries; on a mismatch the replica must not serve.

        Raises:
            PeerError: they differ by more than the tolerance.
        """
        ours = version.canary_logprobs
        differences = [abs(a - b) for a, b in zip(theirs, ours, strict=False)]
        if len(theirs) == len(ours) and all(
            difference <= self._canary_tolerance for difference in differences
        ):
            return
        mismatch = PeerError(
            f"{peer.name}: {len(theirs)} of {len(ours)} canary log-probs, and they differ by"
            f" {max(differences, default=math.inf):.3g} nats; weights.canary_tolerance ="
            f" {self._canary_tolerance}",
            status=CANARY,
        )
        request = pb.AbortUpdateRequest(policy_version=version.policy_version)
        try:
            await peer.ask(peer.stub.AbortUpdate, request, timeout_seconds=self.timeout_seconds)
        except PeerError as error:
            # Nobody has told it to serve, so it does not; the canary is still why.
            raise mismatch from error
        raise mismatch
