"""What the streams do on the server in one step, in Lua: all of it happens, or none.

Two keys stand beside each stream. `sizes` is a hash of payload bytes by entry id, with their sum
under `sum`: it makes the bytes of a stream exact, and whoever finds that it has not one field for
each entry makes it anew from the stream itself. `recent` is a sorted set of the calls that have
appended lately, by time: redis-py repeats a call whose reply was lost, and finds itself there.

Every key is passed in KEYS and all keys of a run share a hash tag, as a cluster demands. Nothing
here is newer than Redis 6.2.
"""

from __future__ import annotations

RECENT_MS = 600_000
"""A call is remembered this long: twice what the client's retries last."""

RECENT_CALLS = 65_536
"""And no more calls than this; at 100 puts a second that is more than the ten minutes."""

_COMMON = """
local function held_bytes(stream, sizes)
  local length, known = redis.call('XLEN', stream), redis.call('HLEN', sizes)
  local sum = redis.call('HGET', sizes, 'sum')
  if sum and known == length + 1 then return tonumber(sum) end
  if length == 0 and known == 0 then return 0 end
  redis.call('DEL', sizes)
  local total, start = 0, '-'
  repeat
    local page = redis.call('XRANGE', stream, start, '+', 'COUNT', 100)
    for _, entry in ipairs(page) do
      redis.call('HSET', sizes, entry[1], #entry[2][2])
      total = total + #entry[2][2]
      start = '(' .. entry[1]
    end
  until #page == 0
  redis.call('HSET', sizes, 'sum', total)
  return total
end

local function is_full(stream, sizes, max_items, max_bytes)
  local bytes = held_bytes(stream, sizes)
  return redis.call('XLEN', stream) >= tonumber(max_items) or bytes >= tonumber(max_bytes)
end

local function append(stream, sizes, payload)
  local id = redis.call('XADD', stream, '*', 'd', payload)
  redis.call('HSET', sizes, id, #payload)
  redis.call('HINCRBY', sizes, 'sum', #payload)
  return id
end

local function remove(stream, sizes, group, id)
  local size = redis.call('HGET', sizes, id)
  if not size then return end
  redis.call('XACK', stream, group, id)
  redis.call('XDEL', stream, id)
  redis.call('HDEL', sizes, id)
  redis.call('HINCRBY', sizes, 'sum', -tonumber(size))
end
"""

PUT = (
    _COMMON
    + f"""
local stream, sizes, recent = KEYS[1], KEYS[2], KEYS[3]
local max_items, max_bytes, payload, call = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('ZSCORE', recent, call) then return 1 end
if is_full(stream, sizes, max_items, max_bytes) then return 0 end
local now = tonumber(string.match(append(stream, sizes, payload), '^%d+'))
redis.call('ZADD', recent, now, call)
redis.call('ZREMRANGEBYSCORE', recent, '-inf', now - {RECENT_MS})
redis.call('ZREMRANGEBYRANK', recent, 0, -{RECENT_CALLS + 1})
return 1
"""
)
"""KEYS stream, sizes, recent; ARGV items, bytes, payload, call. 0 if the stream is full."""

FINISH = (
    _COMMON
    + """
local stream, sizes, output, output_sizes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, id, max_items, max_bytes, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
held_bytes(stream, sizes)
if redis.call('HEXISTS', sizes, id) == 0 then return 1 end
if is_full(output, output_sizes, max_items, max_bytes) then return 0 end
append(output, output_sizes, payload)
remove(stream, sizes, group, id)
return 1
"""
)
"""KEYS stream, sizes, output, its sizes; ARGV group, id, items, bytes, payload. 0 if full.

An entry that is not in the stream any more was finished before, so that a repeated call does
nothing and says 1 again.
"""

ACKNOWLEDGE = (
    _COMMON
    + """
held_bytes(KEYS[1], KEYS[2])
for index = 2, #ARGV do remove(KEYS[1], KEYS[2], ARGV[1], ARGV[index]) end
"""
)
"""KEYS stream, sizes; ARGV group, ids."""

DEPTH = (
    _COMMON
    + """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
return {redis.call('XLEN', KEYS[1]), held_bytes(KEYS[1], KEYS[2]), pending[1], pending[2]}
"""
)
"""KEYS stream, sizes; ARGV group. Entries, their bytes, pending entries, the oldest one's id."""
