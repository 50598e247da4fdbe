"""The checks of shape that the per-token functions of this package share."""

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> torch.Size:
    """The common shape of the named tensors.

    Raises:
        ValueError: two of them differ; the message names every shape.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        described = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"per-token tensors must have one shape, got {described}")
    return first
