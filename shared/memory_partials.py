"""The in-memory twin of `shared.redis_partials`, for tests; it passes the same contract."""

from __future__ import annotations

from collections.abc import Sequence

from shared.memory_stream import MemoryStream
from shared.partials import Piece, decode_pieces, encode_pieces
from shared.records import Completion
from shared.stream import Entry


class MemoryPartials:
    """`Partials` of the entries of a `MemoryStream`."""

    def __init__(self, stream: MemoryStream) -> None:
        self._stream = stream
        self._pieces: dict[str, dict[bytes, bytes]] = {}

    async def save(self, entry: Entry, pieces: Sequence[Piece], *, consumer: str) -> bool:
        if self._stream.delivery(entry.id) != (consumer, entry.deliveries):
            return False
        self._pieces.setdefault(entry.id, {}).update(encode_pieces(pieces))
        return True

    async def load(self, entry: Entry) -> dict[int, Completion]:
        return decode_pieces(self._pieces.get(entry.id, {}))

    async def drop(self, entry: Entry, *, consumer: str) -> None:
        delivery = self._stream.delivery(entry.id)
        if delivery is None or delivery[0] == consumer:
            self._pieces.pop(entry.id, None)
