"""`shared.partials.Partials` on a Redis server: one hash for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.metrics.rollout import ROLLOUT_SAVED_BYTES
from shared.partials import Piece, decode_pieces, encode_pieces
from shared.records import Completion
from shared.redis_connection import translated
from shared.stream import Entry

EXPIRY_SECONDS = 86_400
"""After its last piece an entry is forgotten: for what a crash left between handing a group on
and dropping its pieces, which nobody asks for any more."""

_HELD_BY = """
local function held_by(stream, group, id)
  local found = redis.pcall('XPENDING', stream, group, id, id, 1)
  if found.err or not found[1] then return nil, nil end
  return found[1][2], found[1][4]
end
"""

_SAVE = (
    _HELD_BY
    + """
local holder, deliveries = held_by(KEYS[1], ARGV[1], ARGV[2])
if holder ~= ARGV[3] or deliveries ~= tonumber(ARGV[4]) then return 0 end
for index = 6, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[index], ARGV[index + 1]) end
redis.call('EXPIRE', KEYS[2], ARGV[5])
return 1
"""
)
"""KEYS stream, pieces; ARGV group, id, consumer, deliveries, expiry, then names and pieces."""

_DROP = (
    _HELD_BY
    + """
local holder = held_by(KEYS[1], ARGV[1], ARGV[2])
if holder and holder ~= ARGV[3] then return 0 end
return redis.call('DEL', KEYS[2])
"""
)
"""KEYS stream, pieces; ARGV group, id, consumer."""


class RedisPartials:
    """Beside one stream, on its server.

    Args:
        prefix: of every key of the run.
        stream: the name of the stream, which is also that of its consumer group.
    """

    def __init__(self, client: Any, *, prefix: str, stream: str) -> None:
        self._client: Any = client
        self._key = prefix + stream
        self._group = stream
        self._save = client.register_script(_SAVE)
        self._drop = client.register_script(_DROP)

    async def save(self, entry: Entry, pieces: Sequence[Piece], *, consumer: str) -> bool:
        fields = encode_pieces(pieces)
        named = [each for field in fields.items() for each in field]
        with translated(self._key):
            kept = await self._save(
                keys=[self._key, self._pieces_of(entry)],
                args=[self._group, entry.id, consumer, entry.deliveries, EXPIRY_SECONDS, *named],
            )
        if kept:
            ROLLOUT_SAVED_BYTES.inc(sum(map(len, fields.values())))
        return bool(kept)

    async def load(self, entry: Entry) -> dict[int, Completion]:
        with translated(self._key):
            return decode_pieces(await self._client.hgetall(self._pieces_of(entry)))

    async def drop(self, entry: Entry, *, consumer: str) -> None:
        with translated(self._key):
            await self._drop(
                keys=[self._key, self._pieces_of(entry)], args=[self._group, entry.id, consumer]
            )

    def _pieces_of(self, entry: Entry) -> str:
        return f"{self._key}:pieces:{entry.id}"
