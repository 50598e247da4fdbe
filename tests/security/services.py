"""The three services on real servers that ask for certificates, and those who call them.

What is behind the servicers stands still: who gets as far as them is what matters here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
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
from services.learner.progress import Progress
from services.learner.service import LearnerServicer
from services.rollout.service import RolloutServicer
from services.verifier.service import VerifierServicer
from shared.activity import Report
from shared.rpc import RpcServer, serve
from shared.tls import Credentials
from tests.rollout.scene import Scene

CALL_SECONDS = 60.0
"""For answers that come at once."""

SERVICES = {
    "learner": learner_pb2.DESCRIPTOR.services_by_name["Learner"],
    "rollout": rollout_pb2.DESCRIPTOR.services_by_name["Rollout"],
    "verifier": verifier_pb2.DESCRIPTOR.services_by_name["Verifier"],
}
COMMON: list[Any] = [
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
CHUNKS = [b"\0" * 64, b"\1" * 64]


@asynccontextmanager
async def serving(role: str, tls: Credentials | None, *, port: int = 0) -> AsyncIterator[RpcServer]:
    """The service of this role."""
    async with serve(
        host="127.0.0.1",
        port=port,
        port_key="port",
        services=[SERVICES[role].full_name],
        add=_adders()[role],
        tls=tls,
    ) as server:
        await server.set_serving(True)
        yield server


def address(server: RpcServer) -> str:
    return f"127.0.0.1:{server.port}"


def _adders() -> dict[str, Callable[[grpc.aio.Server], None]]:
    report = Report("rests", 0.0, 0.0)
    publisher: Any = SimpleNamespace(replicas={}, version=None)
    learner = LearnerServicer(
        run_id="secure",
        num_steps=1,
        progress=Progress(),
        publisher=publisher,
        catch_up=cast(Any, SimpleNamespace(chunks=_chunks)),
    )
    scene = Scene()
    rollout = RolloutServicer(
        name="rollout-0",
        engine=cast(Any, SimpleNamespace(num_workers=1, abort_update=_nothing)),
        replica=scene.replica,
        sampler=scene.sampler,
        max_length=64,
    )
    worker: Any = SimpleNamespace(groups_scored=0, completions_scored=0, report=lambda: report)
    pool: Any = SimpleNamespace(task=SimpleNamespace(name="countdown"), num_waiting=0)
    verifier = VerifierServicer(name="verifier-0", pool=pool, worker=worker)
    return {
        "learner": lambda s: learner_pb2_grpc.add_LearnerServicer_to_server(learner, s),
        "rollout": lambda s: rollout_pb2_grpc.add_RolloutServicer_to_server(rollout, s),
        "verifier": lambda s: verifier_pb2_grpc.add_VerifierServicer_to_server(verifier, s),
    }


async def _chunks(ticket: str) -> AsyncIterator[bytes]:
    for chunk in CHUNKS:
        yield chunk


async def _nothing() -> None:
    return None


def methods(services: Sequence[Any]) -> list[str]:
    """Full names by the services' descriptors, as `/isentrope.v1.Learner/GetStatus`."""
    return [f"/{each.full_name}/{method.name}" for each in services for method in each.methods]


async def status_of(channel: grpc.aio.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    """Code and words of the answer to an empty request."""
    anyhow: Any = channel  # its methods are typed for requests that are not bytes
    is_stream = method.endswith(("/Watch", "/FetchWeights", "/ServerReflectionInfo"))
    try:
        if not is_stream:
            await anyhow.unary_unary(method)(b"", timeout=CALL_SECONDS)
        else:
            # What a client may stream is sent as one message: the server sees no difference.
            stream = anyhow.unary_stream(method)(b"", timeout=CALL_SECONDS)
            await stream.read()
            stream.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def get_status(channel: grpc.aio.Channel, role: str) -> tuple[grpc.StatusCode, str]:
    """How `GetStatus` of this role's service answers."""
    return await status_of(channel, f"/{SERVICES[role].full_name}/GetStatus")
