"""Weights as packed bytes: the same buckets on both sides, and a checksum of what is in them.

    manifest ──plan──▶ buckets ──pack──▶ bytes        bytes ──unpack──▶ tensors

Both sides compute the same buckets from the same manifest, so nothing but raw bytes travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

# Every parameter starts at a multiple of this, so that a view of any dtype is aligned.
ALIGNMENT = 16

# The checksum works through this many 32-bit words at a time: 4 MiB of weights, and twice that
# of temporary memory.
_CHECKSUM_WORDS = 1 << 20
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


def pack_bucket(
    bucket: Bucket, tensors: dict[str, torch.Tensor], *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Copy a bucket's parameters, cast to the manifest's dtypes, into one uint8 tensor.

    Raises:
        ValueError: a tensor has another shape than the manifest says.
    """
    data = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=device)
    for name, view in unpack_bucket(bucket, data).items():
        if tensors[name].shape != view.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, "
                f"but the manifest says {tuple(view.shape)}"
            )
        view.copy_(tensors[name].detach())
    return data


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
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Pack bucket by bucket, taking from `named_tensors` only what the next bucket needs.

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
        yield bucket, pack_bucket(bucket, taken, device=device)


def checksum(data: torch.Tensor, *, start: int = 0) -> int:
    """A 64-bit checksum of raw bytes, the same on CPU and GPU, that adds up over buckets.

        sum over i of word[i] * weight[i]  mod 2^64

    over 32-bit words, with a fixed odd weight per position in the whole manifest. An odd number
    has an inverse mod 2^64, so a change within one word always shows. Zero bytes add nothing:
    sums of buckets, mod 2^64, do not depend on how the manifest was divided.

    Args:
        data: uint8, contiguous, a multiple of 4 bytes long.
        start: offset of `data` in the whole, aligned manifest; a multiple of 4.
    """
    words = data.view(torch.int32)
    base = _position_weights(data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    position = start // 4
    done = 0
    while done < words.numel():
        chunk, inside = divmod(position + done, _CHECKSUM_WORDS)
        count = min(_CHECKSUM_WORDS - inside, words.numel() - done)
        products = base[inside : inside + count] * words[done : done + count]
        total += products.sum() * _as_int64(_chunk_weight(chunk))
        done += count
    return int(total.item()) % _UINT64


def add_checksums(parts: Iterable[int]) -> int:
    """The checksum of a whole manifest from those of its buckets."""
    return sum(parts) % _UINT64


_weights_by_device: dict[torch.device, torch.Tensor] = {}


def _position_weights(device: torch.device) -> torch.Tensor:
    """Odd int64 weights of the positions in a chunk; fixed, so computed once a device."""
    if device not in _weights_by_device:
        index = torch.arange(1, _CHECKSUM_WORDS + 1, dtype=torch.int64, device=device)
        mixed = index * _as_int64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> 31)) * _as_int64(0xBF58476D1CE4E5B9)
        _weights_by_device[device] = (mixed ^ (mixed >> 29)) | 1
    return _weights_by_device[device]


def _chunk_weight(chunk: int) -> int:
    mixed = (chunk + 1) * 0x94D049BB133111EB % _UINT64
    return (mixed ^ (mixed >> 32)) | 1


def _as_int64(value: int) -> int:
    """Two's complement: the int64 that has the bits of this uint64."""
    value %= _UINT64
    return value - _UINT64 if value >= 1 << 63 else value
