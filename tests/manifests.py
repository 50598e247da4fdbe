"""Weights of no model in particular, for what moves weights."""

from __future__ import annotations

import random

import torch

from shared.buckets import Manifest, ParameterSpec, add_checksums, checksum, pack_buckets


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
