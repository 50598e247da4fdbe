"""The policy's weights as a Hugging Face checkpoint has them: names, shapes, buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from services.learner.policy import Policy
from shared.buckets import Manifest, ParameterSpec


class PolicyWeights:
    """Parameters once each, tied ones under their first name, and persistent buffers."""

    def __init__(self, policy: Policy) -> None:
        """Looks the weights up at each call: ZeRO replaces what they hold."""
        self._model = policy.model

    def named(self) -> list[tuple[str, Tensor]]:
        """In the manifest's order; under ZeRO-3 each is what this rank has of it."""
        named: list[tuple[str, Tensor]] = list(self._model.named_parameters())
        kept = set(self._model.state_dict(keep_vars=True))
        return named + [(name, each) for name, each in self._model.named_buffers() if name in kept]

    def manifest(self) -> Manifest:
        """What a whole copy consists of."""
        return tuple(
            ParameterSpec(name, str(weight.dtype).removeprefix("torch."), tuple(_shape(weight)))
            for name, weight in self.named()
        )

    def buckets(self, limit_bytes: int) -> Iterator[range]:
        """Runs of the weights' numbers, of about limit_bytes each."""
        start, size, weights = 0, 0, self.named()
        for stop, (_, weight) in enumerate(weights):
            weight_bytes = math.prod(_shape(weight)) * weight.element_size()
            if stop > start and size + weight_bytes > limit_bytes:
                yield range(start, stop)
                start, size = stop, 0
            size += weight_bytes
        yield range(start, len(weights))


def _shape(weight: Tensor) -> Sequence[int]:
    """Of the whole weight, also where ZeRO-3 left a rank only a part of it."""
    shape: Sequence[int] = getattr(weight, "ds_shape", weight.shape)
    return shape
