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
import math
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


@dataclass(slots=True)
class _OnItsWay:
    """A bucket that was begun, monotonic seconds; `works` has the groups that want it still."""

    begun_at: float
    works: dict[BroadcastGroup, Work] = field(default_factory=dict)


class _Sending:
    """Buckets on their way to several groups; a group that fails is closed and gets no more.

    One that is slow fails too: the groups go in step, so it would hold up all of them. Only time in
    which nothing is left to do but wait counts, not that in which the next bucket is made.
    """

    def __init__(self, groups: Sequence[BroadcastGroup], *, limit_seconds: float) -> None:
        self.failed: dict[BroadcastGroup, BroadcastError] = {}
        self._groups = groups
        self._limit_seconds = limit_seconds
        self._waited_seconds = 0.0
        self._behind_seconds = dict.fromkeys(groups, 0.0)
        self._under_way: deque[_OnItsWay] = deque()

    def begin(self, data: torch.Tensor) -> None:
        """Start to send a bucket to all groups; `data` must not change until it has settled."""
        bucket = _OnItsWay(time.monotonic())
        for group in self._groups:
            with self._failing(group, bucket):
                bucket.works[group] = group.begin(data)
        self._under_way.append(bucket)

    def settle(self, *, at_most: int) -> None:
        """Wait, oldest first, until at most so many buckets are under way."""
        while len(self._under_way) > at_most:
            started, bucket = time.monotonic(), self._under_way.popleft()
            self._wait_for(bucket, started)
            self._waited_seconds += time.monotonic() - started

    def _wait_for(self, bucket: _OnItsWay, started: float) -> None:
        """Until every group has it or has failed."""
        most_at: float | None = None
        while bucket.works:
            has_come = self._look(bucket)
            now, num_living = time.monotonic(), len(self._groups) - len(self.failed)
            if most_at is None and len(bucket.works) <= num_living // 2:
                most_at = now
            behind_seconds = 0.0 if most_at is None else now - most_at
            for group in has_come:
                self._behind_seconds[group] += behind_seconds
            for group in list(bucket.works):
                with self._failing(group, bucket):
                    self._check_pace(group, now - started, behind_seconds)

    def _look(self, bucket: _OnItsWay) -> list[BroadcastGroup]:
        """Wait for a moment; the groups that have it now, and are waited for no longer."""
        has_come = []
        for index, (group, work) in enumerate(list(bucket.works.items())):
            if index == 0 or work.is_completed():
                with self._failing(group, bucket):
                    if group.is_done(work):
                        del bucket.works[group]
                        has_come.append(group)
        return has_come

    def _check_pace(self, group: BroadcastGroup, seconds: float, behind_seconds: float) -> None:
        """Raises BroadcastError if a group is not to be waited for any longer.

        Args:
            seconds: it was waited for with this bucket.
            behind_seconds: of them, after half of the groups had it.
        """
        timeout_seconds = group.spec.timeout_seconds
        if seconds > timeout_seconds:
            raise group.silent()
        if self._behind_seconds[group] + behind_seconds > timeout_seconds:
            raise group.slow(f"most others waited for it for {timeout_seconds:g} s in all")
        if self._waited_seconds + seconds > self._limit_seconds:
            raise group.slow(
                f"not through after {self._limit_seconds:.1f} s; see"
                " weights.min_mib_per_second, timeout_seconds and republish_seconds"
            )

    @contextlib.contextmanager
    def _failing(self, group: BroadcastGroup, bucket: _OnItsWay) -> Iterator[None]:
        try:
            yield
        except BroadcastError as error:
            seconds = time.monotonic() - bucket.begun_at
            # gloo's own deadline may pass first, and reads like a peer that is gone.
            if not error.status and seconds >= group.spec.timeout_seconds:
                error = group.silent()
            self.failed.setdefault(group, error)
            bucket.works.pop(group, None)
            group.close()


def send_weights(
    groups: Sequence[BroadcastGroup],
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    manifest: Manifest,
    *,
    bucket_bytes: int,
    device: torch.device | str = "cpu",
    limit_seconds: float = math.inf,
    staged: StagedWeights | None = None,
) -> SendReport:
    """Pack each bucket once and send it to every group that has not failed.

    While a bucket travels, the next is packed and queued behind it. A group that fails is closed
    and reported; the others get everything. `named_tensors` is always consumed to its end, even
    with no group left: producing it may be a collective among the learner's ranks.

    A group fails that takes longer than its timeout for a bucket, or that is, over all buckets,
    longer than its timeout behind most of the others.

    Args:
        device: where the groups want their tensors.
        limit_seconds: of waiting, in all; who has not everything by then fails.
        staged: keeps what is sent, for who comes later; of this manifest and bucket size.
    """
    started = time.monotonic()
    buckets = plan_buckets(manifest, bucket_bytes=bucket_bytes)
    if staged is not None:
        assert staged.buckets == buckets, "the copy is of another manifest or bucket size"
        staged.clear()
    places = _places(buckets, torch.device(device), staged)
    packed = pack_buckets(named_tensors, manifest, bucket_bytes=bucket_bytes, places=places)
    sending, parts = _Sending(groups, limit_seconds=limit_seconds), []
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
