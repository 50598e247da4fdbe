"""Whether this process computes on GPUs."""

from __future__ import annotations

import os
from typing import Literal


def find_device() -> Literal["cpu", "cuda"]:
    """`cuda` where a GPU is usable; asks the driver without starting it, so forking stays safe."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
