"""Our transfer of weights and a plain broadcast of the same bytes, in turn; see `publish`."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

import torch
from torch.distributed import Work

from shared.broadcast import BroadcastGroup, GroupSpec, open_group, open_store
from shared.buckets import Manifest, ParameterSpec, StagedWeights, checksum, pack_buckets
from shared.weight_transfer import receive_weights, send_weights
from tests.bench.benchmark import Progressing, median_interval

DEADLINE_SECONDS = 60.0
LAYERS = 24

PLAIN, QUEUED, OURS = "plain", "plain, two under way", "ours"


class Case(NamedTuple):
    """What is sent to how many receivers."""

    mebibytes: int
    dtype: str
    bucket_mib: int
    receivers: int

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib << 20

    @property
    def manifest(self) -> Manifest:
        """A decoder of about this size: big matrices, and small vectors between them."""
        element = getattr(torch, self.dtype).itemsize
        width = int(((self.mebibytes << 20) / element / LAYERS / 12) ** 0.5)
        matrices = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        return tuple(
            ParameterSpec(f"layers.{layer}.{index}", self.dtype, shape)
            for layer in range(LAYERS)
            for index, shape in enumerate([*matrices, (width,), (width,)])
        )


class Cost(NamedTuple):
    """Of one transfer; CPU of all processes."""

    seconds: float
    cpu_seconds: float


class Row(NamedTuple):
    """A line of the table; GB/s are of one copy, also where it goes to two receivers."""

    mebibytes: int
    dtype: str
    bucket_mib: int
    receivers: int
    pairs: int
    plain_gb_per_second: float
    queued_gb_per_second: float
    ours_gb_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_to_queued: float
    plain_cpu_seconds: float
    ours_cpu_seconds: float


class Peers:
    """The processes that receive, each in a group of two with this one."""

    def __init__(self, manifest: Manifest, *, bucket_bytes: int, receivers: int) -> None:
        self._store = open_store("127.0.0.1")
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self.groups: list[BroadcastGroup] = []
        spawn = multiprocessing.get_context("spawn")
        for index in range(receivers):
            spec = GroupSpec(
                1, "gloo", "127.0.0.1", self._store.port, f"peer {index}", 1, 2, DEADLINE_SECONDS
            )
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=serve_peer, args=(spec, manifest, bucket_bytes, theirs), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
            self.groups.append(open_group(replace(spec, rank=0), self._store))

    def time(self, kind: str, send: Callable[[], object]) -> Cost:
        """One transfer, from when all receivers are ready to when all have everything."""
        for pipe in self._pipes:
            pipe.send(kind)
        self._answers()
        started, cpu = time.perf_counter(), time.process_time()
        send()
        theirs = sum(self._answers())
        return Cost(time.perf_counter() - started, time.process_time() - cpu + theirs)

    def _answers(self) -> list[float]:
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(DEADLINE_SECONDS):
                raise TimeoutError("a receiver is silent")
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        for group, pipe in zip(self.groups, self._pipes, strict=True):
            pipe.send(None)
            group.close()
        for process in self._processes:
            process.join(DEADLINE_SECONDS)


def serve_peer(spec: GroupSpec, manifest: Manifest, bucket_bytes: int, pipe: Connection) -> None:
    """A receiver's process: for each kind that comes, a zero, then its CPU seconds."""
    torch.set_num_threads(1)
    group = open_group(spec)
    staged = StagedWeights(manifest, bucket_bytes=bucket_bytes)
    sizes = [bucket.num_bytes for bucket in staged.buckets]
    memory = torch.zeros(max(sizes), dtype=torch.uint8)
    works: dict[str, Callable[[], object]] = {
        PLAIN: lambda: broadcast_plainly([group], memory, sizes, under_way=1),
        QUEUED: lambda: broadcast_plainly([group], memory, sizes, under_way=2),
        OURS: lambda: receive_weights(group, manifest, bucket_bytes=bucket_bytes, staged=staged),
    }
    while (kind := pipe.recv()) is not None:
        pipe.send(0.0)
        cpu = time.process_time()
        works[kind]()
        pipe.send(time.process_time() - cpu)
    group.close()


def broadcast_plainly(
    groups: Sequence[BroadcastGroup], memory: torch.Tensor, sizes: Sequence[int], *, under_way: int
) -> None:
    """Broadcast so many bytes after each other, from or to the same memory."""
    works: deque[list[tuple[BroadcastGroup, Work]]] = deque()
    for size in sizes:
        works.append([(group, group.begin(memory[:size])) for group in groups])
        while len(works) >= under_way:
            finish(works)
    while works:
        finish(works)


def finish(works: deque[list[tuple[BroadcastGroup, Work]]]) -> None:
    for group, work in works.popleft():
        group.finish(work)


def tensors_of(manifest: Manifest) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (spec.name, torch.randn(spec.shape, generator=generator).to(spec.torch_dtype))
        for spec in manifest
    ]


def measure(case: Case, pairs: int, progress: Progressing) -> Row:
    """Rounds of plain, ours, queued, ours, ...; the first round allocates and is not counted."""
    manifest, tensors = case.manifest, tensors_of(case.manifest)
    staged = StagedWeights(manifest, bucket_bytes=case.bucket_bytes)
    sizes = [bucket.num_bytes for bucket in staged.buckets]
    memory = torch.ones(max(sizes), dtype=torch.uint8)
    peers = Peers(manifest, bucket_bytes=case.bucket_bytes, receivers=case.receivers)
    groups = peers.groups

    def send() -> None:
        report = send_weights(
            groups, tensors, manifest, bucket_bytes=case.bucket_bytes, staged=staged
        )
        if report.failed:
            raise next(iter(report.failed.values()))

    works: dict[str, Callable[[], object]] = {
        PLAIN: lambda: broadcast_plainly(groups, memory, sizes, under_way=1),
        QUEUED: lambda: broadcast_plainly(groups, memory, sizes, under_way=2),
        OURS: send,
    }
    costs: dict[str, list[Cost]] = {kind: [] for kind in works}
    for _ in range(pairs + 1):
        for kind, work in works.items():
            costs[kind].append(peers.time(kind, work))
        progress.advance(f"{case.mebibytes} MiB {case.dtype} to {case.receivers}")
    peers.close()
    return row(case, sum(sizes), {kind: each[1:] for kind, each in costs.items()})


def row(case: Case, num_bytes: int, costs: dict[str, list[Cost]]) -> Row:
    plain, queued, ours = (costs[kind] for kind in (PLAIN, QUEUED, OURS))
    ratios = [a.seconds / b.seconds for a, b in zip(plain, ours, strict=True)]
    to_queued = [a.seconds / b.seconds for a, b in zip(queued, ours, strict=True)]
    low, high = median_interval(ratios)

    def rate(some: Sequence[Cost]) -> float:
        return round(num_bytes / 1e9 / statistics.median(each.seconds for each in some), 3)

    def cpu(some: Sequence[Cost]) -> float:
        return round(statistics.median(each.cpu_seconds for each in some), 4)

    return Row(
        *case,
        pairs=len(ratios),
        plain_gb_per_second=rate(plain),
        queued_gb_per_second=rate(queued),
        ours_gb_per_second=rate(ours),
        ratio=round(statistics.median(ratios), 3),
        ratio_low=round(low, 3),
        ratio_high=round(high, 3),
        ratio_to_queued=round(statistics.median(to_queued), 3),
        plain_cpu_seconds=cpu(plain),
        ours_cpu_seconds=cpu(ours),
    )


def measure_parts(case: Case, rounds: int) -> dict[str, float]:
    """GB a CPU second of what ours does beside the wire, each alone in one thread."""
    manifest, tensors = case.manifest, tensors_of(case.manifest)
    staged = StagedWeights(manifest, bucket_bytes=case.bucket_bytes)

    def pack() -> None:
        places = (staged.data(bucket) for bucket in staged.buckets)
        for _ in pack_buckets(tensors, manifest, bucket_bytes=case.bucket_bytes, places=places):
            pass

    works: dict[str, Callable[[], object]] = {
        "pack": pack,
        "checksum": lambda: [
            checksum(staged.data(bucket), start=bucket.start) for bucket in staged.buckets
        ],
        "unpack": staged.tensors,
        "touch new memory": lambda: torch.zeros(staged.num_bytes, dtype=torch.uint8),
    }
    rates = {}
    for name, work in works.items():
        work()
        spent = []
        for _ in range(rounds):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
        rates[name] = round(staged.num_bytes / 1e9 / statistics.median(spent), 2)
    return rates
