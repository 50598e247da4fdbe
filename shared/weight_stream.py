"""A version's way to one replica outside of the broadcast groups: a stream of the learner's copy.

    learner: StagedWeights ──chunks──▶ gRPC server stream ──▶ replica's worker: StagedWeights

What travels are the bytes that a broadcast would have carried, in the same order, with the same
checksum; so nothing behind the transfer differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc as pb_grpc
from shared.buckets import Bucket, Manifest, StagedWeights, add_checksums
from shared.errors import BroadcastError, StartError
from shared.roles import LEARNER, peer_options
from shared.tls import read_material
from shared.weight_transfer import Received

CHUNK_BYTES = 1 << 20
"""Of one message: large enough that calls cost little, small enough to leave the learner's event
loop free in between."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where a replica may fetch a version; the fields are those of the message in rollout.proto.

    Attributes:
        tls_folder: the replica's own credentials, for whichever of its processes fetches; None is
            plain text.
    """

    address: str
    ticket: str
    timeout_seconds: float
    tls_folder: str | None = None


def weight_chunks(staged: StagedWeights) -> Iterator[bytes]:
    """The bytes of all buckets, in order."""
    for bucket in staged.buckets:
        view = staged.data(bucket).numpy().data
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])


def fetch_weights(
    source: WeightSource,
    manifest: Manifest,
    *,
    bucket_bytes: int,
    staged: StagedWeights | None = None,
) -> Received:
    """Fetch a version from the learner's copy; blocks.

    Args:
        staged: memory to receive into, of this manifest and bucket size; newly allocated if not
            given.
    Raises:
        BroadcastError: the learner is away or silent, or the stream is not of this manifest.
    """
    started = time.monotonic()
    staged = staged or StagedWeights(manifest, bucket_bytes=bucket_bytes)
    staged.clear()
    parts: list[int] = []
    with _open_channel(source) as channel:
        messages = pb_grpc.LearnerStub(channel).FetchWeights(
            pb.FetchWeightsRequest(ticket=source.ticket), timeout=source.timeout_seconds
        )
        chunks = _Bytes(message.data for message in messages)
        try:
            for bucket in staged.buckets:
                data = staged.data(bucket)
                chunks.fill(data, bucket)
                parts.append(staged.accept(bucket, data))
            chunks.expect_end()
        except grpc.RpcError as error:
            raise BroadcastError(
                f"fetching weights from {source.address}: {error.code().name}: {error.details()}",
                status=error.code().name,
            ) from error
    return Received(staged.tensors(), add_checksums(parts), time.monotonic() - started)


def _open_channel(source: WeightSource) -> grpc.Channel:
    """Raises BroadcastError if the credentials do not hold together."""
    if source.tls_folder is None:
        return grpc.insecure_channel(source.address)
    try:
        material = read_material(Path(source.tls_folder))
    except StartError as error:
        raise BroadcastError(f"fetching weights from {source.address}: {error}") from None
    return grpc.secure_channel(
        source.address, material.channel_credentials(), options=peer_options(LEARNER)
    )


class _Bytes:
    """A stream of chunks, read in other portions than it came in."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def fill(self, data: torch.Tensor, bucket: Bucket) -> None:
        """Read the bucket's bytes into `data`.

        Raises:
            BroadcastError: the stream ended before.
        """
        view, filled = data.numpy().data, 0
        while filled < len(view):
            if not self._rest:
                chunk = next(self._chunks, b"")
                if not chunk:
                    raise BroadcastError(f"the stream ended in the bucket at {bucket.start}")
                self._rest = memoryview(chunk)
            count = min(len(self._rest), len(view) - filled)
            view[filled : filled + count] = self._rest[:count]
            self._rest = self._rest[count:]
            filled += count

    def expect_end(self) -> None:
        """Raises BroadcastError if anything is left."""
        if self._rest or next(self._chunks, b"") != b"":
            raise BroadcastError("the stream of weights is longer than its manifest says")
