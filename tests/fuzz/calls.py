"""Calls that no peer of ours would make, and what must hold after each of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc

from services.rollout.replica import State
from shared.rpc import open_channel
from tests.fuzz.payloads import payload
from tests.fuzz.services import ANSWERS, TARGETS, Code, Servers, call, servers

CALL_SECONDS = 60.0
"""A call that takes longer hangs; on an idle machine one takes milliseconds."""

STEP_SECONDS = 0.05
"""For what waits for a step that never ends here."""

_STANDINGS = (
    (State.STALE, -1), (State.STALE, 3), (State.SERVING, 0), (State.SERVING, 3),
    (State.DRAINING, -1), (State.DRAINING, 3),
)  # fmt: skip
"""What a replica that listens may be, and the version that it has."""


@dataclass(frozen=True)
class Fuzzed:
    """Running servers, and a channel to each."""

    servers: Servers
    channels: dict[str, grpc.aio.Channel]

    async def call(self, method: str, request: bytes) -> grpc.StatusCode:
        """Its status."""
        target = TARGETS[method]
        seconds = STEP_SECONDS if Code.DEADLINE_EXCEEDED in target.codes else CALL_SECONDS
        return await call(self.channels[target.service], method, request, seconds=seconds)

    async def attack(self, method: str, request: bytes) -> None:
        """Make the call; AssertionError if what comes back is not a clear status."""
        code = await self.call(method, request)
        allowed = ANSWERS | TARGETS[method].codes
        shown = request[:200].hex() + ("..." if len(request) > 200 else "")
        assert code in allowed, f"{method} answered {code.name} to {shown}"

    async def attack_drawn(self, draw: random.Random, method: str) -> None:
        """One case, with a replica in whatever state."""
        replica = self.servers.replica
        replica.state, replica.policy_version = draw.choice(_STANDINGS)
        target = TARGETS[method]
        seeds = [seed.SerializeToString() for seed in target.seeds]
        await self.attack(method, payload(draw, target.request, seeds))

    async def assert_serves(self) -> None:
        """Every service answers a good call."""
        for method in TARGETS:
            if method.endswith(("/GetStatus", "/Check")):
                good = TARGETS[method].seeds[0].SerializeToString()
                assert await self.call(method, good) is Code.OK, method

    async def assert_forgets(self) -> None:
        """Nobody waits for a step any more of whom all have gone."""
        async with asyncio.timeout(CALL_SECONDS):
            while self.servers.progress.checkpoint_requests:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def fuzzed() -> AsyncIterator[Fuzzed]:
    """All services, and channels to them that send more than they should."""
    async with servers() as running, AsyncExitStack() as stack:
        channels = {
            service: await stack.enter_async_context(open_channel(address))
            for service, address in running.addresses.items()
        }
        yield Fuzzed(running, channels)
