"""A batch on its way from rank 0: of each row what all ranks plan by, its tokens to one rank alone.

Rank 0 has read, decoded and admitted the groups, so it hands their tokens on. Were each rank to
read its own from Redis, the one server would send a group to every rank that has a row of it, and
every rank would need a connection, credentials and patience with an outage, amid a step that the
others have entered: `make bench-data` measures both ways.
Log-probs and staleness per token, which a choice over the whole batch looks at, go with the tokens
and are shared over the training device (`services.learner.training`).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from services.learner.batch import Batch, Row
from services.learner.ranks import Ranks

_HEADER = struct.Struct("<II")
_INTEGERS = 6
_NUMBERS = 2


def pack_rows(batch: Batch) -> bytes:
    """All of a batch but tokens and values per token."""
    integers, numbers = array("q"), array("d")
    for row in batch.rows:
        integers.extend(
            (
                row.group,
                row.num_prompt_tokens,
                row.num_completion_tokens,
                row.uid_hash,
                row.staleness,
                row.num_versions,
            )
        )
        numbers.extend((row.reward, row.advantage))
    integers.extend(each.start for each in batch.minibatches)
    header = _HEADER.pack(len(batch.rows), len(batch.minibatches))
    return header + integers.tobytes() + numbers.tobytes()


def unpack_rows(packed: bytes) -> Batch:
    """What `pack_rows` packed: a batch without groups, tokens and values per token."""
    num_rows, num_minibatches = _HEADER.unpack_from(packed)
    integers, numbers = array("q"), array("d")
    end = _HEADER.size + 8 * (_INTEGERS * num_rows + num_minibatches)
    integers.frombytes(packed[_HEADER.size : end])
    numbers.frombytes(packed[end:])
    rows = []
    for number in range(num_rows):
        group, prompt, completion, uid_hash, staleness, versions = integers[
            _INTEGERS * number : _INTEGERS * (number + 1)
        ]
        reward, advantage = numbers[_NUMBERS * number : _NUMBERS * (number + 1)]
        rows.append(
            Row(
                group=group,
                num_prompt_tokens=prompt,
                num_completion_tokens=completion,
                token_ids=None,
                reward=reward,
                advantage=advantage,
                uid_hash=uid_hash,
                staleness=staleness,
                num_versions=versions,
            )
        )
    starts = [*integers[_INTEGERS * num_rows :], num_rows]
    return Batch.of(rows, [range(start, stop) for start, stop in pairwise(starts)])


def take_share(batch: Batch, rows: Sequence[int], ranks: Ranks) -> Batch:
    """The batch with the tokens of these rows, ascending, which rank 0 hands out to this one."""
    chosen = [batch.rows[row] for row in rows]
    size = sum(4 * row.num_tokens + 8 * row.num_completion_tokens for row in chosen)
    return with_tokens(batch, rows, ranks.take(size))


def with_tokens(batch: Batch, rows: Sequence[int], packed: bytes) -> Batch:
    """The batch, of which only the rows were known, with what `pack_tokens` packed."""
    ends = list(accumulate((batch.rows[row].num_tokens for row in rows), initial=0))
    token_ids = array("I", packed[: 4 * ends[-1]])
    middle = (len(packed) + 4 * ends[-1]) // 2
    logprobs = _tensor(packed[4 * ends[-1] : middle], torch.float32)
    ages = _tensor(packed[middle:], torch.int32)
    whole = list(batch.rows)
    for row, (start, stop) in zip(rows, pairwise(ends), strict=True):
        whole[row] = replace(whole[row], token_ids=token_ids[start:stop])
    mine = torch.zeros_like(batch.mask)
    mine[list(rows)] = batch.mask[list(rows)]
    places = mine.nonzero(as_tuple=True)
    return replace(
        batch,
        rows=tuple(whole),
        behaviour_logprobs=batch.behaviour_logprobs.index_put(places, logprobs),
        staleness=batch.staleness.index_put(places, ages),
    )


def pack_tokens(batch: Batch, rows: Sequence[int]) -> bytes:
    """Token ids of whole rows; log-probs, then staleness of completion tokens; 4 bytes each."""
    token_ids = array("I")
    for row in rows:
        held = batch.rows[row].token_ids
        assert held is not None, "rank 0 has all tokens"
        token_ids.extend(held)
    mask = batch.mask[list(rows)]
    values: tuple[Tensor, ...] = (
        batch.behaviour_logprobs[list(rows)][mask],
        batch.staleness[list(rows)][mask].int(),
    )
    return b"".join([token_ids.tobytes(), *(each.numpy().tobytes() for each in values)])


def _tensor(packed: bytes, dtype: torch.dtype) -> Tensor:
    # torch makes no tensor of an empty buffer.
    return torch.frombuffer(bytearray(packed), dtype=dtype) if packed else torch.zeros(0).to(dtype)
