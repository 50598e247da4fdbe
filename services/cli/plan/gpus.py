"""What the makers say of their GPUs; the source of each line stands under the table."""

from __future__ import annotations

from typing import NamedTuple

from shared.errors import ConfigError


class Gpu(NamedTuple):
    """Peaks of one GPU.

    Attributes:
        bf16_tflops: dense, without sparsity.
        memory_tb_per_second, memory_gb: in decimal units, as on the data sheet.
    """

    bf16_tflops: float
    memory_tb_per_second: float
    memory_gb: float


GPUS = {
    "l4": Gpu(121, 0.300, 24),
    "l40s": Gpu(362, 0.864, 48),
    "a100-40": Gpu(312, 1.555, 40),
    "a100": Gpu(312, 2.039, 80),
    "h100": Gpu(989, 3.35, 80),
    "h200": Gpu(989, 4.8, 141),
    "b200": Gpu(2250, 8.0, 180),
}
"""NVIDIA's data sheets: L4, L40S, A100 (SXM, 40 and 80 GB), H100 (SXM), H200 (SXM), DGX B200 (an
eighth of it). Where a sheet gives a rate with sparsity, half of it stands here."""


def gpu_called(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: it is not in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(
            f"--gpu {name}: not in the table; use one of {', '.join(GPUS)}, or measure a run and"
            " give --from"
        ) from None
