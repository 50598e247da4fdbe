"""The groups in which the learner sends weights to the replicas' workers.

What travels in them is `shared.weight_transfer`'s. A group is a stateless `ProcessGroupGloo`
(CPU) or `ProcessGroupNCCL` (GPU): there is no default process group, and a new group, with its
own key in the store, costs tens of milliseconds. Rank 0 is always the learner.

Layout of the groups: with gloo one group of two per worker of each replica, because a killed
peer is noticed at once only in a group of two; with NCCL one group of all. `GroupSpec.for_worker`
is that rule, for both sides.

Invariant: every wait here ends at a deadline with `BroadcastError`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import cycle
from typing import Any, Literal

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
    Work,
)

from shared.errors import BroadcastError

# How often a wait looks whether its group was closed meanwhile; completion itself wakes it at once.
_CLOSE_POLL = timedelta(milliseconds=50)
_NCCL_POLL_SECONDS = 0.001

# A device of gloo is a thread that moves the bytes of its groups, and wakes a hundred times a
# second for nothing: one for each of 200 groups takes a tenth of a core from a learner at rest.
_NUM_DEVICES = 8
_device_numbers = cycle(range(_NUM_DEVICES))
_opening_device = threading.Lock()


SLOW = "SLOW"
"""`BroadcastError.status` of a peer that is given up though it gets on."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What one member must know to join a broadcast group.

    Attributes:
        epoch: membership epoch, for messages; the key must differ between epochs.
        store_host: where the learner's store listens.
        key: prefix in the store, the same for all members of one group, never used again.
        rank: 0 is the learner.
        timeout_seconds: bounds the rendezvous, and each broadcast afterwards.
    """

    epoch: int
    backend: Literal["gloo", "nccl"]
    store_host: str
    store_port: int
    key: str
    rank: int
    world_size: int
    timeout_seconds: float

    def __post_init__(self) -> None:
        if self.backend not in ("gloo", "nccl"):
            raise ValueError(f"backend must be gloo or nccl, not {self.backend!r}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a group of {self.world_size}")
        if not self.timeout_seconds > 0:  # nan included
            raise ValueError(f"timeout_seconds must be positive, not {self.timeout_seconds}")

    def for_worker(self, worker: int) -> GroupSpec:
        """The spec of a replica's worker number `worker`, from the replica's spec.

        gloo: a pair with the learner under a key of its own; the learner opens the same spec
        with its rank 0. NCCL: one group, in which a replica's workers have consecutive ranks.
        """
        if self.backend == "gloo":
            return replace(self, key=f"{self.key}/{worker}")
        return replace(self, rank=self.rank + worker)


def open_store(host: str, *, port: int = 0, timeout_seconds: float = 30.0) -> TCPStore:
    """Start the learner's store; `port=0` takes a free one, to be read from `.port`.

    `host` is the address that is told to the replicas; the store listens on all interfaces.
    """
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


def open_group(spec: GroupSpec, store: TCPStore | None = None) -> BroadcastGroup:
    """Join the group; returns when every member did.

    Args:
        store: the learner's own, from `open_store`; without it, connect to `spec.store_host`.
    Raises:
        BroadcastError: some member did not join within the deadline.
    """
    open_backend = _open_gloo if spec.backend == "gloo" else _open_nccl
    try:
        process_group = open_backend(PrefixStore(spec.key, _connect(spec, store)), spec)
    # DistStoreError and DistNetworkError are RuntimeErrors; a name that does not resolve is none.
    except (RuntimeError, OSError) as error:
        raise BroadcastError(
            f"epoch {spec.epoch}: rank {spec.rank} of {spec.world_size} could not join "
            f"group {spec.key!r} at {spec.store_host}:{spec.store_port} "
            f"within {spec.timeout_seconds} s: {error}"
        ) from error
    return BroadcastGroup(spec, process_group)


def _connect(spec: GroupSpec, store: TCPStore | None) -> TCPStore:
    """A connection of the group's own: a wait holds a connection, and its deadline is one's own."""
    timeout = timedelta(seconds=spec.timeout_seconds)
    return TCPStore(
        spec.store_host if store is None else "localhost",
        spec.store_port if store is None else store.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )


def _open_gloo(store: PrefixStore, spec: GroupSpec) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # Left alone, gloo listens on whatever the host name resolves to, which may be 127.0.1.1.
    address = _local_address(spec.store_host, spec.store_port)
    options._devices = [_next_device(address)]
    options._timeout = timedelta(seconds=spec.timeout_seconds)
    options._threads = 1
    return ProcessGroupGloo(store, spec.rank, spec.world_size, options)


def _next_device(address: str) -> Any:
    """The device of a new group, one of a few in turn."""
    with _opening_device:
        return _device(address, next(_device_numbers))


@cache
def _device(address: str, number: int) -> Any:
    return ProcessGroupGloo.create_device(hostname=address)


def _open_nccl(store: PrefixStore, spec: GroupSpec) -> Any:
    from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

    options = ProcessGroupNCCL.Options()
    # NCCL's own watchdog ends the process when this passes; our wait must always come first.
    options._timeout = timedelta(seconds=10 * spec.timeout_seconds)
    return ProcessGroupNCCL(store, spec.rank, spec.world_size, options)


def _local_address(host: str, port: int) -> str:
    """The address of the interface that leads to `host`; sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


class BroadcastGroup:
    """One member's end of a group. `close` may be called from any thread, and more than once."""

    def __init__(self, spec: GroupSpec, process_group: Any) -> None:
        self.spec = spec
        self._process_group = process_group
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"BroadcastGroup({self.spec.key!r}, epoch {self.spec.epoch})"

    @property
    def device(self) -> torch.device:
        """Where a tensor must be to be broadcast in this group."""
        if self.spec.backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send `tensor` (rank 0) or receive into it (others), and wait until that is done.

        Raises:
            BroadcastError: a peer is gone, the deadline passed, or the group was closed. The
                group is of no use afterwards.
        """
        self.finish(self.begin(tensor))

    def begin(self, tensor: torch.Tensor) -> Work:
        """Start a broadcast; `tensor` belongs to it until `finish` returns or raises."""
        process_group = self._process_group
        if process_group is None:
            raise self._error("the group is closed")
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.spec.timeout_seconds)
        try:
            work: Work = process_group.broadcast([tensor], options)
        except RuntimeError as error:
            raise self._error(f"broadcast refused: {error}") from error
        return work

    def finish(self, work: Work) -> None:
        """Wait for a broadcast that `begin` started."""
        deadline = time.monotonic() + self.spec.timeout_seconds
        while not self.is_done(work):
            if time.monotonic() > deadline:
                raise self.silent()

    def is_done(self, work: Work) -> bool:
        """Wait for a moment; True if the broadcast succeeded.

        Raises:
            BroadcastError: it failed, or the group was closed.
        """
        if not self._is_over(work):
            if self._process_group is None:
                raise self._error("closed during a broadcast")
            return False
        try:
            return bool(work.wait())
        except RuntimeError as error:
            raise self._error(f"a peer is gone: {error}") from error

    def _is_over(self, work: Work) -> bool:
        """Wait for a moment; True if the broadcast succeeded or failed."""
        if self.spec.backend == "nccl":  # NCCL's `wait` only orders streams
            time.sleep(_NCCL_POLL_SECONDS)
        else:
            with contextlib.suppress(RuntimeError):  # the moment has passed, or it failed
                work.wait(_CLOSE_POLL)
        return work.is_completed()

    def close(self) -> None:
        """Leave the group: peers in a broadcast fail at once, and so does a wait of our own."""
        with self._lock:
            process_group, self._process_group = self._process_group, None
        if process_group is None:
            return
        # Freeing gloo's group waits for a broadcast that is still under way, and aborting NCCL's
        # may wait for a kernel: not in the caller's thread. Not a daemon thread either, which
        # would abort the process if the interpreter ended before it.
        holder = [process_group]
        del process_group
        threading.Thread(
            target=_release, args=(holder, self.spec.backend), name="close-group"
        ).start()

    def silent(self) -> BroadcastError:
        """What there is to raise of a peer that took longer than the timeout for a bucket."""
        reason = f"a peer was silent for {self.spec.timeout_seconds:g} s"
        return self._error(reason, status="DEADLINE_EXCEEDED")

    def slow(self, reason: str) -> BroadcastError:
        """What there is to raise of a peer that gets on, but not fast enough."""
        return self._error(f"a slow peer: {reason}", status=SLOW)

    def _error(self, reason: str, *, status: str = "") -> BroadcastError:
        return BroadcastError(
            f"epoch {self.spec.epoch}, group {self.spec.key!r}, "
            f"rank {self.spec.rank} of {self.spec.world_size}: {reason}",
            status=status,
        )


def _release(holder: list[Any], backend: str) -> None:
    if backend == "nccl":
        holder[0].abort()
    holder.clear()
