"""The learner's gRPC face: translates calls, decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc as pb_grpc
from services.learner.catch_up import CatchUp
from services.learner.progress import Progress
from services.learner.publisher import Publisher
from shared.errors import CheckpointError

SERVICE = pb.DESCRIPTOR.services_by_name["Learner"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class LearnerServicer(pb_grpc.LearnerServicer):
    """`isentrope.v1.Learner` over the loop's progress."""

    def __init__(
        self,
        *,
        run_id: str,
        num_steps: int,
        progress: Progress,
        publisher: Publisher,
        catch_up: CatchUp,
    ) -> None:
        self._run_id = run_id
        self._num_steps = num_steps
        self._progress = progress
        self._publisher = publisher
        self._catch_up = catch_up

    async def GetStatus(
        self, request: pb.GetLearnerStatusRequest, context: Context
    ) -> pb.GetLearnerStatusResponse:
        progress = self._progress
        return pb.GetLearnerStatusResponse(
            run_id=self._run_id,
            step=progress.step,
            num_steps=self._num_steps,
            policy_version=progress.policy_version,
            activity=progress.sentence,
            is_paused=progress.is_paused,
            is_finished=progress.is_finished,
            metrics=progress.metrics,
            queue_depths=progress.queues,
            replicas=self._publisher.replicas,
            is_stalled=progress.is_stalled,
            seconds_without_step=progress.seconds_without_step,
        )

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        self._progress.is_paused = True
        return pb.PauseResponse()

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        self._progress.is_paused = False
        return pb.ResumeResponse()

    async def Checkpoint(
        self, request: pb.CheckpointRequest, context: Context
    ) -> pb.CheckpointResponse:
        if self._progress.is_finished:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the run has finished; the checkpoint of step {self._progress.step} is its last",
            )
        written = asyncio.get_running_loop().create_future()
        self._progress.checkpoint_requests.append(written)
        try:
            return pb.CheckpointResponse(folder=str(await written))
        except CheckpointError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
            raise AssertionError("abort raises") from error
        finally:
            # Else callers that give up would pile up until a step ends.
            with suppress(ValueError):
                self._progress.checkpoint_requests.remove(written)

    async def Stop(self, request: pb.StopRequest, context: Context) -> pb.StopResponse:
        self._progress.is_stopping = True
        return pb.StopResponse()

    async def FetchWeights(
        self, request: pb.FetchWeightsRequest, context: Context
    ) -> AsyncIterator[pb.FetchWeightsResponse]:
        try:
            async for chunk in self._catch_up.chunks(request.ticket):
                yield pb.FetchWeightsResponse(data=chunk)
        except KeyError:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the ticket is not good any more")
