"""Certificates and authorities change under running services, and nobody notices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import verifier_pb2, verifier_pb2_grpc
from services.cli.launch import free_port
from shared.errors import StartError
from shared.roles import peer_options
from shared.rpc import RpcServer, open_channel
from shared.tls import Credentials, Material
from tests.certificates import Authority, write_credentials
from tests.security.identities import leaf
from tests.security.services import CALL_SECONDS, address, get_status, serving

POLL_SECONDS = 0.05


@asynccontextmanager
async def operating(folder: Path, port: int) -> AsyncIterator[verifier_pb2_grpc.VerifierAsyncStub]:
    """A stub of an operator on a channel that is opened once."""
    operator = Credentials(folder / "operator")
    async with open_channel(f"127.0.0.1:{port}", role="verifier", tls=operator) as channel:
        yield verifier_pb2_grpc.VerifierStub(channel)


def verifying(folder: Path, port: int) -> AbstractAsyncContextManager[RpcServer]:
    """A verifier at this port."""
    return serving("verifier", Credentials(folder / "verifier"), port=port)


def issue(folder: Path, issuer: Authority, *trusted: Authority, **validity: Any) -> None:
    """Give both sides new certificates, and the authorities to trust."""
    for role in ("operator", "verifier"):
        write_credentials(folder / role, leaf(issuer, role, **validity), *trusted)


async def ask(stub: verifier_pb2_grpc.VerifierAsyncStub) -> str:
    request = verifier_pb2.GetVerifierStatusRequest()
    answer = await stub.GetStatus(request, timeout=CALL_SECONDS, wait_for_ready=True)
    return answer.replica


async def is_taken(server: RpcServer, material: Material) -> bool:
    """Whether a new connection by this material comes to a call."""
    options = [*peer_options("verifier"), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(
        address(server), material.channel_credentials(), options=options
    ) as channel:
        return (await get_status(channel, "verifier"))[0] == grpc.StatusCode.OK


async def test_calls_go_on_when_both_sides_old_certificates_have_expired(tmp_path: Path) -> None:
    try:
        await outlive(tmp_path / "short", timedelta(seconds=2))
    except (StartError, grpc.aio.AioRpcError):
        # On a machine so busy that they expired before they were used.
        await outlive(tmp_path / "long", timedelta(seconds=30))


async def outlive(folder: Path, life: timedelta) -> None:
    """Call from before the first certificates' end until after it."""
    ours, port = Authority(), free_port()
    issue(folder, ours, ours, valid_until=life)
    old = Credentials(folder / "operator").current()
    async with operating(folder, port) as stub:
        async with verifying(folder, port) as server:
            assert await ask(stub) == "verifier-0"
            issue(folder, ours, ours)
            assert await ask(stub) == "verifier-0"
            async with asyncio.timeout(2 * CALL_SECONDS):
                while await is_taken(server, old):
                    await asyncio.sleep(POLL_SECONDS)
            assert await is_taken(server, Credentials(folder / "operator").current())
        # Of a server that starts anew the client knows no connection from before.
        async with verifying(folder, port):
            assert await ask(stub) == "verifier-0"


async def test_the_authority_is_changed_by_way_of_a_bundle(tmp_path: Path) -> None:
    old, new, port = Authority("old"), Authority("new"), free_port()
    issue(tmp_path, old, old)
    before = Credentials(tmp_path / "operator").current()
    async with operating(tmp_path, port) as stub:
        async with verifying(tmp_path, port) as server:
            for issuer, trusted in ((old, [old, new]), (new, [old, new]), (new, [new])):
                issue(tmp_path, issuer, *trusted)
                assert await ask(stub) == "verifier-0"
                assert await is_taken(server, Credentials(tmp_path / "operator").current())
            assert not await is_taken(server, before)
        async with verifying(tmp_path, port):
            assert await ask(stub) == "verifier-0"


async def test_a_call_under_way_outlives_the_channel_it_was_made_on(tmp_path: Path) -> None:
    ours = Authority()
    issue(tmp_path, ours, ours)
    operator = Credentials(tmp_path / "operator")
    request = health_pb2.HealthCheckRequest(service="isentrope.v1.Verifier")
    async with (
        serving("verifier", Credentials(tmp_path / "verifier")) as server,
        open_channel(address(server), role="verifier", tls=operator) as channel,
    ):
        watching: Any = health_pb2_grpc.HealthStub(channel)
        updates = watching.Watch(request, timeout=CALL_SECONDS)
        assert (await updates.read()).status == health_pb2.HealthCheckResponse.SERVING
        issue(tmp_path, ours, ours)
        assert (await get_status(channel, "verifier"))[0] == grpc.StatusCode.OK
        await server.set_serving(False)
        assert (await updates.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        updates.cancel()


async def test_a_folder_that_was_spoiled_is_said_and_left_until_it_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Authority()
    issue(tmp_path, ours, ours)
    good = Credentials(tmp_path / "operator")
    caplog.set_level(logging.INFO, logger="shared.tls")
    port = free_port()
    async with operating(tmp_path, port) as stub, verifying(tmp_path, port) as server:
        (tmp_path / "verifier" / "tls.key").write_bytes(leaf(ours, "verifier").key)
        assert await is_taken(server, good.current())
        assert await is_taken(server, good.current())
        [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
        assert "tls.key" in warning.getMessage() and "stays" in warning.getMessage()
        issue(tmp_path, ours, ours)
        assert await is_taken(server, good.current())
        assert await ask(stub) == "verifier-0"
        taken = [each for each in caplog.records if "took the new" in each.getMessage()]
        assert {str(tmp_path / "verifier"), str(tmp_path / "operator")} <= {
            str(each.args[0]) for each in taken if isinstance(each.args, tuple)
        }
