"""The smallest entries of each row, exactly so many, without sorting the rows.

A row of 151,936 logits is too long to sort for every token. A sample of it says about where the
cut is, two counts make that a narrow band, and only the band's few entries are sorted:

1. `sampled_band`: quantiles of a sample of the row's entries.
2. `narrowed`: from the counts at its two ends, a band that a few hundred entries lie in.
3. `cut_in_band`: where in it the cut is.

A row whose cut is not where the sample says, or whose band is full of equal entries, is left to
`exact_cut`. Rows are [T, V]; what is said of each is [T, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CELL = 64
"""So many neighbouring columns are counted together, when a band's entries are looked for."""

SAMPLE_STRIDE = 32
"""One column in so many is in the sample."""

_MAX_IN_BAND = 2048
_HALVINGS = 12


class Cut(NamedTuple):
    """An entry is removed where it is below `value`, or equal to it and not after `column`.

    The column is -1 where no entry that equals `value` is removed.
    """

    value: Tensor
    column: Tensor

    def removed(self, rows: Tensor) -> Tensor:
        """Mask [T, V]."""
        columns = torch.arange(rows.shape[-1], device=rows.device)
        return (rows < self.value) | ((rows == self.value) & (columns <= self.column))


class Band(NamedTuple):
    """Values in [low, high)."""

    low: Tensor
    high: Tensor


class BandCounts(NamedTuple):
    """The number of entries below a band, [T, 1], and in it, [T, C / CELL]."""

    below: Tensor
    cells: Tensor


class BandCut(NamedTuple):
    """The cut; the band's entries that it removes, [T, n], inf where there are fewer.

    `missed` are the numbers of the rows that could not be cut.
    """

    cut: Cut
    entries: Tensor
    missed: Tensor


def no_cut(column: Tensor) -> Cut:
    """Nothing is removed; for a column [T, 1] of the rows."""
    return Cut(torch.full_like(column, -torch.inf), torch.full_like(column, -1, dtype=torch.int64))


def exact_cut(rows: Tensor, count: int) -> Cut:
    """Remove the `count` smallest of each row, of equals the first; NaN is the largest."""
    if count == 0:
        return no_cut(rows[:, :1])
    value = rows.kthvalue(count, dim=-1, keepdim=True).values
    missing = count - (rows < value).sum(-1, keepdim=True)
    index = ((rows == value).cumsum(-1) < missing).sum(-1, keepdim=True)
    return Cut(value, index)


def sampled_band(sample: Tensor, share: float) -> Band:
    """About where the smallest `share` of the rows' entries ends, from a sample [T, S] of them.

    It reaches 2.2 standard errors to either side.
    """
    size = sample.shape[-1]
    error = 2.2 * (share * (1 - share) * size) ** 0.5
    scratch = torch.empty_like(sample)
    ends = []
    for target in (share * size - error, share * size + error):
        low, high = sample.aminmax(dim=-1, keepdim=True)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            is_low = count_below(sample, middle, scratch) < target
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        ends.append((low, high))
    return Band(ends[0][0], ends[1][1])


def count_below(rows: Tensor, value: Tensor, scratch: Tensor) -> Tensor:
    """The number of entries below the value, in the type of the rows, as scratch [T, V]."""
    return torch.lt(rows, value, out=scratch).sum(-1, keepdim=True)


def narrowed(band: Band, below_low: Tensor, below_high: Tensor, count: int) -> Band:
    """A band about the cut, from the numbers of entries below the ends of a wider one.

    Entries lie in the wider band as if scattered at random: it reaches 3.5 standard errors
    of that to either side, and a little more for a density that is not even.
    """
    inside = (below_high - below_low).clamp(min=1)
    wanted = count - below_low
    outside = (-wanted).clamp(min=0) + (wanted - inside).clamp(min=0)
    variance = (wanted * (inside - wanted)).clamp(min=0) / inside
    margin = 3.5 * variance.sqrt() + 0.005 * inside + 0.25 * outside + 8
    spacing = (band.high - band.low) / (inside + 1)
    middle = band.low + (wanted + 0.5) * spacing
    return Band(middle - margin * spacing, middle + margin * spacing)


def cut_in_band(rows: Tensor, count: int, band: Band, counts: BandCounts) -> BandCut:
    """Remove the `count` smallest of each row, of equals the first, from its band's entries alone.

    Args:
        rows: [T, C], inf in the columns that only make C a multiple of CELL.
    """
    inside = counts.cells.sum(-1, keepdim=True)
    wanted = count - counts.below
    found = (wanted >= 0) & (wanted <= inside) & (inside <= _MAX_IN_BAND)
    entries, columns = _entries(rows, band, counts.cells * found)
    values, order = entries.sort(stable=True, dim=-1)
    last = (wanted.long() - 1).clamp(0, values.shape[-1] - 2)
    value, next_value = values.gather(-1, last), values.gather(-1, last + 1)
    index = columns.gather(-1, order.gather(-1, last))
    # Where no equal of it is kept, one comparison decides.
    is_tied = (value == next_value) & (wanted > 0)
    above = torch.nextafter(value, torch.full_like(value, torch.inf))
    untied = torch.where(wanted > 0, above, band.low)
    is_removed = torch.arange(values.shape[-1], device=rows.device) < wanted
    return BandCut(
        Cut(torch.where(is_tied, value, untied), torch.where(is_tied, index, -1)),
        torch.where(is_removed & found, values, torch.inf),
        (~found).squeeze(-1).nonzero().squeeze(-1),
    )


def _entries(rows: Tensor, band: Band, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The band's entries in cells that count any, and their columns; both [T, n], in order.

    A row has at least two places more than entries; inf is there.
    """
    row, cell = cells.nonzero(as_tuple=True)
    values = rows.view(-1, CELL).index_select(0, row * cells.shape[-1] + cell)
    is_inside = (values >= band.low[row]) & (values < band.high[row])
    hit, offset = is_inside.nonzero(as_tuple=True)
    row, column = row[hit], cell[hit] * CELL + offset
    lengths = row.bincount(minlength=len(rows))
    place = torch.arange(len(row), device=rows.device) - (lengths.cumsum(0) - lengths)[row]
    shape = len(rows), int(lengths.max()) + 2
    entries = rows.new_full(shape, torch.inf)
    columns = torch.zeros(shape, dtype=torch.int64, device=rows.device)
    entries[row, place], columns[row, place] = values[hit, offset], column
    return entries, columns
