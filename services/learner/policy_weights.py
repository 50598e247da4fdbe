"""The policy's weights as a Hugging Face checkpoint has them: names, shapes, buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from services.learner.lora import Adapters
from services.learner.policy import Policy
from shared.buckets import Manifest, ParameterSpec


class Weight(NamedTuple):
    """One of them.

    Attributes:
        held: the parameter or buffer; under ZeRO-3 what this rank has of it.
        path: of the adapter that changes it, if one does.
    """

    name: str
    held: Tensor
    path: str | None = None


class PolicyWeights:
    """Parameters once each, tied ones under their first name, and persistent buffers.

    With adapters it is the merged model that they are of; the adapters' own come after all others,
    and are in no manifest.
    """

    def __init__(self, policy: Policy) -> None:
        """Looks the weights up at each call: ZeRO replaces what they hold."""
        self._policy = policy

    def all(self) -> list[Weight]:
        """The manifest's, in its order, and the adapters'."""
        return [*self.published(), *self.adapters()]

    def published(self) -> list[Weight]:
        """In the manifest's order."""
        model, adapters = self._policy.model, self._policy.adapters
        named: list[tuple[str, Tensor]] = list(model.named_parameters())
        kept = set(model.state_dict(keep_vars=True))
        named += [(name, each) for name, each in model.named_buffers() if name in kept]
        if adapters is None:
            return [Weight(name, each) for name, each in named]
        own = {name for name, _ in adapters.named()}
        return [_place(adapters, name, each) for name, each in named if name not in own]

    def adapters(self) -> list[Weight]:
        """What is trained in place of the others; none in full training."""
        adapters = self._policy.adapters
        return [Weight(name, each) for name, each in adapters.named()] if adapters else []

    def sources(self, weight: Weight) -> list[Tensor]:
        """The parameters that `value` reads."""
        if weight.path is None or self._policy.adapters is None:
            return [weight.held]
        return [weight.held, *self._policy.adapters.parts(weight.path)]

    def value(self, weight: Weight) -> Tensor:
        """The live weight, or a merged copy; its sources must be whole."""
        if weight.path is None or self._policy.adapters is None:
            return weight.held.detach()
        return self._policy.adapters.merged(weight.path, weight.held.detach())

    def manifest(self) -> Manifest:
        """What a whole copy consists of."""
        return tuple(
            ParameterSpec(each.name, str(each.held.dtype).removeprefix("torch."), _shape(each.held))
            for each in self.published()
        )

    def buckets(self, limit_bytes: int) -> Iterator[range]:
        """Runs of the manifest's numbers, of about limit_bytes each."""
        start, size, weights = 0, 0, [each.held for each in self.published()]
        for stop, weight in enumerate(weights):
            weight_bytes = math.prod(_shape(weight)) * weight.element_size()
            if stop > start and size + weight_bytes > limit_bytes:
                yield range(start, stop)
                start, size = stop, 0
            size += weight_bytes
        yield range(start, len(weights))


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a state dict that has all but what is frozen.

    Raises:
        ValueError: it is of other weights.
    """
    known = dict(dst.named_parameters(remove_duplicate=False))
    missing, unexpected = dst.load_state_dict(src, strict=False)
    lacking = [name for name in missing if name not in known or known[name].requires_grad]
    if lacking or unexpected:
        raise ValueError(f"it is of other weights, {[*lacking, *unexpected][0]} for one")


def _place(adapters: Adapters, name: str, held: Tensor) -> Weight:
    plain, path = adapters.place(name)
    return Weight(plain, held, path)


def _shape(weight: Tensor) -> tuple[int, ...]:
    """Of the whole weight, also where ZeRO-3 left a rank only a part of it."""
    shape: Sequence[int] = getattr(weight, "ds_shape", weight.shape)
    return tuple(shape)
