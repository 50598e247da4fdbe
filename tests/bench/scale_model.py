"""What the measured points say of 1,000 and 10,000 replicas: lines, and what ends them.

Everything here is reckoned, not measured. Costs in CPU seconds carry over to a fleet whose parts
have cores of their own; times by the clock of two busy cores do not, and are not used. A line is
least squares through the points of the pairs layout. What is assumed of the fleet is in `Fleet`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shared.stage import LOOKERS
from tests.bench.scale_counts import Count
from tests.bench.scale_crew import GROUP_SIZE
from tests.bench.scale_point import LEARNER, REDIS, VERIFIER, Point

FAR = (1_000, 10_000)
BUSY = 0.7
"""Share of one core beyond which a single thread queues what it is asked."""


class Fleet(NamedTuple):
    """What is assumed of a large fleet.

    Attributes:
        tokens_per_second: of one replica.
        tokens_per_group: completions and tokens of a group together.
        model_gb: of the weights on the wire.
        link_gb_per_second: of the learner's host, 12.5 being 100 Gbit/s.
        step_seconds: between two publications; a publication may take a tenth of it.
        look_seconds: between two looks of a replica at the leases (`redis.reclaim_seconds` / 3).
        max_files, max_clients: the usual limits of a container and of Redis.
    """

    tokens_per_second: float = 2_500.0
    tokens_per_group: float = 16 * 4096.0
    model_gb: float = 16.0
    link_gb_per_second: float = 12.5
    step_seconds: float = 120.0
    look_seconds: float = 10.0
    max_files: int = 65_536
    max_clients: int = 10_000

    def groups_per_second(self, replicas: float) -> float:
        """That so many replicas sample."""
        return replicas * self.tokens_per_second / self.tokens_per_group


class Line(NamedTuple):
    """A cost that grows with something."""

    slope: float
    intercept: float

    def at(self, x: float) -> float:
        """The cost there."""
        return self.intercept + self.slope * x

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        """Least squares; never falling, where noise would have it fall."""
        if len(set(xs)) < 2:
            return cls(0.0, statistics.fmean(ys))
        slope, intercept = statistics.linear_regression(xs, ys)
        return cls(max(0.0, slope), intercept if slope > 0 else statistics.fmean(ys))


class Limit(NamedTuple):
    """Something that ends the growth, and at how many replicas."""

    name: str
    replicas: float
    reckoned: str
    lifted_by: str


class Model:
    """Costs by number of replicas; `share` is of one core."""

    def __init__(
        self, points: Sequence[Point], counts: Sequence[Count], fleet: Fleet | None = None
    ) -> None:
        self.fleet = fleet or Fleet()
        pairs = [each for each in points if each.case.layout == "pairs"]
        usual = pairs[0]
        alike = [each for each in pairs if each.case[2:] == usual.case[2:]]
        self.group_cpu_ms = {
            part: self._of_tokens(pairs, part) for part in (LEARNER, REDIS, VERIFIER)
        }
        replicas = [float(each.case.replicas) for each in alike]
        self.publish_cpu = Line.through(replicas, [each.publish_cpu[LEARNER] for each in alike])
        self.idle = {
            part: Line.through(replicas, [each.idle_cpu[part] for each in alike])
            for part in (LEARNER, REDIS)
        }
        self.memory = {
            name: Line.through(replicas, [each.memory[name] for each in alike])
            for name in usual.memory
        }
        self.waiting_ms = Line.through(replicas, [each.group_cpu_ms[REDIS] for each in alike])
        numbers = [each.number for each in counts]
        self.members_redis_ms = Line.through(numbers, [each.members_redis_ms for each in counts])

    def _of_tokens(self, points: Sequence[Point], part: str) -> Line:
        """CPU milliseconds of a group by its tokens, at one number of replicas."""
        number = max(points, key=lambda point: point.case.tokens).case.replicas
        some = [each for each in points if each.case.replicas == number]
        tokens = [float(GROUP_SIZE * each.case.tokens) for each in some]
        return Line.through(tokens, [each.group_cpu_ms[part] for each in some])

    def groups_share(self, part: str, replicas: float) -> float:
        """Of one core, for the groups that these sample."""
        cpu_ms = self.group_cpu_ms[part].at(self.fleet.tokens_per_group)
        return self.fleet.groups_per_second(replicas) * cpu_ms / 1000

    def looks_share(self, replicas: float) -> float:
        """Of Redis' core, for looks at every lease, which a large fleet shares."""
        looks_per_second = min(replicas, LOOKERS) / self.fleet.look_seconds
        return looks_per_second * self.members_redis_ms.at(replicas) / 1000

    def waiting_share(self, replicas: float) -> float:
        """Of Redis' core, if all wait for prompts: each that comes is offered to every reader."""
        groups_per_second = self.fleet.groups_per_second(replicas)
        return groups_per_second * self.waiting_ms.slope * replicas / 1000

    def learner_share(self, replicas: float) -> float:
        """All that the learner's event loop does, publications included."""
        publishing = self.publish_cpu.at(replicas) / self.fleet.step_seconds
        return self.groups_share(LEARNER, replicas) + self.idle[LEARNER].at(replicas) + publishing

    def pairs_seconds(self, replicas: float) -> float:
        """The wire alone, where the learner's host sends every replica a copy of its own."""
        return replicas * self.fleet.model_gb / self.fleet.link_gb_per_second

    def limits(self) -> list[Limit]:
        """What ends the growth, soonest first."""
        fleet, memory = self.fleet, self.memory
        publish_seconds = fleet.step_seconds / 10
        found = [
            Limit(
                "the learner's link, a copy for each replica (pairs)",
                publish_seconds * fleet.link_gb_per_second / fleet.model_gb,
                f"{fleet.model_gb:g} GB x N over {fleet.link_gb_per_second:g} GB/s in"
                f" {publish_seconds:g} s",
                "one NCCL group, as GPUs have it; with gloo a tree, in which a replica that serves"
                " relays to k others",
            ),
            Limit(
                "Redis' thread: looks at all leases",
                self._until(self.looks_share, BUSY),
                f"{LOOKERS} / {fleet.look_seconds:g} s x N x"
                f" {1000 * self.members_redis_ms.slope:.2f} us a lease",
                "fewer lookers (`shared.stage.LOOKERS`); leases by role",
            ),
            Limit(
                "Redis' thread: readers that wait on one stream, if all do",
                self._until(self.waiting_share, BUSY),
                f"{1000 * self.waiting_ms.slope:.1f} us a group and waiting replica",
                "streams sharded by hash tag: k shards have a k-th of the readers each",
            ),
            Limit(
                "Redis' thread: groups and polls",
                self._until(lambda n: self.groups_share(REDIS, n) + self.idle[REDIS].at(n), BUSY),
                f"{self.group_cpu_ms[REDIS].at(fleet.tokens_per_group):.1f} ms a group of"
                f" {fleet.tokens_per_group:.0f} tokens, {1e6 * self.idle[REDIS].slope:.0f} us a"
                " second and replica",
                "streams sharded by hash tag, `isentrope:{run:k}:`, a Redis and a set of replicas"
                " each; the learner claims from all",
            ),
            Limit(
                "the learner's event loop",
                self._until(self.learner_share, BUSY),
                f"{self.group_cpu_ms[LEARNER].at(fleet.tokens_per_group):.1f} ms a group,"
                f" {1e6 * self.idle[LEARNER].slope:.0f} us a second and replica,"
                f" {1e3 * self.publish_cpu.slope:.2f} ms a publication and replica",
                "decoding on a thread of its own; then publishing in a process of its own",
            ),
            Limit(
                "the learner's open files (pairs)",
                fleet.max_files / max(memory["learner_files"].slope, 1e-9),
                f"{memory['learner_files'].slope:.1f} a replica, of {fleet.max_files}",
                "one group or a tree; a higher limit",
            ),
            Limit(
                "Redis' connections",
                fleet.max_clients / max(memory["redis_clients"].slope, 1e-9),
                f"{memory['redis_clients'].slope:.1f} a replica, of {fleet.max_clients}",
                "`maxclients`; sharded streams",
            ),
        ]
        return sorted(found, key=lambda limit: limit.replicas)

    def _until(self, share: Callable[[float], float], most: float) -> float:
        """How many replicas a rising share allows; infinity if it never comes there."""
        low, high = 0.0, 1e7
        if share(high) < most:
            return math.inf
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) < most else (low, middle)
        return low
