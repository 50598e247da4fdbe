"""Weights by broadcast: the plan, the checksum, and what happens when a peer fails."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.broadcast import (
    BroadcastGroup,
    GroupSpec,
    Received,
    open_group,
    open_store,
    receive_weights,
    send_weights,
)
from shared.buckets import (
    ALIGNMENT,
    Manifest,
    ParameterSpec,
    add_checksums,
    checksum,
    pack_buckets,
    plan_buckets,
    unpack_bucket,
)
from shared.errors import BroadcastError

BUCKET_BYTES = 4096


def random_manifest(seed: int) -> Manifest:
    """Up to 30 parameters of up to 40 x 40, some of them scalars, some empty."""
    draw = random.Random(seed)
    specs = []
    for index in range(draw.randint(1, 30)):
        dtype = draw.choice(["float32", "bfloat16", "int8", "float64"])
        smallest = 0 if draw.random() < 0.05 else 1
        shape = tuple(draw.randint(smallest, 40) for _ in range(draw.randint(0, 2)))
        specs.append(ParameterSpec(f"layer.{index}.weight", dtype, shape))
    return tuple(specs)


def random_tensors(manifest: Manifest, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: (100 * torch.randn(spec.shape, generator=generator)).to(spec.torch_dtype)
        for spec in manifest
    }


def whole_checksum(tensors: dict[str, torch.Tensor], manifest: Manifest, bucket_bytes: int) -> int:
    packed = pack_buckets(tensors.items(), manifest, bucket_bytes=bucket_bytes)
    return add_checksums(checksum(data, start=bucket.start) for bucket, data in packed)


# --- plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_buckets_hold_every_parameter_once_in_order_aligned_and_within_bounds(seed: int) -> None:
    manifest = random_manifest(seed)
    bucket_bytes = random.Random(seed).choice([1, 16, 100, 1000, 10**6])
    buckets = plan_buckets(manifest, bucket_bytes=bucket_bytes)

    assert [p.spec for bucket in buckets for p in bucket.placements] == list(manifest)
    start = 0
    for bucket in buckets:
        assert bucket.start == start
        assert len(bucket.placements) == 1 or bucket.num_bytes <= bucket_bytes
        end = 0
        for placement in bucket.placements:
            assert placement.offset % ALIGNMENT == 0 and placement.offset >= end
            end = placement.offset + placement.spec.num_bytes
        assert end <= bucket.num_bytes < end + ALIGNMENT
        start += bucket.num_bytes


@pytest.mark.parametrize("seed", range(20))
def test_what_is_packed_is_unpacked_bit_by_bit(seed: int) -> None:
    manifest = random_manifest(seed)
    tensors = random_tensors(manifest, seed)
    unpacked: dict[str, torch.Tensor] = {}
    for bucket, data in pack_buckets(tensors.items(), manifest, bucket_bytes=500):
        unpacked |= unpack_bucket(bucket, data)
    assert list(unpacked) == list(tensors)
    assert all(torch.equal(unpacked[name], tensors[name]) for name in tensors)


def test_packing_casts_to_the_manifest_dtype() -> None:
    manifest = (ParameterSpec("w", "bfloat16", (3,)),)
    weights = torch.tensor([1.0, 1.001, 3.14159])
    ((bucket, data),) = pack_buckets([("w", weights)], manifest, bucket_bytes=100)
    assert torch.equal(unpack_bucket(bucket, data)["w"], weights.bfloat16())


@pytest.mark.parametrize(
    ("named_tensors", "message"),
    [
        ([("v", torch.zeros(3))], "expected w next, but got v"),
        ([], "expected w next, but got nothing"),
        ([("w", torch.zeros(4))], "the manifest says"),
    ],
)
def test_tensors_that_are_not_the_manifests_are_refused(
    named_tensors: list[tuple[str, torch.Tensor]], message: str
) -> None:
    manifest = (ParameterSpec("w", "float32", (3,)),)
    with pytest.raises(ValueError, match=message):
        list(pack_buckets(named_tensors, manifest, bucket_bytes=100))


def test_a_wrong_manifest_is_refused() -> None:
    twice = (ParameterSpec("w", "float32", (3,)),) * 2
    with pytest.raises(ValueError, match="twice"):
        plan_buckets(twice, bucket_bytes=100)
    with pytest.raises(ValueError, match="float31"):
        plan_buckets((ParameterSpec("w", "float31", (3,)),), bucket_bytes=100)
    with pytest.raises(ValueError, match="positive"):
        plan_buckets((), bucket_bytes=0)


# --- checksum -----------------------------------------------------------------------------------


def test_any_changed_byte_changes_the_checksum() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (512,), dtype=torch.uint8, generator=generator)
    original = checksum(data)
    for position in range(len(data)):
        changed = data.clone()
        changed[position] ^= 1 << (position % 8)
        assert checksum(changed) != original


def test_exchanged_parameters_change_the_checksum() -> None:
    manifest = tuple(ParameterSpec(name, "float32", (64,)) for name in "ab")
    tensors = random_tensors(manifest)
    exchanged = {"a": tensors["b"], "b": tensors["a"]}
    assert whole_checksum(tensors, manifest, 10**6) != whole_checksum(exchanged, manifest, 10**6)


@pytest.mark.parametrize("bucket_bytes", [1, 64, 999, 10**6])
def test_the_checksum_does_not_depend_on_how_the_manifest_is_divided(bucket_bytes: int) -> None:
    manifest = random_manifest(7)
    tensors = random_tensors(manifest)
    assert whole_checksum(tensors, manifest, bucket_bytes) == whole_checksum(tensors, manifest, 777)


def test_the_checksum_adds_up_over_parts_larger_than_a_chunk() -> None:
    data = torch.randint(0, 256, (9 << 20,), dtype=torch.uint8)
    cut = (5 << 20) + 16
    parts = [checksum(data[:cut]), checksum(data[cut:], start=cut)]
    assert add_checksums(parts) == checksum(data)


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
    time.sleep(60)
    group.close()


def test_weights_arrive_whole_in_another_process() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Any] = spawn.Queue()
    with pair("round-trip", timeout_seconds=20) as (spec, join):
        process = spawn.Process(target=receive_and_report, args=(spec, manifest, results))
        process.start()
        group = join()
        report = send_weights([group], tensors.items(), manifest, bucket_bytes=BUCKET_BYTES)
        received_checksum, sums = results.get(timeout=20)
        process.join(20)
        group.close()
    assert process.exitcode == 0
    assert report.failed == {}
    assert received_checksum == report.checksum
    assert sums == {name: tensor.double().sum().item() for name, tensor in tensors.items()}


def test_a_killed_peer_fails_alone_and_at_once() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    spawn = multiprocessing.get_context("spawn")
    joined: multiprocessing.Queue[Any] = spawn.Queue()
    with (
        pair("killed", timeout_seconds=20) as (dying, join_dying),
        pair("healthy", timeout_seconds=20) as (healthy, join_healthy),
        ThreadPoolExecutor() as threads,
    ):
        process = spawn.Process(target=join_and_freeze, args=(dying, joined))
        process.start()
        dying_group = join_dying()
        joined.get(timeout=20)
        receiving: Future[Received] = threads.submit(receive, healthy, manifest)
        healthy_group = join_healthy()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)

        started = time.monotonic()
        report = send_weights(
            [dying_group, healthy_group], tensors.items(), manifest, bucket_bytes=BUCKET_BYTES
        )
        assert time.monotonic() - started < 5
        assert set(report.failed) == {dying_group}
        assert "epoch 1, group 'killed'" in str(report.failed[dying_group])
        assert receiving.result(10).checksum == report.checksum
        healthy_group.close()


def test_a_silent_peer_fails_at_the_deadline() -> None:
    with pair("silent", timeout_seconds=1) as (spec, join), ThreadPoolExecutor() as threads:
        silent = threads.submit(open_group, spec)
        group = join()
        started = time.monotonic()
        with pytest.raises(BroadcastError, match="epoch 1, group 'silent'"):
            # Larger than what a socket takes without its peer reading: gloo's send must wait.
            group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8))
        assert time.monotonic() - started < 4
        group.close()
        silent.result(5).close()


def test_a_peer_that_never_joins_fails_at_the_deadline() -> None:
    with pair("absent", timeout_seconds=1) as (spec, join):
        started = time.monotonic()
        with pytest.raises(BroadcastError, match="rank 0 of 2 could not join group 'absent'"):
            join()
        assert time.monotonic() - started < 4
        unreachable = replace(spec, store_port=1)
        with pytest.raises(BroadcastError, match="could not join"):
            open_group(unreachable)


def test_closing_ends_ones_own_wait_and_the_peers() -> None:
    manifest = random_manifest(3)
    with pair("closed", timeout_seconds=20) as (spec, join), ThreadPoolExecutor() as threads:
        joining = threads.submit(open_group, spec)
        sender, receiver = join(), joining.result(10)
        waiting = threads.submit(receive_weights, receiver, manifest, bucket_bytes=BUCKET_BYTES)
        threading.Timer(0.1, receiver.close).start()
        with pytest.raises(BroadcastError, match="closed during a broadcast"):
            waiting.result(5)
        sender.close()
        with pytest.raises(BroadcastError, match="is closed"):
            sender.broadcast(torch.zeros(4, dtype=torch.uint8))


def test_a_transfer_that_breaks_off_fails_at_once_in_the_receiver() -> None:
    manifest = random_manifest(3)
    tensors = random_tensors(manifest)
    assert len(plan_buckets(manifest, bucket_bytes=BUCKET_BYTES)) > 1
    with pair("broken", timeout_seconds=20) as (spec, join), ThreadPoolExecutor() as threads:
        receiving = threads.submit(receive, spec, manifest)
        sender = join()
        packed = pack_buckets(tensors.items(), manifest, bucket_bytes=BUCKET_BYTES)
        sender.broadcast(next(packed)[1])
        sender.close()
        with pytest.raises(BroadcastError, match="a peer is gone"):
            receiving.result(5)


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
