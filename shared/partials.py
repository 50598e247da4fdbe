"""Completions in the making, kept beside the entry that asked for them.

A replica saves what it has sampled of a group in pieces, as it goes. When it dies, whoever takes
the entry over loads them and goes on from there. A group that was handed on is dropped here.

Only the holder of an entry writes: a piece is taken from the consumer that the entry was delivered
to last, in that very delivery. So a replica that was only thought dead cannot put its tokens after
those of its successor, and nothing is kept of an entry that is done.

What is kept of a group is bounded by `group_size * max_completion_tokens` tokens, 8 bytes and a
little each, and there are never more groups than pending prompts. `EXPIRY_SECONDS` after its last
piece a group is forgotten: that is for what a crash left between handing a group on and dropping
it, since an entry's id never comes again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.codec import decode_completion, encode_completion
from shared.errors import StreamError
from shared.records import Completion, VersionRun
from shared.stream import Entry

_PLACE = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one completion of a group.

    Attributes:
        number: of the completion in its group, from 0.
        start: tokens of the completion before these.
    """

    number: int
    start: int
    tokens: Completion


class Partials(Protocol):
    """Pieces of the completions of one stream's entries."""

    async def save(self, entry: Entry, pieces: Sequence[Piece], *, consumer: str) -> bool:
        """Keep these pieces; False, and nothing kept, if the entry is another's now, or done.

        A piece that was saved before is replaced.

        Raises:
            StreamError: the store is out of reach, or full.
        """

    async def load(self, entry: Entry) -> dict[int, Completion]:
        """What is kept of the entry, by the completion's number.

        A completion goes as far as its pieces follow upon each other.

        Raises:
            StreamError: the store is out of reach, or holds what is no completion.
        """

    async def drop(self, entry: Entry, *, consumer: str) -> None:
        """Forget the entry's pieces, unless it is in work at another consumer.

        Raises:
            StreamError: the store is out of reach.
        """


def append_runs(runs: list[VersionRun], more: Iterable[VersionRun]) -> None:
    """Put version runs behind others, in place; equal neighbours become one."""
    for run in more:
        if runs and runs[-1].policy_version == run.policy_version:
            run = VersionRun(run.policy_version, runs.pop().num_tokens + run.num_tokens)
        runs.append(run)


def encode_pieces(pieces: Iterable[Piece]) -> dict[bytes, bytes]:
    """A payload for each piece, named by its place in the group."""
    return {
        b"%d/%d" % (piece.number, piece.start): encode_completion(piece.tokens) for piece in pieces
    }


def decode_pieces(fields: Mapping[bytes, bytes]) -> dict[int, Completion]:
    """The completions that the pieces make, as `Partials.load` says.

    Raises:
        StreamError: a name or a payload is malformed.
    """
    found: dict[int, dict[int, bytes]] = {}
    for name, payload in fields.items():
        number, _, start = name.decode(errors="replace").partition("/")
        if not (_PLACE.fullmatch(number) and _PLACE.fullmatch(start)):
            raise StreamError(f"malformed piece: {name!r} is no place in a group")
        found.setdefault(int(number), {})[int(start)] = payload
    return {number: _joined(pieces) for number, pieces in found.items() if 0 in pieces}


def _joined(pieces: Mapping[int, bytes]) -> Completion:
    token_ids, logprobs = array("I"), array("f")
    runs: list[VersionRun] = []
    is_truncated = False
    while (payload := pieces.get(len(token_ids))) is not None:
        piece = decode_completion(payload)
        token_ids += piece.token_ids
        logprobs += piece.behaviour_logprobs
        append_runs(runs, piece.version_runs)
        is_truncated = piece.is_truncated
    return Completion(token_ids, logprobs, tuple(runs), is_truncated)
