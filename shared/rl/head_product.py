"""Logits as products of hidden states and an output embedding, a tile at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.softmax_sums import padded, tiles
from shared.rl.tile_work import CompiledWork, InPlaceWork, TileWork


class HeadOptions(NamedTuple):
    """What carries no gradient.

    `num_removed` is None without a clamp. Products have the type `product`.
    """

    temperature: float
    num_removed: int | None
    chunk: int
    with_mean_pull: bool
    product: torch.dtype
    is_compiled: bool


class HeadProduct:
    """Of hidden [T, D] and weight [V, D]; `chunks` cut the tokens, `blocks` the vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, options: HeadOptions) -> None:
        self.hidden = hidden.detach().to(options.product)
        self.weight = weight.detach()
        self.wide = torch.promote_types(options.product, torch.float32)
        self.temperature = options.temperature
        self._is_compiled = options.is_compiled
        self._chunk = max(1, min(options.chunk, len(hidden)))
        self.chunks = _token_slices(len(hidden), self._chunk)
        self.blocks = tiles(self._chunk, len(weight), hidden.device)

    def block_weight(self, block: slice) -> Tensor:
        """[B, D]."""
        return self.weight[block].to(self.hidden.dtype)

    def write(self, out: Tensor, chunk: slice, block_weight: Tensor) -> Tensor:
        """The logits [C, B] of a tile."""
        if out.dtype == self.hidden.dtype:
            torch.mm(self.hidden[chunk], block_weight.T, out=out)
        else:
            out.copy_(self.hidden[chunk] @ block_weight.T)
        return out if self.temperature == 1 else out.div_(self.temperature)

    def new_logits(self) -> Tensor:
        """Room for a chunk's, as `LogitRows` has them."""
        vocabulary = len(self.weight)
        rows = min(self._chunk, len(self.hidden))
        logits = self.hidden.new_empty(rows, padded(vocabulary), dtype=self.wide)
        logits[:, vocabulary:] = torch.inf
        return logits

    def column(self, num_rows: int) -> Tensor:
        """A number a row, of the logits' type."""
        return self.hidden.new_zeros(num_rows, 1, dtype=self.wide)

    def work(self) -> TileWork:
        """For its tiles."""
        like = self.hidden.new_empty(0, dtype=self.wide)
        if self._is_compiled:
            return CompiledWork(like)
        return InPlaceWork(like, self._chunk * padded(self.blocks[0].stop))


def _token_slices(num_tokens: int, chunk: int) -> list[slice]:
    """At least one. The first is the short one, because the last one's logits are kept."""
    ends = list(range(num_tokens, 0, -chunk)) or [0]
    return [slice(max(0, end - chunk), end) for end in reversed(ends)]
