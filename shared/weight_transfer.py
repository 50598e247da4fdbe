"""Moves the weights of one policy version from the learner to the replicas' workers.

What travels is packed by `shared.buckets`, the groups are `shared.broadcast`'s.

Two buckets are under way: while one is on the wire, the next is packed on the one side, and the
one before is checked on the other.

    sender     pack 0 │ check 0, pack 1 │ check 1, pack 2 │ ...
    wire              │ 0               │ 1               │ 2 ...
    receiver                            │ check 0         │ check 1 ...
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch.distributed import Work

from shared.broadcast import BroadcastGroup
from shared.buckets import (
    Bucket,
    Manifest,
    StagedWeights,
    add_checksums,
    allocate,
    checksum,
    pack_buckets,
    plan_buckets,
)
from shared.errors import BroadcastError

_BUCKETS_UNDER_WAY = 2
"""One on the wire, and one that is packed or checked meanwhile."""


@dataclass(frozen=True, slots=True)
class SendReport:
    """What `send_weights` did; `failed` holds the groups that did not get everything, and why."""

    num_bytes: int
    checksum: int
    seconds: float
    failed: dict[BroadcastGroup, BroadcastError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Received:
    """Tensors by parameter name, in CPU memory, in the manifest's order."""

    tensors: dict[str, torch.Tensor]
    checksum: int
    seconds: float


class _Sending:
    """Buckets on their way to several groups; a group that fails is closed and gets no more."""

    def __init__(self, groups: Sequence[BroadcastGroup]) -> None:
        self.failed: dict[BroadcastGroup, BroadcastError] = {}
        self._groups = groups
        self._under_way: deque[list[tuple[BroadcastGroup, Work]]] = deque()

    def begin(self, data: torch.Tensor) -> None:
        """Start to send a bucket to all groups; `data` must not change until it has settled."""
        works: list[tuple[BroadcastGroup, Work]] = []
        for group in self._groups:
            with self._failing(group):
                works.append((group, group.begin(data)))
        self._under_way.append(works)

    def settle(self, *, at_most: int) -> None:
        """Wait, oldest first, until at most so many buckets are under way."""
        while len(self._under_way) > at_most:
            for group, work in self._under_way.popleft():
                with self._failing(group):
                    group.finish(work)

    @contextlib.contextmanager
    def _failing(self, group: BroadcastGroup) -> Iterator[None]:
        try:
            yield
        except BroadcastError as error:
            self.failed.setdefault(group, error)
            group.close()


def send_weights(
    groups: Sequence[BroadcastGroup],
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    manifest: Manifest,
    *,
    bucket_bytes: int,
    device: torch.device | str = "cpu",
    staged: StagedWeights | None = None,
) -> SendReport:
    """Pack each bucket once and send it to every group that has not failed.

    While a bucket travels, the next is packed and queued behind it. A group that fails is closed
    and reported; the others get everything. `named_tensors` is always consumed to its end, even
    with no group left: producing it may be a collective among the learner's ranks.

    Args:
        device: where the groups want their tensors.
        staged: keeps what is sent, for who comes later; of this manifest and bucket size.
    """
    started = time.monotonic()
    buckets = plan_buckets(manifest, bucket_bytes=bucket_bytes)
    if staged is not None:
        assert staged.buckets == buckets, "the copy is of another manifest or bucket size"
        staged.clear()
    places = _places(buckets, torch.device(device), staged)
    packed = pack_buckets(named_tensors, manifest, bucket_bytes=bucket_bytes, places=places)
    sending, parts = _Sending(groups), []
    for bucket, data in packed:
        sending.begin(data)
        if staged is not None:
            parts.append(staged.accept(bucket, data))
        else:
            parts.append(checksum(data.cpu(), start=bucket.start))
        sending.settle(at_most=_BUCKETS_UNDER_WAY - 1)  # the next is packed in the freed place
    sending.settle(at_most=0)
    num_bytes = sum(bucket.num_bytes for bucket in buckets)
    seconds = time.monotonic() - started
    return SendReport(num_bytes, add_checksums(parts), seconds, sending.failed)


def receive_weights(
    group: BroadcastGroup,
    manifest: Manifest,
    *,
    bucket_bytes: int,
    staged: StagedWeights | None = None,
) -> Received:
    """Receive what `send_weights` sends; while a bucket is checked, the next arrives.

    Args:
        staged: memory to receive into, of this manifest and bucket size; newly allocated if not
            given. After a failure it must not be used again: the group may still write to it.
    Raises:
        BroadcastError: the transfer did not complete; nothing of it is kept.
    """
    started = time.monotonic()
    buckets = plan_buckets(manifest, bucket_bytes=bucket_bytes)
    staged = staged or StagedWeights(manifest, bucket_bytes=bucket_bytes)
    assert staged.buckets == buckets, "the memory is of another manifest or bucket size"
    staged.clear()
    places = _places(buckets, group.device, staged)
    begun = (
        (bucket, data, group.begin(data)) for bucket, data in zip(buckets, places, strict=True)
    )
    under_way = deque(islice(begun, _BUCKETS_UNDER_WAY))
    parts: list[int] = []
    while under_way:
        bucket, data, work = under_way.popleft()
        group.finish(work)
        parts.append(staged.accept(bucket, data))
        under_way.extend(islice(begun, 1))
    return Received(staged.tensors(), add_checksums(parts), time.monotonic() - started)


def _places(
    buckets: Sequence[Bucket], device: torch.device, staged: StagedWeights | None
) -> Iterator[torch.Tensor]:
    """Where each bucket travels: its place in `staged`, or, elsewhere, two places in turn."""
    if staged is not None and device.type == "cpu":
        yield from (staged.data(bucket) for bucket in buckets)
        return
    largest = max((bucket.num_bytes for bucket in buckets), default=0)
    places = cycle([allocate(largest, device) for _ in range(_BUCKETS_UNDER_WAY)])
    yield from (next(places)[: bucket.num_bytes] for bucket in buckets)
