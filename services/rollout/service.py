"""The rollout service's gRPC face: translates calls, decides nothing."""

from __future__ import annotations

import asyncio
import logging
from array import array
from math import inf
from typing import Any, NoReturn, Protocol

import grpc

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from services.rollout.replica import Event, Replica, State
from services.rollout.requests import Engine
from services.rollout.sampler import Sampler
from services.rollout.update_requests import read_canary, read_group, read_manifest, read_source
from shared.broadcast import GroupSpec
from shared.buckets import Manifest
from shared.codec import completion_message, pack_logprobs, unpack_token_ids
from shared.errors import BroadcastError, EngineError, StreamError
from shared.metrics.rollout import ROLLOUT_VERSION
from shared.metrics.weights import WEIGHT_SYNC_PAUSE, WEIGHT_SYNC_SECONDS
from shared.records import Completion
from shared.weight_stream import WeightSource

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Rollout"].full_name

_SETTLE_SECONDS = 30.0
"""How long a swap that nobody waits for any more may take before another update begins."""

_STATES = {
    State.JOINING: pb.REPLICA_STATE_JOINING,
    State.STALE: pb.REPLICA_STATE_STALE,
    State.SERVING: pb.REPLICA_STATE_SERVING,
    State.DRAINING: pb.REPLICA_STATE_DRAINING,
    State.GONE: pb.REPLICA_STATE_GONE,
}

Context = grpc.aio.ServicerContext[Any, Any]


class UpdatableEngine(Engine, Protocol):
    """What the servicer needs of vLLM; `services.rollout.engine.VllmEngine` is it."""

    @property
    def num_workers(self) -> int: ...

    @property
    def max_update_bytes(self) -> int: ...

    async def join_group(self, spec: GroupSpec) -> None: ...

    async def begin_update(
        self,
        version: int,
        manifest: Manifest,
        *,
        bucket_bytes: int,
        source: WeightSource | None = None,
    ) -> None: ...

    async def commit_update(
        self, version: int, *, expected_checksum: int | None, timeout_seconds: float
    ) -> Any: ...

    async def abort_update(self) -> None: ...

    async def score_tokens(self, token_ids: Any) -> list[float]: ...


class RolloutServicer(pb_grpc.RolloutServicer):
    """`isentrope.v1.Rollout` over one engine."""

    def __init__(
        self,
        *,
        name: str,
        engine: UpdatableEngine,
        replica: Replica,
        sampler: Sampler,
        max_length: int,
        tls_folder: str | None = None,
    ) -> None:
        """The servicer of one replica.

        Args:
            tls_folder: what the engine's workers show the learner when they fetch weights.
        """
        self._name = name
        self._engine = engine
        self._replica = replica
        self._sampler = sampler
        self._max_length = max_length
        self._tls_folder = tls_folder
        self._epoch: int | None = None
        self._update: int | None = None
        self._committing: asyncio.Task[pb.CommitUpdateResponse] | None = None
        self._checksum = 0

    async def GetStatus(
        self, request: pb.GetRolloutStatusRequest, context: Context
    ) -> pb.GetRolloutStatusResponse:
        sampler, report = self._sampler, self._sampler.report()
        return pb.GetRolloutStatusResponse(
            replica=self._name,
            state=_STATES[self._replica.state],
            policy_version=self._replica.policy_version,
            groups_sampled=sampler.groups_sampled,
            tokens_sampled=sampler.tokens_sampled,
            groups_in_flight=sampler.groups_in_flight,
            mixed_version_completions=sampler.mixed_version_completions,
            num_workers=self._engine.num_workers,
            checksum=self._checksum,
            activity=report.sentence,
            progress_age_seconds=report.progress_age_seconds,
            stuck_seconds=report.stuck_seconds,
        )

    async def JoinBroadcast(
        self, request: pb.JoinBroadcastRequest, context: Context
    ) -> pb.JoinBroadcastResponse:
        if self._replica.is_ending:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "draining")
        try:
            spec = read_group(request)
            await self._forget_update()
            with self._sampler.chore("joins a broadcast group"):
                await self._engine.join_group(spec)
        except (BroadcastError, EngineError, ValueError) as error:
            await _abort(context, error)
        self._epoch = request.epoch
        return pb.JoinBroadcastResponse()

    async def BeginUpdate(
        self, request: pb.BeginUpdateRequest, context: Context
    ) -> pb.BeginUpdateResponse:
        if not request.HasField("source") and request.epoch != self._epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"in epoch {self._epoch}, not {request.epoch}; join first",
            )
        try:
            source = read_source(request, tls_folder=self._tls_folder)
            manifest = read_manifest(request, max_bytes=self._engine.max_update_bytes)
            if request.is_left_behind:
                await self._replica.handle(Event.LEFT_BEHIND)
                await self._forget_update()
                await self._engine.abort_update()
            version, bucket_bytes = request.policy_version, request.bucket_bytes
            with self._sampler.chore(f"begins to take version {version}"):
                await self._engine.begin_update(
                    version, manifest, bucket_bytes=bucket_bytes, source=source
                )
        except (BroadcastError, EngineError, ValueError) as error:
            await _abort(context, error)
        self._update = request.policy_version
        return pb.BeginUpdateResponse()

    async def CommitUpdate(
        self, request: pb.CommitUpdateRequest, context: Context
    ) -> pb.CommitUpdateResponse:
        if self._update != request.policy_version:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"no update to version {request.policy_version} was begun",
            )
            raise AssertionError("abort raises")
        try:
            canary = read_canary(request, max_length=self._max_length)
        except (StreamError, ValueError) as error:
            await _abort(context, error)
        self._update = None
        self._committing = asyncio.create_task(self._commit(request, canary))
        self._committing.add_done_callback(_retrieve)
        try:
            # A caller that gives up during the swap must not leave a version in that nobody noted.
            return await asyncio.shield(self._committing)
        except (BroadcastError, EngineError, ValueError) as error:
            await _abort(context, error)

    async def _commit(
        self, request: pb.CommitUpdateRequest, canary: array[int]
    ) -> pb.CommitUpdateResponse:
        version = request.policy_version
        with self._sampler.chore(f"takes version {version}"):
            report = await self._load(request)
        self._checksum = report.checksum
        await self._replica.swapped(version)
        logprobs = await self._engine.score_tokens(canary)
        WEIGHT_SYNC_PAUSE.inc(report.pause_seconds)
        WEIGHT_SYNC_SECONDS.labels(phase="load").observe(report.load_seconds)
        WEIGHT_SYNC_SECONDS.labels(phase="swap").observe(report.pause_seconds)
        return pb.CommitUpdateResponse(
            checksum=report.checksum,
            canary_logprobs=pack_logprobs(logprobs),
            receive_seconds=report.receive_seconds,
            load_seconds=report.load_seconds,
            pause_seconds=report.pause_seconds,
        )

    async def _load(self, request: pb.CommitUpdateRequest) -> Any:
        """The engine's report of the swap; a model that may be damaged serves nobody."""
        try:
            return await self._engine.commit_update(
                request.policy_version,
                expected_checksum=request.checksum,
                timeout_seconds=request.timeout_seconds,
            )
        except EngineError:
            await self._replica.handle(Event.BROKEN)
            raise

    async def _forget_update(self) -> None:
        """Give up what was begun, and end a commit whose caller gave up.

        Raises:
            EngineError: the engine is dead, or does not end it.
        """
        self._epoch, self._update = None, None
        if self._committing is None or self._committing.done():
            return
        await self._engine.abort_update()
        await asyncio.wait({self._committing}, timeout=_SETTLE_SECONDS)
        if not self._committing.done():
            raise EngineError("the engine is still busy with the last update")

    async def Serve(self, request: pb.ServeRequest, context: Context) -> pb.ServeResponse:
        try:
            await self._replica.judged(request.policy_version, is_confirmed=True)
        except ValueError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        ROLLOUT_VERSION.set(request.policy_version)
        return pb.ServeResponse()

    async def AbortUpdate(
        self, request: pb.AbortUpdateRequest, context: Context
    ) -> pb.AbortUpdateResponse:
        try:
            await self._forget_update()
            await self._engine.abort_update()
        except EngineError as error:
            await _abort(context, error)
        if 0 <= request.policy_version == self._replica.policy_version:
            await self._replica.judged(request.policy_version, is_confirmed=False)
        return pb.AbortUpdateResponse()

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        await self._replica.handle(Event.DRAIN)
        return pb.DrainResponse()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        if self._replica.state is not State.SERVING:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{self._name} is {self._replica.state.value}"
            )
        try:
            completions = await self._generate(request)
        except (EngineError, StreamError, ValueError) as error:
            await _abort(context, error)
        return pb.GenerateResponse(completions=[completion_message(each) for each in completions])

    async def _generate(self, request: pb.GenerateRequest) -> tuple[Completion, ...]:
        prompt = unpack_token_ids(request.prompt_token_ids)
        room = self._max_length - len(prompt)
        if not prompt or not 1 <= request.num_completions <= 1024:
            raise ValueError(
                f"{len(prompt)} prompt tokens and num_completions = {request.num_completions}:"
                " give a prompt and 1 to 1024 completions"
            )
        if not 0 < request.max_completion_tokens <= room or not 0 < request.temperature < inf:
            raise ValueError(
                f"max_completion_tokens = {request.max_completion_tokens}, temperature ="
                f" {request.temperature}: need 1 to {room}, and finite above 0"
            )
        return await self._sampler.sample(
            prompt,
            num_completions=request.num_completions,
            temperature=request.temperature,
            max_completion_tokens=request.max_completion_tokens,
        )


def _retrieve(committing: asyncio.Task[pb.CommitUpdateResponse]) -> None:
    """Look at the outcome, which otherwise nobody may do, and asyncio would complain."""
    if not committing.cancelled() and (error := committing.exception()) is not None:
        logger.warning("update not committed: %s", error)


async def _abort(context: Context, error: Exception) -> NoReturn:
    """Answer with the status that the .proto promises for this error."""
    codes = {BroadcastError: grpc.StatusCode.ABORTED, EngineError: grpc.StatusCode.UNAVAILABLE}
    logger.warning("refused: %s", error)
    await context.abort(codes.get(type(error), grpc.StatusCode.INVALID_ARGUMENT), str(error))
    raise AssertionError("abort raises")
