"""The verifier service's gRPC face: translates calls, decides nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from protos import verifier_pb2 as pb
from protos import verifier_pb2_grpc as pb_grpc
from services.verifier.sandbox import ScoringPool
from services.verifier.worker import Worker
from shared.codec import score_message

SERVICE = pb.DESCRIPTOR.services_by_name["Verifier"].full_name

MAX_WAITING = 4096
"""Completions that may wait for a scoring process before calls are refused."""

Context = grpc.aio.ServicerContext[Any, Any]


class VerifierServicer(pb_grpc.VerifierServicer):
    """`isentrope.v1.Verifier` over the pool that also scores the stream."""

    def __init__(self, *, name: str, pool: ScoringPool, worker: Worker) -> None:
        self._name = name
        self._pool = pool
        self._worker = worker

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        if request.task != self._pool.task.name:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"task = {request.task!r}: this verifier scores {self._pool.task.name!r}",
            )
        if not request.completions:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "completions: give at least one")
        if self._pool.num_waiting + len(request.completions) > MAX_WAITING:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._pool.num_waiting} completions are waiting, at most {MAX_WAITING} may;"
                " try again later, with fewer",
            )
        scores = await asyncio.gather(
            *(self._pool.score(each, answer=request.answer) for each in request.completions)
        )
        return pb.ScoreResponse(scores=[score_message(score) for score in scores])

    async def GetStatus(
        self, request: pb.GetVerifierStatusRequest, context: Context
    ) -> pb.GetVerifierStatusResponse:
        report = self._worker.report()
        return pb.GetVerifierStatusResponse(
            replica=self._name,
            groups_scored=self._worker.groups_scored,
            completions_scored=self._worker.completions_scored,
            activity=report.sentence,
            progress_age_seconds=report.progress_age_seconds,
            stuck_seconds=report.stuck_seconds,
        )
