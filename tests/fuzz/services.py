"""The three servicers on real servers, around what they have in memory in other tests.

Each method has a few good requests, from which bad ones are made, and the statuses that it may
answer with. The weights of an update never come: an engine here reserves the memory for what a
request announces, as vLLM's workers do, and takes that for the version.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos import (
    learner_pb2,
    learner_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    verifier_pb2,
    verifier_pb2_grpc,
)
from services.learner.catch_up import CatchUp
from services.learner.progress import Progress
from services.learner.service import LearnerServicer
from services.rollout.replica import Replica
from services.rollout.service import RolloutServicer
from services.verifier.sandbox import ScoringPool
from services.verifier.service import VerifierServicer
from shared.activity import Report
from shared.buckets import Manifest, StagedWeights
from shared.config.services import TaskConfig, VerifierConfig
from shared.errors import BroadcastError, EngineError
from shared.rpc import serve
from shared.weight_stream import WeightSource
from tests.rollout.scene import Scene
from tests.rollout.simulated import SimulatedEngine, Simulation

Code = grpc.StatusCode

MAX_LENGTH = 64

ANSWERS = {Code.OK, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
"""What any method may say to a request that no peer of ours would send."""

SERVICES = (
    learner_pb2.DESCRIPTOR.services_by_name["Learner"].full_name,
    rollout_pb2.DESCRIPTOR.services_by_name["Rollout"].full_name,
    verifier_pb2.DESCRIPTOR.services_by_name["Verifier"].full_name,
)


@dataclass(frozen=True)
class Target:
    """One method.

    Attributes:
        seeds: good requests; the first is answered with OK in whatever state the server is.
        codes: statuses that it may answer besides `ANSWERS`, as its comment in the .proto says.
    """

    service: str
    request: type[Message]
    seeds: tuple[Message, ...]
    codes: frozenset[grpc.StatusCode] = frozenset()


def _rollout(request: type[Message], *seeds: Message, codes: set[Code] | None = None) -> Target:
    return Target(SERVICES[1], request, seeds or (request(),), frozenset(codes or ()))


def _learner(request: type[Message], *seeds: Message, codes: set[Code] | None = None) -> Target:
    return Target(SERVICES[0], request, seeds or (request(),), frozenset(codes or ()))


_UPDATE = rollout_pb2.BeginUpdateRequest(
    epoch=1,
    policy_version=3,
    bucket_bytes=1 << 12,
    manifest=[
        rollout_pb2.ParameterSpec(name="model.embed", dtype="float32", shape=[8, 4]),
        rollout_pb2.ParameterSpec(name="model.norm", dtype="bfloat16", shape=[4]),
    ],
)
_STREAMED = rollout_pb2.BeginUpdateRequest(
    policy_version=3,
    bucket_bytes=1 << 12,
    manifest=_UPDATE.manifest,
    source=rollout_pb2.WeightSource(address="127.0.0.1:1", ticket="t", timeout_seconds=1.0),
    is_left_behind=True,
)
_JOIN = rollout_pb2.JoinBroadcastRequest(
    epoch=1,
    backend="gloo",
    store_host="127.0.0.1",
    store_port=1,
    key="k",
    rank=1,
    world_size=2,
    timeout_seconds=1.0,
)
_COMMIT = rollout_pb2.CommitUpdateRequest(
    policy_version=3, checksum=7, canary_token_ids=b"\1\0\0\0\2\0\0\0", timeout_seconds=1.0
)
_GENERATE = rollout_pb2.GenerateRequest(
    prompt_token_ids=b"\1\0\0\0", num_completions=2, temperature=1.0, max_completion_tokens=4
)
_SCORE = verifier_pb2.ScoreRequest(task="countdown", answer="3 4 7>19", completions=["x", "3*4$"])
_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

_STATE = {Code.FAILED_PRECONDITION, Code.UNAVAILABLE}

TARGETS: dict[str, Target] = {
    "/isentrope.v1.Learner/GetStatus": _learner(learner_pb2.GetLearnerStatusRequest),
    "/isentrope.v1.Learner/Pause": _learner(learner_pb2.PauseRequest),
    "/isentrope.v1.Learner/Resume": _learner(learner_pb2.ResumeRequest),
    # Nothing takes a step here, so that what waits for one would show as growth.
    "/isentrope.v1.Learner/Checkpoint": _learner(
        learner_pb2.CheckpointRequest, codes={Code.ABORTED, Code.DEADLINE_EXCEEDED}
    ),
    "/isentrope.v1.Learner/Stop": _learner(learner_pb2.StopRequest),
    "/isentrope.v1.Learner/FetchWeights": _learner(
        learner_pb2.FetchWeightsRequest,
        learner_pb2.FetchWeightsRequest(ticket="no such ticket"),
        codes={Code.NOT_FOUND},
    ),
    "/isentrope.v1.Rollout/GetStatus": _rollout(rollout_pb2.GetRolloutStatusRequest),
    "/isentrope.v1.Rollout/JoinBroadcast": _rollout(
        rollout_pb2.JoinBroadcastRequest, _JOIN, codes={Code.ABORTED, *_STATE}
    ),
    "/isentrope.v1.Rollout/BeginUpdate": _rollout(
        rollout_pb2.BeginUpdateRequest, _UPDATE, _STREAMED, codes=_STATE
    ),
    "/isentrope.v1.Rollout/CommitUpdate": _rollout(
        rollout_pb2.CommitUpdateRequest, _COMMIT, codes={Code.ABORTED, *_STATE}
    ),
    "/isentrope.v1.Rollout/Serve": _rollout(
        rollout_pb2.ServeRequest, rollout_pb2.ServeRequest(policy_version=3), codes=_STATE
    ),
    "/isentrope.v1.Rollout/AbortUpdate": _rollout(
        rollout_pb2.AbortUpdateRequest, rollout_pb2.AbortUpdateRequest(policy_version=3)
    ),
    "/isentrope.v1.Rollout/Drain": _rollout(rollout_pb2.DrainRequest),
    "/isentrope.v1.Rollout/Generate": _rollout(
        rollout_pb2.GenerateRequest, _GENERATE, codes=_STATE
    ),
    "/isentrope.v1.Verifier/Score": Target(SERVICES[2], verifier_pb2.ScoreRequest, (_SCORE,)),
    "/isentrope.v1.Verifier/GetStatus": Target(
        SERVICES[2],
        verifier_pb2.GetVerifierStatusRequest,
        (verifier_pb2.GetVerifierStatusRequest(),),
    ),
    f"/{_HEALTH}/Check": Target(
        SERVICES[1],
        health_pb2.HealthCheckRequest,
        (health_pb2.HealthCheckRequest(),),
        frozenset({Code.NOT_FOUND}),
    ),
    f"/{_HEALTH}/Watch": Target(
        SERVICES[1], health_pb2.HealthCheckRequest, (health_pb2.HealthCheckRequest(),)
    ),
    f"/{_REFLECTION}/ServerReflectionInfo": Target(
        SERVICES[1],
        reflection_pb2.ServerReflectionRequest,
        (reflection_pb2.ServerReflectionRequest(list_services=""),),
        frozenset({Code.NOT_FOUND}),
    ),
}


class UnsentWeights(SimulatedEngine):
    """Joins nobody and receives nothing, but does all else that the twin of vLLM does."""

    def __init__(self) -> None:
        super().__init__(Simulation(seconds_per_completion=0.0, tokens_per_completion=2))
        self.max_update_bytes = 1 << 16
        self.staged: StagedWeights | None = None

    async def join_group(self, spec: Any) -> None:
        if spec.store_port % 2:
            raise BroadcastError("nobody is there")

    async def begin_update(
        self,
        version: int,
        manifest: Manifest,
        *,
        bucket_bytes: int,
        source: WeightSource | None = None,
    ) -> None:
        self.staged = StagedWeights(manifest, bucket_bytes=bucket_bytes)

    async def commit_update(
        self, version: int, *, expected_checksum: int | None, timeout_seconds: float
    ) -> Any:
        if self.staged is None or not expected_checksum:
            raise BroadcastError("no transfer was started")
        if expected_checksum == 1:
            raise EngineError("the update lacks 1 parameters")
        self.staged, self.policy_version = None, version
        costs = dict.fromkeys(("receive_seconds", "load_seconds", "pause_seconds"), 0.0)
        return SimpleNamespace(checksum=expected_checksum, **costs)

    async def abort_update(self) -> None:
        self.staged = None


@dataclass
class Servers:
    """Running servers; `addresses` by the full name of the service."""

    addresses: dict[str, str]
    replica: Replica
    progress: Progress


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    """All three services, each on a port of its own."""
    engine, progress = UnsentWeights(), Progress()
    scene = Scene(engine=cast(Any, engine))
    report = Report("scores", 0.0, 0.0)
    worker: Any = SimpleNamespace(groups_scored=0, completions_scored=0, report=lambda: report)
    publisher = cast(Any, SimpleNamespace(replicas={}, fleet=None, refitter=None))
    learner = LearnerServicer(
        run_id="fuzz",
        num_steps=1,
        progress=progress,
        publisher=publisher,
        catch_up=CatchUp(publisher),
    )
    rollout = RolloutServicer(
        name="rollout-0",
        engine=engine,
        replica=scene.replica,
        sampler=scene.sampler,
        max_length=MAX_LENGTH,
    )
    async with AsyncExitStack() as stack:
        pool = ScoringPool(TaskConfig(), VerifierConfig(num_workers=1))
        await stack.enter_async_context(pool)
        verifier = VerifierServicer(name="verifier-0", pool=pool, worker=worker)
        adders: dict[str, Callable[[grpc.aio.Server], None]] = {
            SERVICES[0]: lambda s: learner_pb2_grpc.add_LearnerServicer_to_server(learner, s),
            SERVICES[1]: lambda s: rollout_pb2_grpc.add_RolloutServicer_to_server(rollout, s),
            SERVICES[2]: lambda s: verifier_pb2_grpc.add_VerifierServicer_to_server(verifier, s),
        }
        addresses = {}
        for service, add in adders.items():
            server = await stack.enter_async_context(
                serve(host="127.0.0.1", port=0, port_key="port", services=[service], add=add)
            )
            addresses[service] = f"127.0.0.1:{server.port}"
        yield Servers(addresses, scene.replica, progress)


async def call(
    channel: grpc.aio.Channel, method: str, payload: bytes, *, seconds: float
) -> grpc.StatusCode:
    """The status of a call whose request is these bytes, whatever they are."""
    kind: Any = {
        f"/{_HEALTH}/Watch": channel.unary_stream,
        "/isentrope.v1.Learner/FetchWeights": channel.unary_stream,
        f"/{_REFLECTION}/ServerReflectionInfo": channel.stream_stream,
    }.get(method, channel.unary_unary)
    request: Any = iter([payload]) if kind == channel.stream_stream else payload
    answers = kind(method)(request, timeout=seconds)
    try:
        if kind == channel.unary_unary:
            await answers
        else:
            # One answer will do: who watches health is never told that it was the last.
            await anext(aiter(answers), None)
        return Code.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        answers.cancel()
