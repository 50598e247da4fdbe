"""Who is there: leases in Redis, and the policy version that the learner announced.

A service holds a lease under `(role, name)` and refreshes it; one that stops is gone when the lease
runs out. A restarted service takes its name over at once, and the process that held it before, if
it still lives, finds out at its next refresh and must stop: a name is one consumer on the streams.

A role and a name are those of the lease's key, which the server's access list guards
(`shared.redis_users`). So what stands in a lease is believed only if it says the same, and a lease
that cannot be read hides nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from google.protobuf.message import DecodeError

from protos import lease_pb2 as pb
from shared.errors import StreamError
from shared.redis_connection import REFUSED, Patience, translated

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 5.0
"""Of a lease that an ending service gives back; one that is not given back runs out."""

Role = Literal["learner", "rollout", "verifier"]

ROLES: tuple[Role, ...] = get_args(Role)

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
        self._index = prefix + "leases:"
        self._lease = prefix + "lease:"
        self._told: frozenset[bytes] = frozenset()
        self._refresh = client.register_script(_REFRESH)
        self._release = client.register_script(_RELEASE)

    async def members(self, role: Role | None = None) -> list[Member]:
        """Everyone whose lease has not run out, sorted by role and name."""
        roles = ROLES if role is None else (role,)
        beginnings = tuple(f"{self._lease}{each}:".encode() for each in roles)

        async def ask() -> dict[bytes, bytes | None]:
            with translated(self._index):
                found = await self._client.sunion([self._index + each for each in roles])
                # What does not belong there would have the server refuse the whole question.
                keys = sorted(key for key in found if key.startswith(beginnings))
                values = await self._client.mget(keys) if keys else []
                return dict(zip(keys, values, strict=True))

        found, refused = [], {}
        for key, value in (await self._patience.outlast(ask)).items():
            try:
                found += [] if value is None else [self._read(key, value)]
            except StreamError as error:
                refused[key] = str(error)
        self._tell(refused)
        return sorted(found, key=lambda member: (member.role, member.name))

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
            await self._client.sadd(self._index + role, key)
        task = asyncio.create_task(self._keep(member, seconds), name=f"lease {name}")
        try:
            yield task
        finally:
            task.cancel()
            try:
                async with asyncio.timeout(self._release_seconds):
                    with translated(key):
                        await self._release(keys=[key, self._index + role], args=[value])
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
        keys, value = [self._key(member), self._index + member.role], _encode(member)
        while True:
            await asyncio.sleep(seconds / 3)
            try:
                with translated(keys[0]):
                    kept = await self._refresh(keys=keys, args=[value, int(seconds * 1000)])
            except StreamError as error:
                if error.status == REFUSED:
                    raise
                logger.warning("lease of %s not refreshed: %s", member.name, error)
                continue
            if not kept:
                raise StreamError(
                    f"another process holds the name {member.name!r}; names must be unique in a run"
                )

    def _read(self, key: bytes, value: bytes) -> Member:
        """Raises StreamError for what is no lease, or another's than the key says."""
        member = _decode(value)
        if self._key(member).encode() != key:
            raise StreamError(f"it says that it is of {member.role} {member.name!r}")
        return member

    def _tell(self, refused: Mapping[bytes, str]) -> None:
        """Once of each, for as long as it is there."""
        news = [key for key in refused if key not in self._told]
        self._told = frozenset(refused)
        if news:
            more = f"; so it is with {len(news) - 1} more" if len(news) > 1 else ""
            first, reason = news[0], refused[news[0]]
            logger.warning("%.200r does not count as a lease: %.200s%s", first, reason, more)

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
        raise StreamError(f"not a lease: {error}") from None
    return Member(
        lease.role,  # type: ignore[arg-type]
        lease.name,
        lease.address,
        lease.metrics_address,
        lease.token,
    )
