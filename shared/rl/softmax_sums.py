"""Sums of exponentials over rows of logits that are too long for a second matrix of their size.

    total = sum of e^x,    centred = sum of e^x x,    with x = z - the row's highest logit

and the same over the tokens that a clamp removes. Entropies, removed mass and second moments
follow without a difference of large numbers: no e^x x is above 0.

Logits come in tiles that a processor's cache holds, and are summed while they are there; which of
them a clamp removes is known only when all have come. Within a tile sums have the type of the
logits, from tile to tile they are in float64. Masks are numbers, 0 or 1, because torch is several
times as slow with truth values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.smallest import (
    CELL,
    SAMPLE_STRIDE,
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
from shared.rl.tile_work import FLOOR, TileWork, weighted_sums

LONG_ROW = 16_384
"""From so many tokens on, a sample of the row spares more than it costs."""

_TILE_SIZE = 2**26
_TILE_SIZE_ON_CPU = 2**19
_SIZE_AT_ONCE = 2**20
_ROWS_AT_ONCE = 64


class LogitRows(NamedTuple):
    """Logits [T, C] of `vocabulary` tokens; C is a multiple of CELL, with inf after the last.

    `peak` [T, 1] is the highest of each row, and `blocks` are the columns of the tiles.
    """

    values: Tensor
    vocabulary: int
    peak: Tensor
    blocks: list[slice]


def tiles(num_rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """The columns of each tile of a matrix [num_rows, vocabulary]."""
    size = _TILE_SIZE_ON_CPU if device.type == "cpu" else _TILE_SIZE
    width = max(1, size // max(1, num_rows) // CELL) * CELL
    return [slice(first, min(first + width, vocabulary)) for first in range(0, vocabulary, width)]


def padded(columns: int) -> int:
    """The next multiple of CELL."""
    return -(-columns // CELL) * CELL


class RunningSums:
    """Over the tiles of some rows, which come one after another.

    All sums are relative to the highest logit so far, and follow it when a higher one comes.

    Attributes:
        peak: [T, 1], the highest logit of each row.
        total, centred: [T, 1] float64.
        squares, centred_squares: sums of e^2x and e^2x x, 0 unless they were asked for.
    """

    def __init__(self, column: Tensor, *, with_squares: bool) -> None:
        """No tile has come, of rows for which there is a column [T, 1] of the logits' type."""
        # Not -inf, from which a tile of nothing else has no distance.
        self.peak = torch.full_like(column, torch.finfo(column.dtype).min)
        self._sums = column.new_zeros(4, *column.shape, dtype=torch.float64)
        self.total, self.centred, self.squares, self.centred_squares = self._sums
        self._with_squares = with_squares

    def add(self, tile: Tensor, work: TileWork) -> None:
        """Logits [T, B]."""
        peak = torch.maximum(self.peak, tile.amax(-1, keepdim=True))
        shift = (self.peak - peak).double().clamp_(min=FLOOR)
        self.peak = peak
        _shift(self._sums[:2], shift, shift.exp())
        if self._with_squares:
            _shift(self._sums[2:], shift, (2 * shift).exp())
        _add(self._sums, work.sums(tile, peak, with_squares=self._with_squares))


def removed_sums(rows: LogitRows, num_removed: int, work: TileWork) -> tuple[Tensor, Cut]:
    """(total, centred) over the `num_removed` smallest, [2, T, 1] float64, and where they end."""
    removed, cut = rows.peak.new_zeros(2, *rows.peak.shape, dtype=torch.float64), no_cut(rows.peak)
    missed = torch.arange(len(rows.values) if num_removed else 0, device=rows.peak.device)
    if rows.vocabulary >= LONG_ROW and len(missed) > 0:
        band = _band(rows, num_removed, work)
        cells = rows.values.new_zeros(len(rows.values), rows.values.shape[1] // CELL)
        counts = BandCounts(torch.zeros_like(rows.peak), cells)
        for block in rows.blocks:
            below = _count(rows.values, block, band, counts, work)
            _add(removed, work.masked_sums(rows.values[:, block], rows.peak, below))
        missed = _cut_bands(rows, num_removed, band, counts, cut, removed)
    _cut_exactly(rows, num_removed, missed, cut, removed)
    return removed, cut


def _shift(sums: Tensor, shift: Tensor, factor: Tensor) -> None:
    """(total, centred) of e^x with every x more by `shift`, at most 0, and e^x times `factor`."""
    sums[1].addcmul_(sums[0], shift)
    sums.mul_(factor)


def _add(sums: Tensor, parts: Sequence[Tensor]) -> None:
    """To the first of the sums."""
    for place, part in enumerate(parts):
        sums[place] += part


def _band(rows: LogitRows, num_removed: int, work: TileWork) -> Band:
    """Values about the cut of each row, between which a few hundred of its logits lie."""
    sample = rows.values[:, : rows.vocabulary : SAMPLE_STRIDE].contiguous()
    band = sampled_band(sample, num_removed / rows.vocabulary)
    below_low, below_high = torch.zeros_like(rows.peak), torch.zeros_like(rows.peak)
    for block in rows.blocks:
        tile = rows.values[:, block]
        mask = work.room("mask", *tile.shape)
        below_low += count_below(tile, band.low, mask)
        below_high += count_below(tile, band.high, mask)
    return narrowed(band, below_low, below_high, num_removed)


def _count(values: Tensor, block: slice, band: Band, counts: BandCounts, work: TileWork) -> Tensor:
    """Add a tile to the counts; the mask of what is below the band."""
    tile = values[:, block.start : padded(block.stop)]
    below = torch.lt(tile, band.low, out=work.room("mask", *tile.shape))
    counts.below.add_(below.sum(-1, keepdim=True))
    inside = torch.lt(tile, band.high, out=work.room("inside", *tile.shape)).sub_(below)
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
        _add(removed[:, some], weighted_sums(x.exp(), x))
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
        _add(sums, weighted_sums(x.exp().mul_(mine.removed(values)), x))
        removed[:, some] = sums
        cut.value[some], cut.column[some] = mine
