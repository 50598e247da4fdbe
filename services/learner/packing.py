"""Sequences one after another in one row, and an attention that sees each of them alone.

Everything in a decoder but its attention works token by token, and needs to know of a sequence
only its positions, which start again at 0. Attention works on lanes: sequences of like lengths,
side by side, each padded on the right to the first, the longest. Causal attention never looks
right, so no mask is needed and no token can meet one of another sequence. On a GPU in half
precision torch's variable-length flash attention does without lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

LANE_FILL = 0.75
"""A sequence shorter than this share of a lane's first opens a lane of its own: bounds padding in
attention by a third, and keeps lanes, whose kernels each cost a start, few."""

PACKED = "isentrope_packed"
"""Name of the attention among transformers' own."""

MAX_FLASH_HEAD = 256
"""Widest head that flash attention takes."""


class Lane(NamedTuple):
    """Sequences side by side."""

    num_sequences: int
    width: int

    def split(self, values: Tensor) -> Tensor:
        """[num_sequences * width, heads, D] to [num_sequences, heads, width, D]."""
        return values.view(*self, *values.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a row of T tokens lie, and where attention takes them.

    Attributes:
        position_ids: [T], from 0 in each sequence.
        boundaries: [S + 1] int32, the sequences' ends after a 0.
        longest: tokens of the longest sequence.
        lanes: they hold A = sum of num_sequences * width places.
        places: [A], the token of each place; token 0 where there is padding.
        returns: [T], the place of each token.
    """

    position_ids: Tensor
    boundaries: Tensor
    longest: int
    lanes: tuple[Lane, ...]
    places: Tensor
    returns: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """Of sequences with these lengths, none 0, in their order."""
        sizes = torch.tensor(lengths)
        boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        starts_in_lanes, lanes = torch.zeros_like(sizes), []
        places, end = [], 0
        for numbers in _lanes(order, lengths):
            width = lengths[numbers[0]]
            lanes.append(Lane(len(numbers), width))
            columns = torch.arange(width)
            tokens = boundaries[numbers].unsqueeze(1) + columns
            places.append(torch.where(columns < sizes[numbers].unsqueeze(1), tokens, 0).flatten())
            starts_in_lanes[numbers] = end + width * torch.arange(len(numbers))
            end += width * len(numbers)
        position_ids = torch.arange(int(boundaries[-1]))
        position_ids -= boundaries[:-1].repeat_interleave(sizes)
        return cls(
            position_ids=position_ids,
            boundaries=boundaries.int(),
            longest=max(lengths),
            lanes=tuple(lanes),
            places=torch.cat(places),
            returns=starts_in_lanes.repeat_interleave(sizes) + position_ids,
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """Where each sequence has a line of its own, as long as the longest, padded on the right.

        Returns:
            [S, longest] the token of each place, some other one where there is padding; and [T]
            the place of each token, counted line by line.
        """
        starts, ends = self.boundaries[:-1].long(), self.boundaries[1:].long()
        columns = torch.arange(self.longest, device=starts.device)
        tokens = (starts.unsqueeze(1) + columns).clamp(max=len(self.position_ids) - 1)
        lines = torch.arange(len(starts), device=starts.device).repeat_interleave(ends - starts)
        return tokens, lines * self.longest + self.position_ids

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        return Packing(
            position_ids=self.position_ids.to(device),
            boundaries=self.boundaries.to(device),
            longest=self.longest,
            lanes=self.lanes,
            places=self.places.to(device),
            returns=self.returns.to(device),
        )


def _lanes(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences, longest first, in runs of like lengths."""
    lanes: list[list[int]] = []
    for number in order:
        if lanes and lengths[number] >= LANE_FILL * lengths[lanes[-1][0]]:
            lanes[-1].append(number)
        else:
            lanes.append([number])
    return lanes


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, in the form that transformers calls.

    Args:
        query: [1, H, T, D].
        key, value: [1, G, T, D], H a multiple of G.
        attention_mask: not used; None, as transformers gives to an attention that it has no mask
            for, and of a model that brings its own `services.learner.zero` finds the difference.
        packing: None from a model that does not hand it on, whose row is then one sequence; the
            difference is found there as well.
        sliding_window: tokens that each one sees, itself among them; all before it if None.
    Returns:
        [1, T, H, D].
    """
    packing = packing or Packing.of([query.shape[2]]).to(query.device)
    attend = _flash_attention if takes_flash(query, value) else _lane_attention
    window = None if sliding_window is None or sliding_window >= packing.longest else sliding_window
    return attend(query, key, value, packing, scaling, window), None


def takes_flash(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length kernel serves this device, precision and head."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_half and query.shape[-1] == value.shape[-1] <= MAX_FLASH_HEAD


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.boundaries,
        packing.boundaries,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)


def _lane_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Gather the lanes, attend in each, put the tokens back in their order."""
    # [A, heads, D]: a token's numbers lie together, and are copied together.
    queries, keys, values = (
        each[0].transpose(0, 1).index_select(0, packing.places) for each in (query, key, value)
    )
    attended, start = [], 0
    for lane in packing.lanes:
        end = start + lane.num_sequences * lane.width
        narrow = window is not None and window < lane.width
        found = nn.functional.scaled_dot_product_attention(
            lane.split(queries[start:end]),
            lane.split(keys[start:end]),
            lane.split(values[start:end]),
            attn_mask=_band(lane.width, window, query.device) if narrow else None,
            is_causal=not narrow,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        attended.append(found.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(attended).index_select(0, packing.returns).unsqueeze(0)


def _band(width: int, window: int | None, device: torch.device) -> Tensor:
    """[width, width] bool: the last `window` tokens up to each one, itself among them."""
    assert window is not None
    every = torch.ones(width, width, dtype=torch.bool, device=device)
    return every.tril().triu(1 - window)


AttentionInterface.register(PACKED, packed_attention)
