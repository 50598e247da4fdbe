"""What the streams do on the server in one step, in Lua: all of it happens, or none.

Three keys stand beside each stream. `sizes` is a hash of payload bytes by entry id, with their sum
under `sum`: it makes the bytes of a stream exact, and whoever finds that it has not one field for
each entry, or no number for the sum, makes it anew from the stream itself, since one role writes
what the scripts of another read. `labels` is a hash of labels by entry id. `recent` is a sorted set
of the calls that have appended lately, by time: redis-py repeats a call whose reply was lost, and
finds itself there.

Every key is passed in KEYS and all keys of a run share a hash tag, as a cluster demands. Nothing
here is newer than Redis 6.2.
"""

from __future__ import annotations

RECENT_MS = 600_000
"""A call is remembered this long: twice what the client's retries last."""

RECENT_CALLS = 65_536
"""And no more calls than this; at 100 puts a second that is more than the ten minutes."""

_COMMON = """
local function whole(text)
  return text and #text < 16 and tonumber(string.match(text, '^%d+$')) or nil
end

local function held_bytes(stream, sizes)
  local length, known = redis.call('XLEN', stream), redis.call('HLEN', sizes)
  local sum = whole(redis.call('HGET', sizes, 'sum'))
  if sum and known == length + 1 then return sum end
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

local function append(stream, sizes, labels, payload, label)
  local id = redis.call('XADD', stream, '*', 'd', payload)
  if label and label ~= '' then redis.call('HSET', labels, id, label) end
  redis.call('HSET', sizes, id, #payload)
  redis.call('HINCRBY', sizes, 'sum', #payload)
  return id
end

local function remove(stream, sizes, labels, group, id)
  local size = redis.call('HGET', sizes, id)
  if not size then return end
  redis.call('XACK', stream, group, id)
  redis.call('XDEL', stream, id)
  redis.call('HDEL', sizes, id)
  redis.call('HDEL', labels, id)
  if whole(size) then
    redis.call('HINCRBY', sizes, 'sum', -whole(size))
  else
    redis.call('HDEL', sizes, 'sum')
  end
end
"""

PUT = (
    _COMMON
    + f"""
local stream, sizes, labels, recent = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local max_items, max_bytes, payload, label, call = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('ZSCORE', recent, call) then return 1 end
if is_full(stream, sizes, max_items, max_bytes) then return 0 end
local now = tonumber(string.match(append(stream, sizes, labels, payload, label), '^%d+'))
redis.call('ZADD', recent, now, call)
redis.call('ZREMRANGEBYSCORE', recent, '-inf', now - {RECENT_MS})
redis.call('ZREMRANGEBYRANK', recent, 0, -{RECENT_CALLS + 1})
return 1
"""
)
"""KEYS stream, sizes, labels, recent; ARGV items, bytes, payload, label or '', call. 0 if full."""

FINISH = (
    _COMMON
    + """
local stream, sizes, labels = KEYS[1], KEYS[2], KEYS[3]
local output, output_sizes, output_labels = KEYS[4], KEYS[5], KEYS[6]
local group, id, max_items, max_bytes, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
held_bytes(stream, sizes)
if redis.call('HEXISTS', sizes, id) == 0 then return 1 end
if is_full(output, output_sizes, max_items, max_bytes) then return 0 end
append(output, output_sizes, output_labels, payload, redis.call('HGET', labels, id))
remove(stream, sizes, labels, group, id)
return 1
"""
)
"""KEYS stream, sizes, labels, the same of the output; ARGV group, id, items, bytes, payload.
0 if the output is full.

An entry that is not in the stream any more was finished before, so that a repeated call does
nothing and says 1 again.
"""

ACKNOWLEDGE = (
    _COMMON
    + """
held_bytes(KEYS[1], KEYS[2])
for index = 2, #ARGV do remove(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[index]) end
"""
)
"""KEYS stream, sizes, labels; ARGV group, ids."""

LABELS = (
    _COMMON
    + """
held_bytes(KEYS[1], KEYS[2])
local found, labels = {}, redis.call('HGETALL', KEYS[3])
for index = 1, #labels, 2 do
  if redis.call('HEXISTS', KEYS[2], labels[index]) == 1 then
    table.insert(found, labels[index])
    table.insert(found, labels[index + 1])
  end
end
return found
"""
)
"""KEYS stream, sizes, labels. Id, label, id, label, ... of the entries that are there."""

GIVE_BACK = """
local held, count = {}, 0
for index = 6, #ARGV do held[ARGV[index]] = true end
local group, consumer, nobody, idle_ms, most = unpack(ARGV, 1, 5)
local mine = redis.call('XPENDING', KEYS[1], group, 'IDLE', idle_ms, '-', '+', most, consumer)
for _, item in ipairs(mine) do
  local id, idle, before = item[1], item[3], math.max(0, item[4] - 1)
  if not held[id] then
    local as_it_was = {'IDLE', idle, 'RETRYCOUNT', before, 'JUSTID'}
    redis.call('XCLAIM', KEYS[1], group, nobody, 0, id, unpack(as_it_was))
    count = count + 1
  end
end
return count
"""
"""KEYS stream; ARGV group, consumer, who is nobody, idle milliseconds, entries at most, ids held.
Entries given back, each as if the consumer had never had it."""

DEPTH = (
    _COMMON
    + """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
return {redis.call('XLEN', KEYS[1]), held_bytes(KEYS[1], KEYS[2]), pending[1], pending[2]}
"""
)
"""KEYS stream, sizes; ARGV group. Entries, their bytes, pending entries, the oldest one's id."""

HOLDERS = """
local found = {}
local consumers = redis.call('XPENDING', KEYS[1], ARGV[1])[4]
for _, consumer in ipairs(consumers or {}) do
  local name, count, oldest = consumer[1], tonumber(consumer[2]), -1
  for _ = 1, count do
    local idle = {'IDLE', oldest + 1, '-', '+', 1, name}
    local older = redis.call('XPENDING', KEYS[1], ARGV[1], unpack(idle))[1]
    if not older then break end
    oldest = older[3]
  end
  table.insert(found, {name, count, oldest})
end
return found
"""
"""KEYS stream; ARGV group. Consumer, pending entries, milliseconds since the oldest's delivery.

Entries come in order of their ids, and one that was reclaimed is old by id and young by delivery.
So the server is asked for one that is older, again and again, which seldom takes a third time.
"""
