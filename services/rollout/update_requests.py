"""What a request for an update must hold before the engine hears of it.

The engine reserves memory for what a manifest announces, and waits for as long as it is told to.
"""

from __future__ import annotations

from array import array

from protos import rollout_pb2 as pb
from shared.broadcast import GroupSpec
from shared.buckets import Manifest, ParameterSpec, plan_buckets
from shared.codec import unpack_token_ids
from shared.weight_stream import WeightSource

MAX_TIMEOUT_SECONDS = 86_400.0
"""Of whatever a request bounds by itself."""


def read_group(request: pb.JoinBroadcastRequest) -> GroupSpec:
    """The group to join.

    Raises:
        ValueError: names the value that is out of its range.
    """
    if not 0 < request.store_port < 2**16:
        raise ValueError(f"store_port = {request.store_port}: need 1 to {2**16 - 1}")
    return GroupSpec(
        epoch=request.epoch,
        backend=request.backend,  # type: ignore[arg-type]
        store_host=request.store_host,
        store_port=request.store_port,
        key=request.key,
        rank=request.rank,
        world_size=request.world_size,
        timeout_seconds=checked_timeout(request.timeout_seconds),
    )


def read_manifest(request: pb.BeginUpdateRequest, *, max_bytes: int) -> Manifest:
    """The manifest of the version that is to come.

    Raises:
        ValueError: no version or bucket size, a dtype that is none, a name twice, or more than
            `max_bytes`.
    """
    if request.policy_version < 0:
        raise ValueError(f"policy_version = {request.policy_version}: versions count from 0")
    manifest = tuple(
        ParameterSpec(each.name, each.dtype, tuple(each.shape)) for each in request.manifest
    )
    buckets = plan_buckets(manifest, bucket_bytes=request.bucket_bytes)
    num_bytes = sum(bucket.num_bytes for bucket in buckets)
    if num_bytes > max_bytes:
        raise ValueError(
            f"the manifest announces {num_bytes} bytes, more than the {max_bytes} that an update of"
            " this model may have; is it of another model?"
        )
    return manifest


def read_source(
    request: pb.BeginUpdateRequest, *, tls_folder: str | None = None
) -> WeightSource | None:
    """Where to fetch the version; None if it comes in the group.

    Args:
        tls_folder: the replica's own credentials.
    Raises:
        ValueError: the timeout is out of its range.
    """
    if not request.HasField("source"):
        return None
    source = request.source
    seconds = checked_timeout(source.timeout_seconds)
    return WeightSource(source.address, source.ticket, seconds, tls_folder)


def read_canary(request: pb.CommitUpdateRequest, *, max_length: int) -> array[int]:
    """The canary's token ids.

    Raises:
        StreamError: they are no token ids.
        ValueError: none, or more than the model takes; or the timeout is out of its range.
    """
    checked_timeout(request.timeout_seconds)
    canary = unpack_token_ids(request.canary_token_ids)
    if not 0 < len(canary) < max_length:
        raise ValueError(f"a canary of {len(canary)} tokens: need 1 to {max_length - 1}")
    return canary


def checked_timeout(seconds: float) -> float:
    """`seconds`; ValueError if that is no time which ends."""
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:  # also refuses nan
        raise ValueError(
            f"timeout_seconds = {seconds}: need above 0, and at most {MAX_TIMEOUT_SECONDS:.0f}"
        )
    return seconds
