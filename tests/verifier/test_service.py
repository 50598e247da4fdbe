from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import grpc
import pytest

from protos import trajectory_pb2 as trajectory
from protos import verifier_pb2 as pb
from protos import verifier_pb2_grpc as pb_grpc
from services.verifier.sandbox import ScoringPool
from services.verifier.service import MAX_WAITING, SERVICE, VerifierServicer
from services.verifier.worker import Worker
from shared.activity import Report
from shared.config.services import TaskConfig, VerifierConfig
from shared.rpc import open_channel, serve

ANSWER = "3 4 7>19"


@pytest.fixture
async def stub() -> AsyncIterator[pb_grpc.VerifierAsyncStub]:
    report = Report("scores 2 groups, the oldest for 7 s", 5.0, 5.0)
    worker = cast(
        Worker,
        SimpleNamespace(groups_scored=3, completions_scored=24, report=lambda: report),
    )
    async with ScoringPool(TaskConfig(), VerifierConfig()) as pool:
        servicer = VerifierServicer(name="verifier-0", pool=pool, worker=worker)
        async with (
            serve(
                host="127.0.0.1",
                port=0,
                port_key="network.verifier_port",
                services=[SERVICE],
                add=lambda server: pb_grpc.add_VerifierServicer_to_server(servicer, server),
            ) as server,
            open_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            yield pb_grpc.VerifierStub(channel)


async def test_a_direct_caller_gets_the_scores_the_stream_would(
    stub: pb_grpc.VerifierAsyncStub,
) -> None:
    completions = ["3*4=12,7+12=19$", "3*4=12,7+12=19", ""]
    request = pb.ScoreRequest(task="countdown", answer=ANSWER, completions=completions)
    response = await stub.Score(request, timeout=60.0)
    assert [score.outcome for score in response.scores] == [
        trajectory.OUTCOME_PASS,
        trajectory.OUTCOME_FAIL,
        trajectory.OUTCOME_FAIL,
    ]
    assert [score.reward for score in response.scores] == [1.0, 0.0, 0.0]
    assert response.scores[0].detail == "solved"


async def test_an_answer_the_scorer_refuses_is_an_error_outcome(
    stub: pb_grpc.VerifierAsyncStub,
) -> None:
    request = pb.ScoreRequest(task="countdown", answer="?", completions=["x"])
    response = await stub.Score(request, timeout=60.0)
    assert [score.outcome for score in response.scores] == [trajectory.OUTCOME_ERROR]


@pytest.mark.parametrize(
    ("request_", "code", "detail"),
    [
        (
            pb.ScoreRequest(task="math", answer=ANSWER, completions=["x"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "task = 'math': this verifier scores 'countdown'",
        ),
        (
            pb.ScoreRequest(answer=ANSWER, completions=["x"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "task = ''",
        ),
        (
            pb.ScoreRequest(task="countdown", answer=ANSWER),
            grpc.StatusCode.INVALID_ARGUMENT,
            "completions: give at least one",
        ),
        (
            pb.ScoreRequest(task="countdown", answer=ANSWER, completions=["x"] * (MAX_WAITING + 1)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "0 completions are waiting",
        ),
    ],
)
async def test_a_call_that_cannot_be_served_gets_its_status(
    stub: pb_grpc.VerifierAsyncStub, request_: pb.ScoreRequest, code: grpc.StatusCode, detail: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(request_, timeout=60.0)
    assert caught.value.code() is code
    assert detail in (caught.value.details() or "")


async def test_the_status_counts_what_came_through_the_stream(
    stub: pb_grpc.VerifierAsyncStub,
) -> None:
    status = await stub.GetStatus(pb.GetVerifierStatusRequest(), timeout=60.0)
    assert (status.replica, status.groups_scored, status.completions_scored) == (
        "verifier-0", 3, 24,
    )  # fmt: skip
    assert status.activity == "scores 2 groups, the oldest for 7 s"
    assert (status.progress_age_seconds, status.stuck_seconds) == (5.0, 5.0)


async def test_calls_are_answered_side_by_side(stub: pb_grpc.VerifierAsyncStub) -> None:
    request = pb.ScoreRequest(task="countdown", answer=ANSWER, completions=["3*4=12,7+12=19$"] * 50)
    responses = await asyncio.gather(*(stub.Score(request, timeout=60.0) for _ in range(8)))
    assert [len(response.scores) for response in responses] == [50] * 8
