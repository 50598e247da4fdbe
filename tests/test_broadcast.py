"""Weights by broadcast: what arrives, and what happens when a peer fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.broadcast import SLOW, BroadcastGroup, GroupSpec, open_group, open_store
from shared.buckets import Manifest, ParameterSpec, StagedWeights, pack_buckets, plan_buckets
from shared.errors import BroadcastError
from shared.weight_transfer import Received, receive_weights, send_weights
from tests.forked import FORKED
from tests.manifests import random_manifest, random_tensors, whole_checksum

BUCKET_BYTES = 4096


# --- groups -------------------------------------------------------------------------------------


@contextmanager
def pair(
    key: str, *, timeout_seconds: float
) -> Iterator[tuple[GroupSpec, Callable[[], BroadcastGroup]]]:
    """The spec of the receiving member, and a function with which the sender joins."""
    store = open_store("127.0.0.1")
    spec = GroupSpec(1, "gloo", "127.0.0.1", store.port, key, 1, 2, timeout_seconds)
    yield spec, lambda: open_group(replace(spec, rank=0), store)


def receive(spec: GroupSpec, manifest: Manifest) -> Received:
    group = open_group(spec)
    try:
        return receive_weights(group, manifest, bucket_bytes=BUCKET_BYTES)
    finally:
        group.close()


def receive_and_report(
    spec: GroupSpec, manifest: Manifest, results: multiprocessing.Queue[Any]
) -> None:
    received = receive(spec, manifest)
    sums = {name: tensor.double().sum().item() for name, tensor in received.tensors.items()}
    results.put((received.checksum, sums))


def join_and_freeze(spec: GroupSpec, joined: multiprocessing.Queue[Any]) -> None:
    group = open_group(spec)
    joined.put(True)
    time.sleep(600)
    group.close()


def test_weights_arrive_whole_in_another_process() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    results: multiprocessing.Queue[Any] = FORKED.Queue()
    with pair("round-trip", timeout_seconds=60) as (spec, join):
        process = FORKED.Process(target=receive_and_report, args=(spec, manifest, results))
        process.start()
        group = join()
        report = send_weights([group], tensors.items(), manifest, bucket_bytes=BUCKET_BYTES)
        received_checksum, sums = results.get(timeout=60)
        process.join(60)
        group.close()
    assert process.exitcode == 0
    assert report.failed == {}
    assert received_checksum == report.checksum
    assert sums == {name: tensor.double().sum().item() for name, tensor in tensors.items()}


def test_a_killed_peer_fails_alone_and_at_once() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    joined: multiprocessing.Queue[Any] = FORKED.Queue()
    with (
        pair("killed", timeout_seconds=60) as (dying, join_dying),
        pair("healthy", timeout_seconds=60) as (healthy, join_healthy),
        ThreadPoolExecutor() as threads,
    ):
        process = FORKED.Process(target=join_and_freeze, args=(dying, joined))
        process.start()
        dying_group = join_dying()
        joined.get(timeout=60)
        receiving: Future[Received] = threads.submit(receive, healthy, manifest)
        healthy_group = join_healthy()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)

        started = time.monotonic()
        report = send_weights(
            [dying_group, healthy_group], tensors.items(), manifest, bucket_bytes=BUCKET_BYTES
        )
        assert time.monotonic() - started < 30
        assert set(report.failed) == {dying_group}
        assert "epoch 1, group 'killed'" in str(report.failed[dying_group])
        assert receiving.result(60).checksum == report.checksum
        healthy_group.close()


def hurry(group: BroadcastGroup, seconds: float) -> None:
    """From now on it waits no longer for a bucket; what it took to join was another matter."""
    group.spec = replace(group.spec, timeout_seconds=seconds)


def test_a_silent_peer_fails_at_the_deadline() -> None:
    with pair("silent", timeout_seconds=60) as (spec, join), ThreadPoolExecutor() as threads:
        silent = threads.submit(open_group, spec)
        group = join()
        hurry(group, 1)
        started = time.monotonic()
        with pytest.raises(BroadcastError, match="epoch 1, group 'silent'"):
            # Larger than what a socket takes without its peer reading: gloo's send must wait.
            group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8))
        assert time.monotonic() - started < 30
        group.close()
        silent.result(60).close()


def test_the_groups_of_a_process_share_a_few_threads_that_watch_the_wire() -> None:
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    store = open_store("127.0.0.1")
    before, ends = num_threads(), []
    with ThreadPoolExecutor(1) as threads:
        for index in range(16):
            spec = GroupSpec(1, "gloo", "127.0.0.1", store.port, f"many {index}", 1, 2, 60.0)
            theirs = threads.submit(open_group, spec)
            ends += [open_group(replace(spec, rank=0), store), theirs.result(60)]
    # Each end has a thread that waits for broadcasts, which is asleep while there is none.
    assert num_threads() - before <= len(ends) + 10
    for end in ends:
        end.close()


def test_a_peer_that_never_joins_fails_at_the_deadline() -> None:
    with pair("absent", timeout_seconds=1) as (spec, join):
        started = time.monotonic()
        with pytest.raises(BroadcastError, match="rank 0 of 2 could not join group 'absent'"):
            join()
        assert time.monotonic() - started < 30
        unreachable = replace(spec, store_port=1)
        with pytest.raises(BroadcastError, match="could not join"):
            open_group(unreachable)


def test_a_name_that_does_not_resolve_for_a_moment_is_a_failure_of_the_group_alone() -> None:
    store = open_store("127.0.0.1")
    spec = GroupSpec(1, "gloo", "learner-0.invalid", store.port, "nowhere", 0, 2, 3.0)
    with pytest.raises(BroadcastError, match="could not join group 'nowhere'"):
        open_group(spec, store)


def test_closing_ends_ones_own_wait_and_the_peers() -> None:
    manifest = random_manifest(3)
    with pair("closed", timeout_seconds=60) as (spec, join), ThreadPoolExecutor() as threads:
        joining = threads.submit(open_group, spec)
        sender, receiver = join(), joining.result(60)
        waiting = threads.submit(receive_weights, receiver, manifest, bucket_bytes=BUCKET_BYTES)
        threading.Timer(0.1, receiver.close).start()
        with pytest.raises(BroadcastError, match="closed during a broadcast"):
            waiting.result(60)
        sender.close()
        with pytest.raises(BroadcastError, match="is closed"):
            sender.broadcast(torch.zeros(4, dtype=torch.uint8))


def test_a_transfer_that_breaks_off_fails_at_once_in_the_receiver() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    assert len(plan_buckets(manifest, bucket_bytes=BUCKET_BYTES)) > 1
    with pair("broken", timeout_seconds=60) as (spec, join), ThreadPoolExecutor() as threads:
        receiving = threads.submit(receive, spec, manifest)
        sender = join()
        packed = pack_buckets(tensors.items(), manifest, bucket_bytes=BUCKET_BYTES)
        sender.broadcast(next(packed)[1])
        sender.close()
        with pytest.raises(BroadcastError, match="a peer is gone"):
            receiving.result(60)


def test_every_worker_has_a_pair_of_its_own_with_gloo_and_a_rank_of_its_own_with_nccl() -> None:
    gloo = GroupSpec(3, "gloo", "host", 1, "epoch3/replica-b", 1, 2, 5.0)
    nccl = replace(gloo, backend="nccl", key="epoch3", world_size=9)
    assert [gloo.for_worker(w).key for w in (0, 1)] == ["epoch3/replica-b/0", "epoch3/replica-b/1"]
    assert [nccl.for_worker(w).rank for w in (0, 1)] == [1, 2]


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"backend": "mpi"}, {"timeout_seconds": 0}])
def test_a_wrong_group_is_refused(wrong: dict[str, Any]) -> None:
    spec = GroupSpec(1, "gloo", "host", 1, "key", 0, 2, 5.0)
    with pytest.raises(ValueError):
        replace(spec, **wrong)


# --- many buckets -------------------------------------------------------------------------------


@contextmanager
def joined_pairs(*keys: str) -> Iterator[list[tuple[BroadcastGroup, BroadcastGroup]]]:
    """Sender and receiver of each group, both in this process."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        pairs = []
        for key in keys:
            spec, join = stack.enter_context(pair(key, timeout_seconds=60))
            joining = threads.submit(open_group, spec)
            pairs.append((join(), joining.result(60)))
        try:
            yield pairs
        finally:
            for member in (member for both in pairs for member in both):
                member.close()


def large_manifest(num_parameters: int) -> Manifest:
    """Of 8 MiB each, more than sockets hold while nobody reads, and not a multiple of 16 bytes."""
    shape = ((8 << 20) + 1,)
    return tuple(ParameterSpec(f"{index}", "int8", shape) for index in range(num_parameters))


@pytest.mark.parametrize("keeps_copy", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 3000, 10**7])
def test_versions_follow_each_other_in_a_group_and_in_the_same_memory(
    bucket_bytes: int, keeps_copy: bool
) -> None:
    manifest = random_manifest(11)
    sent, arrived = (StagedWeights(manifest, bucket_bytes=bucket_bytes) for _ in "ab")
    with joined_pairs("versions") as [(sender, receiver)], ThreadPoolExecutor() as threads:
        for seed in range(3):
            tensors = random_tensors(manifest, seed)
            receiving = threads.submit(
                receive_weights, receiver, manifest, bucket_bytes=bucket_bytes, staged=arrived
            )
            report = send_weights(
                [sender],
                tensors.items(),
                manifest,
                bucket_bytes=bucket_bytes,
                staged=sent if keeps_copy else None,
            )
            received = receiving.result(60)
            assert report.failed == {}
            assert received.checksum == report.checksum == arrived.checksum
            assert report.checksum == whole_checksum(tensors, manifest, bucket_bytes)
            assert sent.checksum == (report.checksum if keeps_copy else None)
            assert list(received.tensors) == list(tensors)
            assert all(torch.equal(received.tensors[name], tensors[name]) for name in tensors)


def test_a_bucket_is_not_packed_over_one_that_still_travels() -> None:
    manifest = large_manifest(5)
    tensors = random_tensors(manifest)
    third_is_packed = threading.Event()

    def produce() -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(tensors.items()):
            if index == 3:
                third_is_packed.set()
            yield name, tensor

    with joined_pairs("slow") as [(sender, receiver)], ThreadPoolExecutor() as threads:
        sending = threads.submit(send_weights, [sender], produce(), manifest, bucket_bytes=1)
        # There is memory for two: nothing may be overwritten before someone receives.
        assert not third_is_packed.wait(0.3)
        received = receive_weights(receiver, manifest, bucket_bytes=1)
        assert sending.result(60).checksum == received.checksum
    assert all(torch.equal(received.tensors[name], tensors[name]) for name in tensors)


def test_a_peer_killed_within_a_bucket_does_not_keep_the_others_from_theirs() -> None:
    manifest = large_manifest(4)
    tensors = random_tensors(manifest)
    joined: multiprocessing.Queue[Any] = FORKED.Queue()
    with (
        pair("dying", timeout_seconds=60) as (spec, join_dying),
        joined_pairs("living") as [(living, receiver)],
        ThreadPoolExecutor() as threads,
    ):
        process = FORKED.Process(target=join_and_freeze, args=(spec, joined))
        process.start()
        dying = join_dying()
        joined.get(timeout=60)

        def produce() -> Iterator[tuple[str, torch.Tensor]]:
            for index, each in enumerate(tensors.items()):
                if index == 1:  # the first bucket is in the sockets, as far as they take it
                    process.kill()
                yield each

        receiving = threads.submit(receive_weights, receiver, manifest, bucket_bytes=1)
        report = send_weights([dying, living], produce(), manifest, bucket_bytes=1)
        assert set(report.failed) == {dying}
        assert "peer is gone" in str(report.failed[dying])
        assert receiving.result(60).checksum == report.checksum
        process.join(60)
        with pytest.raises(BroadcastError, match="is closed"):
            dying.broadcast(torch.zeros(4, dtype=torch.uint8))


def receive_slowly(group: BroadcastGroup, manifest: Manifest, *, seconds: float) -> None:
    """As a link does that takes so long for each bucket."""
    with suppress(BroadcastError):
        for bucket in plan_buckets(manifest, bucket_bytes=1):
            time.sleep(seconds)
            group.broadcast(torch.empty(bucket.num_bytes, dtype=torch.uint8))


def test_a_peer_that_is_never_silent_but_slow_holds_the_others_up_only_for_its_timeout() -> None:
    manifest = large_manifest(12)
    tensors = random_tensors(manifest)
    with (
        joined_pairs("slow") as [(slow, crawling)],
        joined_pairs("quick") as [(quick, receiver)],
        ThreadPoolExecutor() as threads,
    ):
        hurry(slow, 1.5)
        threads.submit(receive_slowly, crawling, manifest, seconds=0.2)
        receiving = threads.submit(receive_weights, receiver, manifest, bucket_bytes=1)
        report = send_weights([slow, quick], tensors.items(), manifest, bucket_bytes=1)
        assert set(report.failed) == {slow}
        assert "slow peer: most others waited for it for 1.5 s" in str(report.failed[slow])
        assert report.failed[slow].status == SLOW
        assert receiving.result(60).checksum == report.checksum
        crawling.close()


def test_a_transfer_ends_at_its_limit_though_every_bucket_is_within_its_own() -> None:
    manifest = large_manifest(6)
    tensors = random_tensors(manifest)
    with (
        joined_pairs("slow") as [(slow, crawling)],
        ThreadPoolExecutor() as threads,
    ):
        threads.submit(receive_slowly, crawling, manifest, seconds=0.12)
        report = send_weights([slow], tensors.items(), manifest, bucket_bytes=1, limit_seconds=0.3)
        assert "slow peer: not through after 0.3 s" in str(report.failed[slow])
        assert report.failed[slow].status == SLOW
        crawling.close()


def test_closing_a_group_during_a_transfer_ends_it_for_both_and_the_weights_are_still_taken() -> (
    None
):
    manifest = large_manifest(4)
    tensors = random_tensors(manifest)
    taken: list[str] = []
    sent, arrived = (StagedWeights(manifest, bucket_bytes=1) for _ in "ab")
    for staged in (sent, arrived):  # with an older version in them
        send_weights([], tensors.items(), manifest, bucket_bytes=1, staged=staged)
        assert staged.checksum is not None
    with joined_pairs("closing") as [(sender, receiver)], ThreadPoolExecutor() as threads:

        def produce() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors.items():
                taken.append(name)
                assert sent.checksum is None
                if name == "2":
                    sender.close()
                yield name, tensor

        receiving = threads.submit(
            receive_weights, receiver, manifest, bucket_bytes=1, staged=arrived
        )
        report = send_weights([sender], produce(), manifest, bucket_bytes=1, staged=sent)
        assert set(report.failed) == {sender}
        assert taken == list(tensors)
        assert sent.checksum == report.checksum == whole_checksum(tensors, manifest, 1)
        with pytest.raises(BroadcastError, match="a peer is gone"):
            receiving.result(60)
        assert arrived.checksum is None
