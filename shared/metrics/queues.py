"""The streams, and the Redis that holds them."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

QUEUE_LENGTH = Gauge(
    "isentrope_queue_length_messages", "Messages in a stream, waiting and pending.", ["stream"]
)
QUEUE_CAPACITY = Gauge(
    "isentrope_queue_capacity_messages", "Messages a stream may hold.", ["stream"]
)
QUEUE_BYTES = Gauge(
    "isentrope_queue_bytes", "Payload of a stream's messages, waiting and pending.", ["stream"]
)
QUEUE_CAPACITY_BYTES = Gauge(
    "isentrope_queue_capacity_bytes", "Payload at which a stream is full.", ["stream"]
)
QUEUE_LAG = Gauge(
    "isentrope_queue_lag_messages", "Messages never delivered to a consumer.", ["stream"]
)
QUEUE_PENDING = Gauge(
    "isentrope_queue_pending_messages", "Messages delivered and not acknowledged.", ["stream"]
)
QUEUE_OLDEST = Gauge(
    "isentrope_queue_oldest_pending_seconds", "Age of the oldest pending message.", ["stream"]
)
REDIS_MEMORY = Gauge(
    "isentrope_redis_memory_bytes",
    "Memory of the server: used, and the most that it may use (0: no bound).",
    ["kind"],
)
REDIS_PERSISTENCE = Gauge(
    "isentrope_redis_persistence_ok",
    "1 if the last write of this kind to disk succeeded, else 0.",
    ["kind"],
)
BACKPRESSURE_SECONDS = Counter(
    "isentrope_queue_backpressure_seconds_total", "Time a producer waited for room.", ["stream"]
)
REDELIVERED = Counter(
    "isentrope_queue_redelivered_total", "Messages taken over from a dead consumer.", ["stream"]
)
DEAD_LETTERED = Counter("isentrope_queue_dead_lettered_total", "Messages given up on.", ["stream"])
