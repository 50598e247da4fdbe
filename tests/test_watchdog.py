"""Health that means progress, over a real gRPC server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from shared.activity import Report
from shared.rpc import PROGRESS, RpcServer, open_channel, serve
from shared.watchdog import Stall, watched

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    serving = serve(
        host="127.0.0.1", port=0, port_key="port", services=["one"], add=lambda server: None
    )
    async with serving as made:
        await made.set_serving(True)
        yield made


async def health(server: RpcServer, name: str) -> int:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60.0)
        return int(answer.status)


async def until_health(server: RpcServer, wanted: int) -> None:
    async with asyncio.timeout(60.0):
        while await health(server, PROGRESS) != wanted:
            await asyncio.sleep(0.01)


def gauge(service: str) -> float | None:
    return REGISTRY.get_sample_value("isentrope_service_stalled", {"service": service})


def test_a_stall_is_news_once_a_bound_and_again_after_it_ended() -> None:
    stall = Stall(bound_seconds=300.0)
    ages = [0, 299, 300, 301, 599, 600, 1300, 1301, 5, 299, 300]
    assert [age for age in ages if stall.is_news(age)] == [300, 600, 1300, 300]
    assert [stall.has(age) for age in (0, 299.9, 300)] == [False, False, True]


def test_a_bound_of_zero_is_never_passed() -> None:
    stall = Stall(bound_seconds=0.0)
    assert not stall.has(1e9)
    assert not stall.is_news(1e9)
    assert stall.look_seconds == 1.0


async def test_who_is_stuck_says_so_in_health_metric_and_log_and_takes_it_back(
    server: RpcServer, caplog: pytest.LogCaptureFixture
) -> None:
    now = Report("samples 6 groups, the oldest for 9 s", 9.0, 0.0)
    async with watched(lambda: now, server, "rollout", stall_seconds=0.2):
        assert await health(server, PROGRESS) == SERVING
        assert gauge("rollout") == 0
        now = Report("samples 6 groups, the oldest for 301 s", 301.0, 301.0)
        await until_health(server, NOT_SERVING)
        assert [await health(server, name) for name in ("", "one")] == [SERVING, SERVING]
        assert gauge("rollout") == 1
        now = Report("waits for prompts for 0 s", 0.0)
        await until_health(server, SERVING)
        assert gauge("rollout") == 0
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "stalled: samples 6 groups, the oldest for 301 s; nothing ended for 301 s",
    ]


async def test_a_watchdog_that_fails_is_logged_and_ends_nothing_else(
    server: RpcServer, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Report:
        raise KeyError("no such entry")

    async with watched(broken, server, "verifier", stall_seconds=300.0):
        await until(lambda: "the watchdog itself has ended" in caplog.text)
        assert "no such entry" in caplog.text
        assert await health(server, PROGRESS) == SERVING


@pytest.mark.parametrize(
    ("report", "stall_seconds"),
    [(Report("waits for the learner", 9000.0, 0.0), 0.04), (Report("samples", 9e3, 9e3), 0.0)],
    ids=["waits for others", "switched off"],
)
async def test_who_waits_for_others_is_well_however_long(
    server: RpcServer, report: Report, stall_seconds: float
) -> None:
    looks = 0

    def look() -> Report:
        nonlocal looks
        looks += 1
        return report

    async with watched(look, server, "verifier", stall_seconds=stall_seconds):
        await until(lambda: looks > 1)
        assert await health(server, PROGRESS) == SERVING
        assert gauge("verifier") == 0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not holds():
            await asyncio.sleep(0.005)
