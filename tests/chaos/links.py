"""The links of a run's services, each through a proxy.

Each service reaches Redis through a proxy of its own. The learner reaches a rollout replica's gRPC
server through another one, which stands where the replica's lease says that the replica is: at an
address of its own, with the port that the replica listens on at `network.host`. (The broadcast of
weights opens its own sockets between learner and engines; those links are direct.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Self

from services.cli.launch import ROLLOUT, Launch
from shared.errors import StreamError
from shared.lease import Member, Registry
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from tests.chaos.proxy import Proxy

LOOK_SECONDS = 0.5


class Links:
    """The proxies of one run; `async with` opens those to Redis.

    Attributes:
        redis: by the name of the service.
        control: the learner's way to a replica, by the replica's name.
        members: who held a lease when last looked, without those known to have ended.
    """

    def __init__(self, *, redis_url: str, run_id: str, host: str, names: Iterable[str]) -> None:
        self._redis_url = redis_url
        self._run_id = run_id
        self._host = host
        socket = redis_url.removeprefix("unix://")
        self.redis = {name: Proxy(socket) for name in names}
        self.control: dict[str, Proxy] = {}
        self.members: dict[str, Member] = {}
        self._gone: set[str] = set()
        self._proxies = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for link in self.redis.values():
            await self._proxies.enter_async_context(link)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._proxies.aclose()

    def environment_of(self, launch: Launch) -> dict[str, str]:
        """What a service is told, so that it takes these links."""
        told = {"REDIS_URL": f"redis://{self.redis[launch.name].address}"}
        if launch.role == ROLLOUT:
            told["ISENTROPE_HOST"] = f"127.0.0.{11 + int(launch.name.rpartition('-')[2])}"
        return told

    def forget(self, name: str) -> None:
        """The process that held this name has ended, whatever its lease says."""
        member = self.members.pop(name, None)
        if member is not None:
            self._gone.add(member.token)

    async def follow_leases(self) -> None:
        """Who is there, and a proxy where each replica says that it is; until cancelled."""
        client = connect(self._redis_url, timeout_seconds=2.0, retries=0)
        registry = Registry(client, prefix=key_prefix(self._run_id))
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                try:
                    held = await registry.members()
                except StreamError:
                    continue
                there = [member for member in held if member.token not in self._gone]
                self.members = {member.name: member for member in there}
                for member in there:
                    if member.role == ROLLOUT:
                        await self._link(member)
        finally:
            await client.aclose()

    async def _link(self, replica: Member) -> None:
        known = self.control.get(replica.name)
        if known is not None and known.address == replica.address:
            return
        host, _, port = replica.address.rpartition(":")
        link = Proxy(f"{self._host}:{port}", host=host, port=int(port))
        self.control[replica.name] = await self._proxies.enter_async_context(link)
