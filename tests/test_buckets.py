"""Weights as bytes: the plan, the packing, the checksum, the staged copy."""

from __future__ import annotations

import random

import pytest
import torch

from shared.buckets import (
    ALIGNMENT,
    ParameterSpec,
    StagedWeights,
    add_checksums,
    checksum,
    pack_buckets,
    plan_buckets,
    unpack_bucket,
)
from tests.manifests import random_manifest, random_tensors, whole_checksum

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
    original = checksum(data, start=0)
    for position in range(len(data)):
        changed = data.clone()
        changed[position] ^= 1 << (position % 8)
        assert checksum(changed, start=0) != original


def test_exchanged_parameters_change_the_checksum() -> None:
    manifest = tuple(ParameterSpec(name, "float32", (64,)) for name in "ab")
    tensors = random_tensors(manifest)
    exchanged = {"a": tensors["b"], "b": tensors["a"]}
    assert whole_checksum(tensors, manifest, 10**6) != whole_checksum(exchanged, manifest, 10**6)


def test_the_checksum_is_xxh3_as_its_specification_has_it() -> None:
    """A learner and a replica of different releases must agree."""
    nothing = torch.empty(0, dtype=torch.uint8)
    assert checksum(nothing, start=0) == 0x2D06800538D394C2
    assert checksum(nothing, start=64) != checksum(nothing, start=0)


def test_the_checksum_of_the_whole_is_the_sum_of_its_buckets() -> None:
    manifest = random_manifest(5)
    tensors = random_tensors(manifest)
    packed = list(pack_buckets(tensors.items(), manifest, bucket_bytes=999))
    parts = [checksum(data, start=bucket.start) for bucket, data in packed]
    assert len(parts) > 2
    assert whole_checksum(tensors, manifest, 999) == sum(parts) % 2**64


def test_exchanged_buckets_change_the_checksum() -> None:
    data = torch.arange(64, dtype=torch.uint8)
    other = data.flip(0)
    there = add_checksums([checksum(data, start=0), checksum(other, start=64)])
    assert add_checksums([checksum(other, start=0), checksum(data, start=64)]) != there


def test_flipped_signs_change_the_checksum_whatever_their_number() -> None:
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    original = checksum(weights.view(torch.uint8), start=0)
    for places in ([0, 2], [1, 3], [1, 2049], [5, 7, 9, 11], list(range(1, 4096, 2))):
        changed = weights.clone()
        changed[places] *= -1
        assert checksum(changed.view(torch.uint8), start=0) != original


# --- staged copy --------------------------------------------------------------------------------


def stage(staged: StagedWeights, tensors: dict[str, torch.Tensor]) -> None:
    staged.clear()
    packed = pack_buckets(tensors.items(), staged.manifest, bucket_bytes=staged.bucket_bytes)
    for bucket, data in packed:
        staged.accept(bucket, data)


@pytest.mark.parametrize("bucket_bytes", [1, 500, 10**6])
def test_a_staged_copy_holds_one_version_and_then_the_next(bucket_bytes: int) -> None:
    manifest = random_manifest(5)
    staged = StagedWeights(manifest, bucket_bytes=bucket_bytes)
    assert staged.checksum is None
    for seed in (0, 1):
        tensors = random_tensors(manifest, seed)
        stage(staged, tensors)
        assert staged.checksum == whole_checksum(tensors, manifest, bucket_bytes)
        assert list(staged.tensors()) == list(tensors)
        assert all(torch.equal(staged.tensors()[name], tensors[name]) for name in tensors)


def test_a_staged_copy_has_no_checksum_until_its_last_bucket_is_there() -> None:
    manifest = random_manifest(5)
    tensors = random_tensors(manifest)
    staged = StagedWeights(manifest, bucket_bytes=500)
    stage(staged, tensors)
    staged.clear()
    packed = list(pack_buckets(tensors.items(), manifest, bucket_bytes=500))
    assert len(packed) > 2
    for bucket, data in packed:
        assert staged.checksum is None
        staged.accept(bucket, data)
    assert staged.checksum is not None


def test_packing_into_used_memory_leaves_nothing_of_what_was_there() -> None:
    manifest = (ParameterSpec("a", "int8", (3,)), ParameterSpec("b", "bfloat16", (5,)))
    tensors = random_tensors(manifest)
    ((_, clean),) = pack_buckets(tensors.items(), manifest, bucket_bytes=100)
    used = torch.full((clean.numel(),), 255, dtype=torch.uint8)
    for _ in pack_buckets(tensors.items(), manifest, bucket_bytes=100, places=iter([used])):
        pass
    assert torch.equal(used, clean)
    assert used[3:16].eq(0).all() and used[26:32].eq(0).all()
