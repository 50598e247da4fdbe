"""What is computed from a tile of logits: sums of e^x and e^x x, and gradients.

x is a logit less the highest of its row. There are two ways. In place, in matrices that are written
over again and again and so stay in a processor's cache; a function of torch after the other reads
and writes them there. Or compiled by torch, at the first use in a process, into as few kernels as
it takes passes: where no cache holds a tile, as on a GPU, every pass costs its bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FLOOR = -1e4
"""A logit so far below the highest has probability 0 in every number type, and is finite."""

_LOG2_E = 1 / math.log(2)


class Slopes(NamedTuple):
    """The gradient of each token's logits as a function of x, but for that of its target.

        e^x (bend x + offset + [kept] (kept_bend x + kept_offset))

    Each is [T, 1]; `kept` has both columns. None where it is 0 for every token.
    """

    offset: Tensor
    bend: Tensor | None
    kept: Tensor | None

    def at(self, tokens: slice) -> Slopes:
        """Those of some tokens."""
        bend, kept = (None if each is None else each[tokens] for each in self[1:])
        return Slopes(self.offset[tokens], bend, kept)


class TileWork(Protocol):
    """A tile is [T, B], `peak` [T, 1]; what is returned is of use until the next call."""

    def room(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix [rows, columns]; what is in it is of no use."""

    def sums(self, tile: Tensor, peak: Tensor, *, with_squares: bool) -> tuple[Tensor, ...]:
        """Sums of e^x and e^x x, and of e^2x and e^2x x if asked for, [T, 1] each.

        The tile may be the room "x" itself, which is then written over; so it may be below.
        """

    def masked_sums(self, tile: Tensor, peak: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of e^x and e^x x where the mask is 1, and not 0."""

    def gradient(self, tile: Tensor, peak: Tensor, slopes: Slopes, mask: Tensor | None) -> Tensor:
        """As `Slopes` says, [T, B]; with a mask, which may be written over, if it has `kept`."""


class InPlaceWork:
    """In place."""

    def __init__(self, like: Tensor, size: int) -> None:
        """Rooms have the type and place of `like`, and at most `size` entries."""
        self._like, self._size = like, size
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, rows: int, columns: int) -> Tensor:
        """The matrix of this name."""
        if name not in self._rooms:
            self._rooms[name] = self._like.new_empty(self._size)
        return self._rooms[name][: rows * columns].view(rows, columns)

    def sums(self, tile: Tensor, peak: Tensor, *, with_squares: bool) -> tuple[Tensor, ...]:
        x, exps = self._exponentials(tile, peak)
        first = weighted_sums(exps, x)
        return (*first, *weighted_sums(exps.square_(), x)) if with_squares else first

    def masked_sums(self, tile: Tensor, peak: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, exps = self._exponentials(tile, peak)
        return weighted_sums(exps.mul_(mask), x)

    def gradient(self, tile: Tensor, peak: Tensor, slopes: Slopes, mask: Tensor | None) -> Tensor:
        x, exps = self._exponentials(tile, peak)
        offset, bend, kept = slopes
        if mask is not None and kept is not None:
            line = torch.mul(x, kept[:, :1], out=self.room("line", *x.shape))
            mask.mul_(line.add_(kept[:, 1:]))
        factor = offset if bend is None else x.mul_(bend).add_(offset)
        return exps.mul_(factor if mask is None else mask.add_(factor))

    def _exponentials(self, tile: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        """(x, e^x)."""
        x = torch.sub(tile, peak, out=self.room("x", *tile.shape)).clamp_(min=FLOOR)
        # On a CPU torch's exp2 takes a third of the time of its exp.
        return x, torch.mul(x, _LOG2_E, out=self.room("exp", *tile.shape)).exp2_()


class CompiledWork:
    """By kernels that torch compiles."""

    def __init__(
        self,
        like: Tensor,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        """Rooms have the type and place of `like`; `compiled` is for tests without a compiler."""
        self._like = like
        self._compiled = compiled or _compiled

    def room(self, name: str, rows: int, columns: int) -> Tensor:
        """A new one each time: where memory is kept by torch, that costs nothing."""
        return self._like.new_empty(rows, columns)

    def sums(self, tile: Tensor, peak: Tensor, *, with_squares: bool) -> tuple[Tensor, ...]:
        sums: tuple[Tensor, ...] = _compiled(_tile_sums)(tile, peak, with_squares)
        return sums

    def masked_sums(self, tile: Tensor, peak: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        total, centred = _compiled(_masked_sums)(tile, peak, mask)
        return total, centred

    def gradient(self, tile: Tensor, peak: Tensor, slopes: Slopes, mask: Tensor | None) -> Tensor:
        gradient: Tensor = _compiled(_gradient)(tile, peak, *slopes, mask)
        return gradient


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once a process; tiles have different sizes, for which nothing is compiled anew."""
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


def weighted_sums(exps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of e^x and e^x x, [T, 1] each."""
    return exps.sum(-1, keepdim=True), torch.linalg.vecdot(exps, x).unsqueeze(-1)


def _distance(tile: Tensor, peak: Tensor) -> Tensor:
    return (tile - peak).clamp(min=FLOOR)


def _tile_sums(tile: Tensor, peak: Tensor, with_squares: bool) -> tuple[Tensor, ...]:
    x = _distance(tile, peak)
    exps = x.exp()
    sums = [exps, exps * x]
    if with_squares:
        sums += [exps * exps, exps * exps * x]
    return tuple(each.sum(-1, keepdim=True) for each in sums)


def _masked_sums(tile: Tensor, peak: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    x = _distance(tile, peak)
    exps = x.exp() * mask
    return exps.sum(-1, keepdim=True), (exps * x).sum(-1, keepdim=True)


def _gradient(
    tile: Tensor,
    peak: Tensor,
    offset: Tensor,
    bend: Tensor | None,
    kept: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    x = _distance(tile, peak)
    factor = offset if bend is None else bend * x + offset
    if mask is not None and kept is not None:
        factor = factor + mask * (kept[:, :1] * x + kept[:, 1:])
    return x.exp() * factor
