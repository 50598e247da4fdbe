"""What vLLM reports of each step of its scheduler, reduced to what the concurrency rule reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from services.rollout.concurrency import EngineLoad
from shared.metrics.rollout import ROLLOUT_KV_CACHE, ROLLOUT_PREEMPTIONS, ROLLOUT_WAITING

PAUSE_SECONDS = 1.0
"""Steps further apart than this were paused for: a swap of weights makes no queue."""


class LoadRecorder:
    """One of vLLM's stat loggers: it is told of every step, in the service's process.

    Keeps the promises of `vllm.v1.metrics.loggers.StatLoggerBase` without importing it.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._kv_cache_usage = 0.0
        self._num_preemptions = 0
        self._waiting_since: float | None = None
        self._stepped_at = -math.inf

    @property
    def load(self) -> EngineLoad:
        """The engine as of its last step."""
        since = self._waiting_since
        waiting_seconds = 0.0 if since is None else self._stepped_at - since
        return EngineLoad(self._kv_cache_usage, self._num_preemptions, waiting_seconds)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """One step; either of the first two may be None."""
        if iteration_stats is not None:
            self._num_preemptions += iteration_stats.num_preempted_reqs
            ROLLOUT_PREEMPTIONS.inc(iteration_stats.num_preempted_reqs)
        if scheduler_stats is None:
            return
        self._kv_cache_usage = scheduler_stats.kv_cache_usage
        ROLLOUT_KV_CACHE.set(scheduler_stats.kv_cache_usage)
        ROLLOUT_WAITING.set(scheduler_stats.num_waiting_reqs)
        now = self._now()
        if not scheduler_stats.num_waiting_reqs:
            self._waiting_since = None
        elif self._waiting_since is None or now - self._stepped_at > PAUSE_SECONDS:
            self._waiting_since = now
        self._stepped_at = now

    def log(self) -> None:
        """Nothing is logged."""

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """The engine is never put to sleep."""
