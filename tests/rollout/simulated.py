"""A rollout replica without vLLM: an engine in memory under the real code of the service.

The engine really joins groups, really receives, checks, swaps, and scores the canary from what it
holds; only the model is missing, so completions are random tokens after a delay. Whatever runs
around it is what runs around vLLM: gRPC, lease, streams, state machine, adoption of orphans.

    python -m tests.rollout.simulated --config run.toml --run-id demo --name rollout-7

is a replica of a run; options of its own come first: `--seconds`, `--tokens`, `--fault stop@load`.
`run_process` is the same for `multiprocessing`, and `run_simulated` is one of many in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from services.rollout.app import run_replica, serve_engine
from services.rollout.concurrency import EngineLoad
from services.rollout.replica import Replica
from shared.broadcast import BroadcastGroup, GroupSpec, open_group
from shared.buckets import Manifest
from shared.errors import BroadcastError, EngineError
from shared.logs import configure_logging
from shared.process import ServiceArguments, end_with_parent, run_service
from shared.records import Completion, VersionRun
from shared.redis_stream import Streams
from shared.weight_stream import WeightSource, fetch_weights
from shared.weight_transfer import Received, receive_weights

T = TypeVar("T")

Action = Literal["kill", "stop"]
Point = Literal["join", "bucket", "load", "acknowledge", "serve"]

ACTIONS: tuple[Action, ...] = get_args(Action)
POINTS: tuple[Point, ...] = get_args(Point)

STOP_TOKEN_IDS = (0,)
_REMEMBERED_SWAPS = 64
"""Versions that a completion under way may have seen begin."""


@dataclass(frozen=True, slots=True)
class Fault:
    """SIGKILL or SIGSTOP to one's own process, the first time that it comes to a point.

    `join` is before the group forms, `bucket` after the first of several was received, `load`
    with all of them there but not swapped in, `acknowledge` after the swap and before the answer,
    `serve` on the learner's word.
    """

    action: Action
    point: Point

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From `action@point`; ValueError if there is no such fault."""
        action, _, point = text.partition("@")
        if action not in ACTIONS or point not in POINTS:
            raise ValueError(f"no such fault: {text!r}; one of {ACTIONS} @ one of {POINTS}")
        return cls(action, point)


@dataclass(frozen=True, slots=True)
class Simulation:
    """How a simulated replica behaves.

    Attributes:
        seconds_per_completion: from asking to the last token.
        tokens_per_completion: at most; fewer where the request allows fewer.
        swap_seconds: how long a swap stands in the way.
        bucket_seconds: how long its link takes for each bucket of a broadcast.
        vocabulary: sampled token ids are below it.
    """

    seconds_per_completion: float = 0.01
    tokens_per_completion: int = 8
    swap_seconds: float = 0.0
    bucket_seconds: float = 0.0
    vocabulary: int = 16
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """What one request will have sampled at its end."""

    token_ids: list[int]
    started: float
    first_version: int


class SimulatedEngine:
    """The in-memory twin of `services.rollout.engine.VllmEngine`.

    Attributes:
        parameters: the weights it samples from.
        damage: score the canary as if a layer had not arrived.
        fails_to_join: refuse every group, as an engine whose process ended.
        hang_ups: leave the group when an update begins, so many times.
        misloads: end so many swaps with a damaged model.
        may_swap: a swap ends only while this is set, as it is at first.
        is_swapping: set while one is under way.
    """

    num_workers = 1
    max_update_bytes = 1 << 34
    kv_cache_tokens = 1 << 20

    def __init__(self, simulation: Simulation | None = None, *, name: str = "") -> None:
        self.simulation = simulation or Simulation()
        self.parameters: dict[str, torch.Tensor] = {}
        self.policy_version: int | None = None
        self.group: BroadcastGroup | None = None
        self.damage = False
        self.fails_to_join = False
        self.hang_ups = 0
        self.misloads = 0
        self.may_swap, self.is_swapping = asyncio.Event(), asyncio.Event()
        self.may_swap.set()
        self._receiving: asyncio.Future[Received] | None = None
        self._swaps: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED_SWAPS)
        self._requests: dict[str, _Request] = {}
        self._random = random.Random(name)
        self._fault = simulation.fault if simulation else None
        self._dead = asyncio.Event()
        # Of its own: many engines in one process wait in their threads for the same learner.
        self._threads = ThreadPoolExecutor(thread_name_prefix=f"simulated {name}")

    @property
    def is_alive(self) -> bool:
        return not self._dead.is_set()

    @property
    def load(self) -> EngineLoad:
        return EngineLoad()

    async def wait_until_dead(self) -> None:
        await self._dead.wait()

    def strike(self, point: Point) -> None:
        """Have the fault, if it is one of this point; what is stopped goes on without it."""
        if self._fault is not None and self._fault.point == point:
            action, self._fault = self._fault.action, None
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    # --- sampling -------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Completion:
        if self.policy_version is None:
            raise EngineError("no policy version is loaded: update the engine first")
        num_tokens = min(self.simulation.tokens_per_completion, max_completion_tokens)
        token_ids = self._random.choices(range(1, self.simulation.vocabulary), k=num_tokens)
        if stop_token_ids:
            token_ids[-1] = stop_token_ids[0]
        request = _Request(token_ids, time.monotonic(), self.policy_version)
        self._requests[request_id] = request
        try:
            await asyncio.sleep(self.simulation.seconds_per_completion)
        finally:
            del self._requests[request_id]
        done = self._sampled(request, start=0, end=num_tokens, until=time.monotonic())
        return replace(done, is_truncated=not stop_token_ids)

    def progress(self, request_id: str, *, start: int) -> Completion | None:
        """As if the tokens came at equal distances."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        now = time.monotonic()
        share = (now - request.started) / self.simulation.seconds_per_completion
        end = min(int(share * len(request.token_ids)), len(request.token_ids) - 1)
        return self._sampled(request, start=start, end=end, until=now) if end > start else None

    def _sampled(self, request: _Request, *, start: int, end: int, until: float) -> Completion:
        """Tokens `start` to `end`, the last of which came `until`."""
        step = (until - request.started) / end
        versions = [
            self._version_at(request, request.started + (index + 1) * step)
            for index in range(start, end)
        ]
        return Completion(
            token_ids=array("I", request.token_ids[start:end]),
            behaviour_logprobs=array("f", [-1.0] * (end - start)),
            version_runs=tuple(
                VersionRun(version, len(list(run))) for version, run in itertools.groupby(versions)
            ),
            is_truncated=False,
        )

    def _version_at(self, request: _Request, moment: float) -> int:
        seen = [version for at, version in self._swaps if request.started < at <= moment]
        return seen[-1] if seen else request.first_version

    async def score_tokens(self, token_ids: Any) -> list[float]:
        """The sum of all weights, for every token but the first."""
        self.strike("acknowledge")
        total = float(sum(tensor.sum() for tensor in self.parameters.values()))
        return [total + (0.5 if self.damage else 0.0)] * (len(token_ids) - 1)

    # --- weights --------------------------------------------------------------------------------

    async def join_group(self, spec: GroupSpec) -> None:
        self.strike("join")
        if self.fails_to_join:
            raise EngineError("the engine's process has ended")
        await self.abort_update()
        self.group = await self._in_thread(lambda: open_group(spec.for_worker(0)))

    async def begin_update(
        self,
        version: int,
        manifest: Manifest,
        *,
        bucket_bytes: int,
        source: WeightSource | None = None,
    ) -> None:
        if source is not None:
            self._receiving = self._in_thread(
                lambda: fetch_weights(source, manifest, bucket_bytes=bucket_bytes)
            )
            return
        if self.group is None:
            raise EngineError("not in a broadcast group")
        if self.hang_ups:
            self.hang_ups -= 1
            self.group.close()
        seconds = self.simulation.bucket_seconds
        group = cast(BroadcastGroup, _Watched(self.group, self.strike, bucket_seconds=seconds))
        self._receiving = self._in_thread(
            lambda: receive_weights(group, manifest, bucket_bytes=bucket_bytes)
        )

    async def commit_update(
        self, version: int, *, expected_checksum: int | None, timeout_seconds: float
    ) -> Any:
        if self._receiving is None:
            raise BroadcastError("no transfer was started")
        try:
            received = await asyncio.wait_for(asyncio.shield(self._receiving), timeout_seconds)
        except TimeoutError:
            raise BroadcastError(f"receiving took more than {timeout_seconds} s") from None
        self.strike("load")
        if received.checksum != expected_checksum:
            raise BroadcastError(f"received {received.checksum}, but {expected_checksum} was sent")
        self._receiving = None
        paused_at = time.monotonic()
        await self._swap()
        if self.misloads:
            self.misloads -= 1
            self.policy_version = None
            raise EngineError("the update lacks 1 parameters")
        self.parameters, self.policy_version = received.tensors, version
        self._swaps.append((time.monotonic(), version))
        seconds = time.monotonic() - paused_at
        return SimpleNamespace(
            checksum=received.checksum,
            receive_seconds=received.seconds,
            load_seconds=seconds,
            pause_seconds=seconds,
        )

    async def _swap(self) -> None:
        self.is_swapping.set()
        try:
            await asyncio.sleep(self.simulation.swap_seconds)
            await self.may_swap.wait()
        finally:
            self.is_swapping.clear()

    async def abort_update(self) -> None:
        self._receiving = None
        if self.group is not None:
            self.group.close()
            self.group = None

    async def shutdown(self) -> None:
        """Leave the group, and let the threads end."""
        await self.abort_update()
        self._threads.shutdown(wait=False)

    def _in_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future


class _Watched:
    """A broadcast group whose member may be slow, and may be struck after its first bucket."""

    def __init__(
        self, group: BroadcastGroup, strike: Callable[[Point], None], *, bucket_seconds: float
    ) -> None:
        self._group = group
        self._strike = strike
        self._bucket_seconds = bucket_seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.finish(self.begin(tensor))

    def finish(self, work: Any) -> None:
        time.sleep(self._bucket_seconds)
        self._group.finish(work)
        self._strike("bucket")


class _WatchedReplica(Replica):
    """A replica that may be struck on the learner's word."""

    def __init__(self, engine: SimulatedEngine) -> None:
        super().__init__()
        self._engine = engine

    async def judged(self, policy_version: int, *, is_confirmed: bool) -> None:
        self._engine.strike("serve")
        await super().judged(policy_version, is_confirmed=is_confirmed)


async def run_simulated(
    given: ServiceArguments, stop: asyncio.Event, streams: Streams, simulation: Simulation
) -> None:
    """One replica of many in this process: what `services.rollout` does but for `/metrics`."""
    engine = SimulatedEngine(simulation, name=given.name)
    try:
        await run_replica(
            given,
            stop,
            engine,
            streams,
            replica=_WatchedReplica(engine),
            stop_token_ids=STOP_TOKEN_IDS,
            metrics_address=f"{given.host}:0",
        )
    finally:
        await engine.shutdown()


def run_process(given: ServiceArguments, simulation: Simulation) -> None:
    """A process that is one replica, for `multiprocessing`; it ends with the one above it."""
    end_with_parent()
    configure_logging()
    asyncio.run(_serve(given, asyncio.Event(), simulation))


async def _serve(given: ServiceArguments, stop: asyncio.Event, simulation: Simulation) -> None:
    engine = SimulatedEngine(simulation, name=given.name)
    replica = _WatchedReplica(engine)
    try:
        await serve_engine(given, stop, engine, replica=replica, stop_token_ids=STOP_TOKEN_IDS)
    finally:
        await engine.shutdown()


def main() -> int:
    """The command line; what it does not know itself is the service's."""
    usual = Simulation()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=usual.seconds_per_completion)
    parser.add_argument("--tokens", type=int, default=usual.tokens_per_completion)
    parser.add_argument("--fault", type=Fault.parse)
    own, others = parser.parse_known_args()
    simulation = Simulation(
        seconds_per_completion=own.seconds, tokens_per_completion=own.tokens, fault=own.fault
    )
    return run_service("rollout", lambda given, stop: _serve(given, stop, simulation), others)


if __name__ == "__main__":
    sys.exit(main())
