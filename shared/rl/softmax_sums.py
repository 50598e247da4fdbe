"""Sums of exponentials over rows of logits that are too long for a second matrix of their size.

    total = sum of e^x,    centred = sum of e^x x,    with x = z - the row's highest logit

and the same over the tokens that a clamp removes. Entropies, removed mass and second moments
follow without a difference of large numbers: no e^x x is above 0.

The matrix is read in tiles that a processor's cache holds. Within a tile sums have the type of
the logits, from tile to tile they are in float64. Masks are numbers, 0 or 1, because torch is
several times as slow with truth values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.smallest import (
    CELL,
    Band,
    BandCounts,
    Cut,
    count_below,
    cut_in_band,
    exact_cut,
    narrowed,
    no_cut,
    sampled_band,
)

FLOOR = -1e4
"""A logit so far below the highest has probability 0 in every number type, and is finite."""

LONG_ROW = 16_384
"""From so many tokens on, a sample of the row spares more than it costs."""

_LOG2_E = 1 / math.log(2)
_TILE_SIZE = 2**26
_TILE_SIZE_ON_CPU = 2**19
_SIZE_AT_ONCE = 2**20
_ROWS_AT_ONCE = 64


class LogitRows(NamedTuple):
    """Logits [T, C] of `vocabulary` tokens; C is a multiple of CELL, with inf after the last.

    `peak` [T, 1] is the highest of each row, `sample` one column in SAMPLE_STRIDE, and `blocks`
    are the columns of the tiles.
    """

    values: Tensor
    vocabulary: int
    peak: Tensor
    sample: Tensor
    blocks: list[slice]


class RowSums(NamedTuple):
    """Of each row, [T, 1] in float64; those with e^2x are 0 unless they were asked for."""

    total: Tensor
    centred: Tensor
    squares: Tensor
    centred_squares: Tensor
    removed: Tensor
    removed_centred: Tensor


class Scratch:
    """Matrices that are written over again and again, so that they stay in the cache."""

    def __init__(self, like: Tensor, size: int) -> None:
        """Of the type and place of `like`, with at most `size` entries."""
        self._like, self._size = like, size
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """The matrix of this name, [rows, columns]; what is in it is of no use."""
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._size)
        return self._buffers[name][: rows * columns].view(rows, columns)


def tiles(num_rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """The columns of each tile of a matrix [num_rows, vocabulary]."""
    size = _TILE_SIZE_ON_CPU if device.type == "cpu" else _TILE_SIZE
    width = max(1, size // max(1, num_rows) // CELL) * CELL
    return [slice(first, min(first + width, vocabulary)) for first in range(0, vocabulary, width)]


def padded(columns: int) -> int:
    """The next multiple of CELL."""
    return -(-columns // CELL) * CELL


def exponentials(logits: Tensor, peak: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """(x, e^x) of a tile; `logits` may be the scratch "x" itself."""
    x = torch.sub(logits, peak, out=scratch("x", *logits.shape)).clamp_(min=FLOOR)
    # On a CPU torch's exp2 takes a third of the time of its exp.
    return x, torch.mul(x, _LOG2_E, out=scratch("exp", *logits.shape)).exp2_()


def row_sums(
    rows: LogitRows, *, num_removed: int, with_squares: bool, scratch: Scratch
) -> tuple[RowSums, Cut]:
    """The sums over all tokens and over the `num_removed` smallest, and where these end."""
    sums = rows.peak.new_zeros(6, *rows.peak.shape, dtype=torch.float64)
    band = counts = None
    if num_removed and rows.vocabulary >= LONG_ROW and len(rows.values) > 0:
        band = _band(rows, num_removed, scratch)
        cells = rows.values.new_zeros(len(rows.values), rows.values.shape[1] // CELL)
        counts = BandCounts(torch.zeros_like(rows.peak), cells)
    for block in rows.blocks:
        x, exps = exponentials(rows.values[:, block], rows.peak, scratch)
        _add(sums[:2], exps, x)
        if with_squares:
            _add(sums[2:4], torch.mul(exps, exps, out=scratch("mask", *exps.shape)), x)
        if band is not None and counts is not None:
            below = _count(rows.values, block, band, counts, scratch)
            _add(sums[4:], exps.mul_(below), x)
    cut = no_cut(rows.peak)
    missed = torch.arange(len(rows.values) if num_removed else 0, device=rows.peak.device)
    if band is not None and counts is not None:
        missed = _cut_bands(rows, num_removed, band, counts, cut, sums[4:])
    _cut_exactly(rows, num_removed, missed, cut, sums[4:])
    return RowSums(*sums), cut


def _add(sums: Tensor, exps: Tensor, x: Tensor) -> None:
    sums[0] += exps.sum(-1, keepdim=True)
    sums[1] += torch.linalg.vecdot(exps, x).unsqueeze(-1)


def _band(rows: LogitRows, num_removed: int, scratch: Scratch) -> Band:
    """Values about the cut of each row, between which a few hundred of its logits lie."""
    band = sampled_band(rows.sample, num_removed / rows.vocabulary)
    below_low, below_high = torch.zeros_like(rows.peak), torch.zeros_like(rows.peak)
    for block in rows.blocks:
        tile = rows.values[:, block]
        mask = scratch("mask", *tile.shape)
        below_low += count_below(tile, band.low, mask)
        below_high += count_below(tile, band.high, mask)
    return narrowed(band, below_low, below_high, num_removed)


def _count(
    values: Tensor, block: slice, band: Band, counts: BandCounts, scratch: Scratch
) -> Tensor:
    """Add a tile to the counts; the mask of what is below the band."""
    tile = values[:, block.start : padded(block.stop)]
    below = torch.lt(tile, band.low, out=scratch("mask", *tile.shape))
    counts.below.add_(below.sum(-1, keepdim=True))
    inside = torch.lt(tile, band.high, out=scratch("inside", *tile.shape)).sub_(below)
    cells = counts.cells[:, block.start // CELL : padded(block.stop) // CELL]
    torch.sum(inside.view(*cells.shape, CELL), -1, out=cells)
    return below[:, : block.stop - block.start]


def _cut_bands(
    rows: LogitRows, num_removed: int, band: Band, counts: BandCounts, cut: Cut, removed: Tensor
) -> Tensor:
    """Write the cuts that bands show, and add what they remove of the bands to [2, T, 1].

    Returns:
        The numbers of the rows that are left.
    """
    missed = []
    for first in range(0, len(rows.values), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        found = cut_in_band(
            rows.values[some],
            num_removed,
            Band(band.low[some], band.high[some]),
            BandCounts(counts.below[some], counts.cells[some]),
        )
        cut.value[some], cut.column[some] = found.cut
        x = torch.where(found.entries < torch.inf, found.entries - rows.peak[some], FLOOR)
        _add(removed[:, some], x.exp(), x)
        missed.append(found.missed + first)
    return torch.cat(missed)


def _cut_exactly(
    rows: LogitRows, num_removed: int, places: Tensor, cut: Cut, removed: Tensor
) -> None:
    """Write the cut of the rows in these places, and what it removes, [2, T, 1]."""
    if len(places) == 0:
        return
    for some in torch.split(places, max(1, _SIZE_AT_ONCE // rows.vocabulary)):
        values, peak = rows.values[some, : rows.vocabulary], rows.peak[some]
        mine = exact_cut(values, num_removed)
        x = (values - peak).clamp_(min=FLOOR)
        sums = removed.new_zeros(2, len(some), 1)
        _add(sums, x.exp().mul_(mine.removed(values)), x)
        removed[:, some] = sums
        cut.value[some], cut.column[some] = mine
