"""Weights as packed bytes: the same buckets on both sides, and a checksum of what is in them.

    manifest ──plan──▶ buckets ──pack──▶ bytes        bytes ──unpack──▶ tensors

Both sides compute the same buckets from the same manifest, so nothing but raw bytes travels.
`StagedWeights` is the memory for all buckets of a version, on either side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

# Every parameter starts at a multiple of this, so that a view of any dtype is aligned.
ALIGNMENT = 16

_UINT64 = 1 << 64


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter as it travels: `dtype` is torch's name for it ("float32", "bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype named; ValueError if torch has none of that name."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"parameter {self.name!r} has no torch dtype: {self.dtype!r}")
        return dtype

    @property
    def num_bytes(self) -> int:
        """Size on the wire, without alignment."""
        num_elements = 1
        for extent in self.shape:
            num_elements *= extent
        return num_elements * self.torch_dtype.itemsize


Manifest = tuple[ParameterSpec, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A parameter and the byte of its bucket at which it starts."""

    spec: ParameterSpec
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive parameters of a manifest that travel as one contiguous run of bytes.

    Attributes:
        start: offset of the bucket in the whole, aligned manifest; a multiple of ALIGNMENT.
        num_bytes: a multiple of ALIGNMENT; bytes between parameters are zero.
    """

    placements: tuple[Placement, ...]
    start: int
    num_bytes: int


def plan_buckets(manifest: Manifest, *, bucket_bytes: int) -> list[Bucket]:
    """Divide `manifest`, in order, into buckets of at most `bucket_bytes`.

    A parameter larger than that gets a bucket of its own.

    Raises:
        ValueError: a name occurs twice, a dtype is unknown, or `bucket_bytes` is not positive.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    if len({spec.name for spec in manifest}) != len(manifest):
        raise ValueError("the manifest names a parameter twice")
    buckets: list[Bucket] = []
    placements: list[Placement] = []
    start, filled = 0, 0
    for spec in manifest:
        size = _aligned(spec.num_bytes)
        if placements and filled + size > bucket_bytes:
            buckets.append(Bucket(tuple(placements), start, filled))
            placements, start, filled = [], start + filled, 0
        placements.append(Placement(spec, filled))
        filled += size
    if placements:
        buckets.append(Bucket(tuple(placements), start, filled))
    return buckets


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def pack_bucket(bucket: Bucket, tensors: dict[str, torch.Tensor], data: torch.Tensor) -> None:
    """Copy a bucket's parameters, cast to the manifest's dtypes, into `data`: uint8, [num_bytes].

    Raises:
        ValueError: a tensor has another shape than the manifest says.
    """
    for name, view in unpack_bucket(bucket, data).items():
        if tensors[name].shape != view.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, "
                f"but the manifest says {tuple(view.shape)}"
            )
        view.copy_(tensors[name].detach())
    for placement in bucket.placements:  # the memory may hold another version's bytes
        end = placement.offset + placement.spec.num_bytes
        data[end : _aligned(end)].zero_()


def unpack_bucket(bucket: Bucket, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the parameters inside the bucket's bytes; they share `data`'s memory."""
    return {
        spec.name: data[offset : offset + spec.num_bytes].view(spec.torch_dtype).view(spec.shape)
        for spec, offset in ((p.spec, p.offset) for p in bucket.placements)
    }


def pack_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    manifest: Manifest,
    *,
    bucket_bytes: int,
    places: Iterator[torch.Tensor] | None = None,
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Pack bucket by bucket, taking from `named_tensors` only what the next bucket needs.

    Args:
        places: where to, for each bucket in turn: uint8, [num_bytes]; by default new memory.
    Raises:
        ValueError: the tensors are not those of the manifest, in its order.
    """
    tensors = iter(named_tensors)
    for bucket in plan_buckets(manifest, bucket_bytes=bucket_bytes):
        taken: dict[str, torch.Tensor] = {}
        for placement in bucket.placements:
            name, tensor = next(tensors, ("nothing", torch.empty(0)))
            if name != placement.spec.name:
                raise ValueError(f"expected {placement.spec.name} next, but got {name}")
            taken[name] = tensor
        data = next(places) if places else torch.empty(bucket.num_bytes, dtype=torch.uint8)
        pack_bucket(bucket, taken, data)
        yield bucket, data


class StagedWeights:
    """One version of the weights, packed, in host memory that the next version may reuse.

    It is filled bucket by bucket: `clear`, then `accept` for each of `buckets`. Whoever reads
    beside that must read `checksum` before and after: anything but the same number twice means
    that another version was being written meanwhile.
    """

    def __init__(self, manifest: Manifest, *, bucket_bytes: int) -> None:
        """Reserve the memory.

        Raises:
            ValueError: as `plan_buckets`.
        """
        self.manifest = manifest
        self.bucket_bytes = bucket_bytes
        self.buckets = plan_buckets(manifest, bucket_bytes=bucket_bytes)
        self.num_bytes = sum(bucket.num_bytes for bucket in self.buckets)
        self._memory = allocate(self.num_bytes, torch.device("cpu"))
        self._parts: dict[int, int] = {}

    @property
    def checksum(self) -> int | None:
        """Of all buckets; None until the last of them was accepted."""
        parts = list(self._parts.values())
        return add_checksums(parts) if len(parts) == len(self.buckets) else None

    def clear(self) -> None:
        """Begin another version; the bytes stay until they are overwritten."""
        self._parts = {}

    def data(self, bucket: Bucket) -> torch.Tensor:
        """The bucket's bytes: uint8, [num_bytes], a view."""
        return self._memory[bucket.start : bucket.start + bucket.num_bytes]

    def accept(self, bucket: Bucket, data: torch.Tensor) -> int:
        """Keep a bucket: `data`, on any device, or what was written to `self.data(bucket)`.

        Returns:
            The checksum of what is kept.
        """
        place = self.data(bucket)
        if data.data_ptr() != place.data_ptr():
            place.copy_(data)
        self._parts[bucket.start] = checksum(place, start=bucket.start)
        return self._parts[bucket.start]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of the parameters by name, in the manifest's order."""
        tensors: dict[str, torch.Tensor] = {}
        for bucket in self.buckets:
            tensors |= unpack_bucket(bucket, self.data(bucket))
        return tensors


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory, uint8, not initialised."""
    if device.type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    # numpy asks the kernel for huge pages: touching small ones takes longer than a copy.
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))


def checksum(data: torch.Tensor, *, start: int) -> int:
    """XXH3 (64 bits) of a bucket's raw bytes, seeded with its place, so that buckets add up.

    Args:
        data: uint8, contiguous, in host memory.
        start: offset of `data` in the whole, aligned manifest.
    """
    return xxhash.xxh3_64_intdigest(data.numpy().data, seed=start)


def add_checksums(parts: Iterable[int]) -> int:
    """The checksum of a whole manifest, divided in these buckets, from those of the buckets."""
    return sum(parts) % _UINT64
