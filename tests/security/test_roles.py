"""The table of who may call what: complete, without dead lines, and what servers go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shared.roles import PERMISSIONS, ROLES, role_of, role_uri
from shared.rpc import open_channel, serve
from tests.certificates import Authority
from tests.security.identities import credentials
from tests.security.services import (
    CALL_SECONDS,
    COMMON,
    SERVICES,
    address,
    methods,
    serving,
    status_of,
)

OURS = Authority("ours")

NEVER = [
    ("rollout", "/isentrope.v1.Learner/Stop"),
    ("rollout", "/isentrope.v1.Learner/Pause"),
    ("rollout", "/isentrope.v1.Rollout/Serve"),
    ("verifier", "/isentrope.v1.Learner/FetchWeights"),
    ("verifier", "/isentrope.v1.Rollout/BeginUpdate"),
    ("verifier", "/isentrope.v1.Rollout/JoinBroadcast"),
    ("operator", "/isentrope.v1.Rollout/CommitUpdate"),
    ("operator", "/isentrope.v1.Learner/FetchWeights"),
    ("client", "/isentrope.v1.Learner/GetStatus"),
    ("client", "/isentrope.v1.Rollout/Drain"),
]


def test_every_method_stands_in_the_table_and_nothing_else_does() -> None:
    assert set(methods([*SERVICES.values(), *COMMON])) == set(PERMISSIONS)
    assert all(roles and roles <= ROLES for roles in PERMISSIONS.values())


@pytest.mark.parametrize("service", SERVICES)
async def test_a_server_offers_only_services_of_which_the_table_knows(
    service: str, tmp_path: Path
) -> None:
    """As the server itself says, so that a service which is added there is missed here."""
    known = {each.full_name for each in [SERVICES[service], *COMMON]}
    operator = credentials(tmp_path, OURS, "operator")
    async with (
        serving(service, credentials(tmp_path, OURS, service)) as server,
        open_channel(address(server), role=service, tls=operator) as channel,
    ):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, channel))
        request: Any = reflection_pb2.ServerReflectionRequest
        asked = [request(list_services="")]
        async for answer in stub.ServerReflectionInfo(iter(asked), timeout=CALL_SECONDS):
            offered = {each.name for each in answer.list_services_response.service}
    assert offered == known


@pytest.mark.parametrize("service", SERVICES)
async def test_each_role_gets_through_to_its_own_methods_only(service: str, tmp_path: Path) -> None:
    async with serving(service, credentials(tmp_path, OURS, service)) as server:
        for role in sorted(ROLES):
            own = credentials(tmp_path / "callers", OURS, role)
            async with open_channel(address(server), role=service, tls=own) as channel:
                for method in methods([SERVICES[service], *COMMON]):
                    if method.endswith("/Checkpoint") and role in PERMISSIONS[method]:
                        continue  # it would wait for a step, and nothing takes one here
                    code, _ = await status_of(channel, method)
                    is_refused = code == grpc.StatusCode.PERMISSION_DENIED
                    assert is_refused == (role not in PERMISSIONS[method]), (role, method, code)


@pytest.mark.parametrize(("role", "method"), NEVER)
def test_what_each_role_must_never_do(role: str, method: str) -> None:
    assert role not in PERMISSIONS[method]


async def test_a_method_that_is_not_in_the_table_is_nobody_s(tmp_path: Path) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return request

    forgotten = grpc.method_handlers_generic_handler(
        "isentrope.v1.Verifier",
        {"Forgotten": grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)},
    )
    operator = credentials(tmp_path, OURS, "operator")
    async with (
        serve(
            host="127.0.0.1",
            port=0,
            port_key="port",
            services=[],
            add=lambda server: server.add_generic_rpc_handlers([forgotten]),
            tls=credentials(tmp_path, OURS, "verifier"),
        ) as server,
        open_channel(address(server), role="verifier", tls=operator) as channel,
    ):
        code, words = await status_of(channel, "/isentrope.v1.Verifier/Forgotten")
    assert code == grpc.StatusCode.PERMISSION_DENIED
    assert words == "/isentrope.v1.Verifier/Forgotten: for nobody; the caller's role is operator"


@pytest.mark.parametrize(
    "uri",
    ["learner", "spiffe://isentrope/", "spiffe://isentrope/learner/x", "spiffe://isentrope/LEARNER",
     "spiffe://isentrope/root", "https://isentrope/learner", "spiffe://evil/spiffe://isentrope/learner"],
)  # fmt: skip
def test_what_is_not_exactly_a_role_is_none(uri: str) -> None:
    assert role_of(uri) is None
    assert role_of(role_uri("learner")) == "learner"
