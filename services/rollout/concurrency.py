"""How many groups a replica samples at a time: as many as its KV cache carries, found by trying.

Additive increase, multiplicative decrease. The engine's memory for keys and values fills as
completions grow, so that what fits at first may be too much a thousand tokens later; vLLM then
puts requests back and computes them again. The limit starts where nothing can go wrong, grows by
one while every place is in use and there is room, and halves under pressure. Then it stays until
the groups in work have come down to it, since they end when they end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

ROOMY = 0.8
"""Below this share of the KV cache in use there is room for another group."""

HIGH_WATER = 0.95
"""At this share the next tokens may find no block."""

MAX_WAITING_SECONDS = 2.0
"""So long a request may wait in the engine before that is a queue; a prompt's turn comes sooner."""


class Change(Enum):
    """Why the limit changed."""

    ROOM = "room"
    KV_CACHE = "kv_cache"
    PREEMPTION = "preemption"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine said of itself last.

    Attributes:
        kv_cache_usage: share of the KV cache's blocks in use, 0 to 1.
        num_preemptions: requests ever put back for want of blocks.
        waiting_seconds: for so long requests have been waiting for the scheduler, without a break.
    """

    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    waiting_seconds: float = 0.0


class Concurrency:
    """The limit of one replica, and the rule that moves it.

    Args:
        initial: groups; taken into the bounds.
        maximum: groups, at least 1.

    Attributes:
        limit: groups, from 1 to `maximum`.
    """

    def __init__(self, *, initial: int, maximum: int) -> None:
        self.limit = max(1, min(initial, maximum))
        self._maximum = maximum
        self._num_preemptions = 0

    def update(self, load: EngineLoad, *, num_claimed: int, num_sampling: int) -> Change | None:
        """Move the limit by one look at the engine; None if it stays.

        Args:
            num_claimed: groups that hold a place, whatever they wait for.
            num_sampling: those of them that the engine works on: a group that waits for the
                learner's word or for room in the output stream is no reason to claim more.
        """
        pressure = self._pressure(load)
        self._num_preemptions = load.num_preemptions
        if pressure is not None:
            if not 0 < num_claimed <= self.limit or self.limit == 1:
                return None
            self.limit = max(1, num_claimed // 2)
            return pressure
        has_room = load.kv_cache_usage < ROOMY and load.waiting_seconds == 0
        if not has_room or num_sampling < self.limit or self.limit == self._maximum:
            return None
        self.limit += 1
        return Change.ROOM

    def _pressure(self, load: EngineLoad) -> Change | None:
        if load.num_preemptions > self._num_preemptions:
            return Change.PREEMPTION
        if load.kv_cache_usage >= HIGH_WATER:
            return Change.KV_CACHE
        if load.waiting_seconds > MAX_WAITING_SECONDS:
            return Change.QUEUE
        return None


def surely_fitting(kv_cache_tokens: int, *, group_size: int, max_tokens: int) -> int:
    """Groups that fit into the KV cache even if every completion becomes as long as it may.

    Args:
        kv_cache_tokens: tokens whose keys and values fit.
        max_tokens: of a prompt and its completion together.
    """
    return kv_cache_tokens // (group_size * max_tokens)
