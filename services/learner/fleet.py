"""The rollout replicas as the learner sees them, and the broadcast groups it shares with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import grpc

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from shared.broadcast import BroadcastGroup, GroupSpec, open_group, open_store
from shared.errors import PeerError
from shared.lease import Member, Registry
from shared.metrics import WEIGHT_SYNC_OPERATIONS
from shared.rpc import call, open_channel

logger = logging.getLogger(__name__)

CANARY = "CANARY"
"""`PeerError.status` of a replica whose canary's log-probs differ."""


@dataclass(eq=False, slots=True)
class Peer:
    """A rollout replica.

    Attributes:
        policy_version: what it serves, as far as the learner confirmed it; None if nothing.
        groups: the learner's ends of the broadcast groups that reach its workers.
        epoch: in which those groups were formed.
    """

    member: Member
    channel: grpc.aio.Channel
    stub: pb_grpc.RolloutAsyncStub
    num_workers: int
    policy_version: int | None = None
    groups: list[BroadcastGroup] = field(default_factory=list)
    epoch: int = 0

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.member.name

    def leave_groups(self) -> None:
        """Close the learner's ends; the peer must join again before the next transfer."""
        for group in self.groups:
            group.close()
        self.groups.clear()


class Fleet:
    """Follows the leases of rollout replicas, and forms broadcast groups with them.

    Args:
        layout: `pairs` is a group of two for each worker: it notices a dead peer at once, and a
            newcomer disturbs nobody; the choice for gloo. `one` is a group of all that take part,
            formed anew when they are not the ones of last time: NCCL broadcasts to many at the
            price of one.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        host: str,
        backend: Literal["gloo", "nccl"],
        layout: Literal["pairs", "one"],
        timeout_seconds: float,
    ) -> None:
        self._registry = registry
        self._host = host
        self._backend: Literal["gloo", "nccl"] = backend
        self._layout = layout
        self._timeout_seconds = timeout_seconds
        self._store = open_store(host)
        self._epoch = 0
        self._peers: dict[str, Peer] = {}

    @property
    def peers(self) -> list[Peer]:
        """The replicas met, in order of their names."""
        return sorted(self._peers.values(), key=lambda peer: peer.name)

    async def meet(self) -> None:
        """Follow the leases: a channel to whoever came, none to whoever went."""
        members = {member.token: member for member in await self._registry.members("rollout")}
        for token in set(self._peers) - set(members):
            logger.warning("replica %s is gone", self._peers[token].name)
            await self._part(token)
        newcomers = set(members) - set(self._peers)
        await asyncio.gather(*(self._greet(members[token]) for token in newcomers))

    async def connect(self, peers: list[Peer]) -> list[Peer]:
        """See that each has its groups; returns those that do."""
        # An end that is opened holds a thread until the other end comes: never for a dead one.
        without = {
            peer: self._ask_status(peer.name, peer.stub) for peer in peers if not peer.groups
        }
        living = await each(without, doing="asking whether it is there")
        peers = [peer for peer in peers if peer.groups or peer in living]
        if self._layout == "pairs":
            await self._connect_pairs([peer for peer in peers if not peer.groups])
        else:
            await self._connect_all(peers)
        connected = [peer for peer in peers if peer.groups]
        if peers and not connected:
            # Living replicas, and none came through: the store itself may be what failed.
            self._store = open_store(self._host)
        return connected

    async def close(self) -> None:
        """Leave every group and close every channel."""
        for token in list(self._peers):
            await self._part(token)

    async def _greet(self, member: Member) -> None:
        channel = open_channel(member.address)
        stub: pb_grpc.RolloutAsyncStub = pb_grpc.RolloutStub(channel)
        try:
            status = await self._ask_status(member.name, stub)
        except PeerError as error:
            logger.warning("replica does not answer yet: %s", error)
            await channel.close()
            return
        self._peers[member.token] = Peer(member, channel, stub, max(1, status.num_workers))
        logger.info("met replica %s at %s", member.name, member.address)

    async def _ask_status(
        self, name: str, stub: pb_grpc.RolloutAsyncStub
    ) -> pb.GetRolloutStatusResponse:
        request, timeout_seconds = pb.GetRolloutStatusRequest(), self._timeout_seconds
        return await call(stub.GetStatus, request, peer=name, timeout_seconds=timeout_seconds)

    async def _part(self, token: str) -> None:
        peer = self._peers.pop(token)
        peer.leave_groups()
        await peer.channel.close()

    async def _connect_pairs(self, newcomers: list[Peer]) -> None:
        specs = []
        for peer in newcomers:
            self._epoch += 1
            specs.append(self._spec(peer.name, rank=1, world_size=2))
        await each(
            {
                peer: self._connect_pair(peer, spec)
                for peer, spec in zip(newcomers, specs, strict=True)
            },
            doing="joining its broadcast group",
        )

    async def _connect_pair(self, peer: Peer, spec: GroupSpec) -> None:
        ends = [_learner_end(spec, worker=worker) for worker in range(peer.num_workers)]
        opened, _ = await asyncio.gather(self._open(ends), self._ask_to_join(peer, spec))
        peer.groups, peer.epoch = opened, spec.epoch

    async def _connect_all(self, peers: list[Peer]) -> None:
        """One group of exactly these; a culprit is left out and the rest tries again."""
        while peers and not self._share_a_group(peers):
            for peer in self._peers.values():
                peer.leave_groups()
            joined = await self._form_group(peers)
            if len(joined) == len(peers):
                return
            peers = joined

    def _share_a_group(self, peers: list[Peer]) -> bool:
        """Whether one group reaches these peers and nobody else."""
        shared = {id(group) for peer in peers for group in peer.groups}
        members = sum(bool(peer.groups) for peer in self._peers.values())
        return len(shared) == 1 and members == len(peers) and all(peer.groups for peer in peers)

    async def _form_group(self, peers: list[Peer]) -> list[Peer]:
        """Returns those to try again with: everyone if it formed, else all but the culprits.

        ABORTED is what a replica answers that waited for the others in vain. Nobody is tried
        again if nobody else is to blame.
        """
        self._epoch += 1
        world_size, rank = 1 + sum(peer.num_workers for peer in peers), 1
        joins = []
        for peer in peers:
            joins.append(
                self._ask_to_join(peer, self._spec("all", rank=rank, world_size=world_size))
            )
            rank += peer.num_workers
        end = _learner_end(self._spec("all", rank=0, world_size=world_size), worker=0)
        outcomes: list[Any] = await asyncio.gather(
            self._open([end]), *joins, return_exceptions=True
        )
        opened, answers = outcomes[0], outcomes[1:]
        for answer in outcomes:
            if isinstance(answer, BaseException) and not isinstance(answer, PeerError):
                raise answer
        if not isinstance(opened, PeerError):
            for peer in peers:
                peer.groups, peer.epoch = list(opened), self._epoch
            return peers
        errors = [answer if isinstance(answer, PeerError) else opened for answer in answers]
        blamed = {
            peer: error
            for peer, error in zip(peers, errors, strict=True)
            if error.status not in ("", "ABORTED")
        }
        culprits = blamed or dict.fromkeys(peers, opened)
        for peer, error in culprits.items():
            left_behind([peer], doing="joining the group", error=error)
        return [peer for peer in peers if peer not in culprits]

    async def _open(self, ends: list[GroupSpec]) -> list[BroadcastGroup]:
        """The learner's ends, all at once; if one fails the others are closed."""
        results = await asyncio.gather(
            *(asyncio.to_thread(open_group, end, self._store) for end in ends),
            return_exceptions=True,
        )
        opened = [result for result in results if isinstance(result, BroadcastGroup)]
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            for group in opened:
                group.close()
            raise errors[0]
        return opened

    async def _ask_to_join(self, peer: Peer, spec: GroupSpec) -> None:
        request = pb.JoinBroadcastRequest(
            epoch=spec.epoch,
            backend=spec.backend,
            store_host=spec.store_host,
            store_port=spec.store_port,
            key=spec.key,
            rank=spec.rank,
            world_size=spec.world_size,
            timeout_seconds=spec.timeout_seconds,
        )
        await call(
            peer.stub.JoinBroadcast,
            request,
            peer=peer.name,
            timeout_seconds=2 * self._timeout_seconds,
        )

    def _spec(self, key: str, *, rank: int, world_size: int) -> GroupSpec:
        return GroupSpec(
            epoch=self._epoch,
            backend=self._backend,
            store_host=self._host,
            store_port=self._store.port,
            key=f"epoch {self._epoch}/{key}",
            rank=rank,
            world_size=world_size,
            timeout_seconds=self._timeout_seconds,
        )


async def each(calls: Mapping[Peer, Awaitable[object]], *, doing: str) -> list[Peer]:
    """Do it with every peer at once; who fails is named, counted and left out of the answer."""
    results = await asyncio.gather(*calls.values(), return_exceptions=True)
    succeeded = []
    for peer, result in zip(calls, results, strict=True):
        if isinstance(result, PeerError):
            left_behind([peer], doing=doing, error=result)
        elif isinstance(result, BaseException):
            raise result
        else:
            succeeded.append(peer)
    return succeeded


def left_behind(peers: Iterable[Peer], *, doing: str, error: PeerError) -> None:
    """These serve nothing the learner vouches for, until a later publication reaches them."""
    results = {"DEADLINE_EXCEEDED": "timeout", CANARY: "canary"}
    for peer in peers:
        WEIGHT_SYNC_OPERATIONS.labels(result=results.get(error.status, "error")).inc()
        logger.warning("left %s behind while %s: %s", peer.name, doing, error)
        peer.policy_version = None
        peer.leave_groups()


def _learner_end(spec: GroupSpec, *, worker: int) -> GroupSpec:
    """Rank 0's spec of the group that `spec` gives to a replica's worker."""
    return replace(spec, rank=0).for_worker(worker)
