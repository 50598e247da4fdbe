"""What the scale benchmark is asked for, and what it answers: cases, points, CPU of each part."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tests.bench.scale_crew import Usage

LEARNER, REDIS, REPLICAS, VERIFIER = "learner", "redis", "replicas", "verifier"


class Case(NamedTuple):
    """How many replicas, reached how, with which model and how long completions."""

    replicas: int
    layout: Literal["pairs", "one"] = "pairs"
    mebibytes: int = 1
    tokens: int = 64


class Effort(NamedTuple):
    """How often and how long each thing is measured."""

    publications: int = 7
    idle_seconds: float = 5.0
    newcomers: int = 3
    flow_seconds: float = 8.0
    training_batches: int = 6


@dataclass(slots=True)
class Point:
    """What was measured with one number of replicas; seconds by the clock where not said otherwise.

    Attributes:
        first_publish_seconds: groups formed, weights sent, all replicas serve.
        publish_seconds: of each publication after that.
        publish_parts: medians; `begin` is all that is neither gather nor broadcast nor load.
        publish_cpu: CPU seconds of one publication, by part of the system.
        idle_cpu: CPU seconds a second, by part of the system.
        members_ms, holders_ms: one look at the leases; at who holds prompts, under load.
        catch_up_seconds: of each newcomer, from its lease to its being confirmed.
        group_cpu_ms: CPU milliseconds a group, by part of the system.
        memory: MiB, threads, open files, by part; `redis_streams` is the most that data took.
        num_lost, num_violations: groups that never ended; groups trained beyond the bound.
    """

    case: Case
    load_average: float = 0.0
    first_publish_seconds: float = 0.0
    publish_seconds: list[float] = field(default_factory=list)
    publish_parts: dict[str, float] = field(default_factory=dict)
    publish_cpu: dict[str, float] = field(default_factory=dict)
    idle_cpu: dict[str, float] = field(default_factory=dict)
    members_ms: float = 0.0
    holders_ms: float = 0.0
    catch_up_seconds: list[float] = field(default_factory=list)
    groups_per_second: float = 0.0
    group_cpu_ms: dict[str, float] = field(default_factory=dict)
    training_groups_per_second: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)
    num_trained: int = 0
    num_lost: int = 0
    num_violations: int = 0
    most_staleness: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    failed_refits: int = 0


class Pids(NamedTuple):
    """The other processes."""

    redis: int
    replicas: tuple[int, ...]
    verifier: int


class Meter:
    """CPU seconds of the parts of the system since it was made, or last read."""

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._last = self._now()

    def read(self) -> dict[str, float]:
        """By part, since the last time."""
        now = self._now()
        spent = {part: now[part] - self._last[part] for part in now}
        self._last = now
        return spent

    def _now(self) -> dict[str, float]:
        replicas = sum(Usage.of(pid).cpu_seconds for pid in self._pids.replicas)
        return {
            LEARNER: time.process_time(),
            REDIS: Usage.of(self._pids.redis).cpu_seconds,
            REPLICAS: replicas,
            VERIFIER: Usage.of(self._pids.verifier).cpu_seconds,
        }
