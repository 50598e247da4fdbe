"""Who is there: leases in Redis, and the policy version that the learner announced.

A service holds a lease under `(role, name)` and refreshes it; one that stops is gone when the lease
runs out. A restarted service takes its name over at once, and the process that held it before, if
it still lives, finds out at its next refresh and must stop: a name is one consumer on the streams.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import DecodeError

from protos import lease_pb2 as pb
from shared.errors import StreamError
from shared.redis_connection import REFUSED, Patience, translated

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 5.0
"""Of a lease that an ending service gives back; one that is not given back runs out."""

Role = Literal["learner", "rollout", "verifier"]

_REFRESH = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], KEYS[1])
return 1
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('SREM', KEYS[2], KEYS[1])
end
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A service that holds a lease; addresses are `host:port`, `token` is new at every start."""

    role: Role
    name: str
    address: str
    metrics_address: str
    token: str


class Registry:
    """The leases of one run; errors of the server are `StreamError`.

    Args:
        patience: of the questions; a lease itself is kept without.
        release_seconds: how long an ending service tries to give its lease back.
    """

    def __init__(
        self,
        client: Any,
        *,
        prefix: str,
        patience: Patience | None = None,
        release_seconds: float = RELEASE_SECONDS,
    ) -> None:
        self._client = client
        self._release_seconds = release_seconds
        self._patience = patience or Patience()
        self._prefix = prefix
        self._index = prefix + "leases"
        self._lease = prefix + "lease:"
        self._refresh = client.register_script(_REFRESH)
        self._release = client.register_script(_RELEASE)

    async def members(self, role: Role | None = None) -> list[Member]:
        """Everyone whose lease has not run out, sorted by role and name."""

        async def ask() -> list[bytes | None]:
            with translated(self._index):
                found = await self._client.smembers(self._index)
                # What does not belong there would have the server refuse the whole question.
                keys = sorted(key for key in found if key.startswith(self._lease.encode()))
                return list(await self._client.mget(keys)) if keys else []

        values = await self._patience.outlast(ask)
        found = [_decode(value) for value in values if value is not None]
        return sorted(
            (member for member in found if role in (None, member.role)),
            key=lambda member: (member.role, member.name),
        )

    @asynccontextmanager
    async def hold(
        self, role: Role, name: str, *, address: str, metrics_address: str, seconds: float
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Hold a lease; the task given ends, with an error, only if another took the name.

        Consumes nothing, waits for a third of the lease between refreshes, survives a Redis that is
        away for a while, stops when the context does.
        """
        member = Member(role, name, address, metrics_address, secrets.token_hex(8))
        key, value = self._key(member), _encode(member)
        with translated(key):
            await self._client.set(key, value, px=int(seconds * 1000))
            await self._client.sadd(self._index, key)
        task = asyncio.create_task(self._keep(member, seconds), name=f"lease {name}")
        try:
            yield task
        finally:
            task.cancel()
            try:
                async with asyncio.timeout(self._release_seconds):
                    with translated(key):
                        await self._release(keys=[key, self._index], args=[value])
            except (StreamError, TimeoutError):
                logger.warning("lease of %s not released: Redis is away; it will run out", name)

    async def announce_version(self, policy_version: int) -> None:
        """Tell everyone which version is published."""
        key = self._prefix + "policy_version"

        async def announce() -> None:
            with translated(key):
                await self._client.set(key, policy_version)

        await self._patience.outlast(announce)

    async def announced_version(self) -> int | None:
        """The last announced version, or None before the first."""
        key = self._prefix + "policy_version"

        async def ask() -> Any:
            with translated(key):
                return await self._client.get(key)

        value = await self._patience.outlast(ask)
        try:
            return None if value is None else int(value)
        except ValueError:
            raise StreamError(f"{key} holds {value[:40]!r}, which is no version") from None

    async def _keep(self, member: Member, seconds: float) -> None:
        value = _encode(member)
        while True:
            await asyncio.sleep(seconds / 3)
            try:
                with translated(self._key(member)):
                    kept = await self._refresh(
                        keys=[self._key(member), self._index], args=[value, int(seconds * 1000)]
                    )
            except StreamError as error:
                if error.status == REFUSED:
                    raise
                logger.warning("lease of %s not refreshed: %s", member.name, error)
                continue
            if not kept:
                raise StreamError(
                    f"another process holds the name {member.name!r}; names must be unique in a run"
                )

    def _key(self, member: Member) -> str:
        return f"{self._lease}{member.role}:{member.name}"


def _encode(member: Member) -> bytes:
    return pb.Lease(
        role=member.role,
        name=member.name,
        address=member.address,
        metrics_address=member.metrics_address,
        token=member.token,
    ).SerializeToString(deterministic=True)


def _decode(value: bytes) -> Member:
    try:
        lease = pb.Lease.FromString(value)
    except DecodeError as error:
        raise StreamError(f"a lease that is not one: {error}") from None
    return Member(
        lease.role,  # type: ignore[arg-type]
        lease.name,
        lease.address,
        lease.metrics_address,
        lease.token,
    )
