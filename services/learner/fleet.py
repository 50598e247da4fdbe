"""The rollout replicas that hold a lease, and the broadcast groups the learner shares with them."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from services.learner.peer import Peer, ask_each, left_behind, rest_seconds
from shared.broadcast import BroadcastGroup, GroupSpec, open_group, open_store
from shared.errors import PeerError
from shared.lease import Member, Registry
from shared.roles import ROLLOUT
from shared.rpc import open_channel
from shared.tls import Credentials

logger = logging.getLogger(__name__)

_OPENING_THREADS = 64
"""Ends of groups that are opened at the same time; each waits in a thread for the other end."""

_MAX_WORKERS = 1024
"""Of one replica: the learner opens a group for each that a replica says it has."""


@dataclass(frozen=True, slots=True)
class _Greeting:
    """A newcomer is asked who it is; `was_asked` once, and then nobody waits for it any more."""

    task: asyncio.Task[None]
    was_asked: asyncio.Event


class Fleet:
    """Follows the leases of rollout replicas, and forms broadcast groups with them.

    Args:
        layout: `pairs` is a group of two for each worker: it notices a dead peer at once, and a
            newcomer disturbs nobody; the choice for gloo. `one` is a group of all that take part,
            formed anew when they are not the ones of last time: NCCL broadcasts to many at the
            price of one.
        tls: for the channels to replicas.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        host: str,
        backend: Literal["gloo", "nccl"],
        layout: Literal["pairs", "one"],
        timeout_seconds: float,
        tls: Credentials | None = None,
    ) -> None:
        self._registry = registry
        self._host = host
        self._backend: Literal["gloo", "nccl"] = backend
        self._layout = layout
        self._timeout_seconds = timeout_seconds
        self._tls = tls
        self._store = open_store(host)
        self._epoch = 0
        self._peers: dict[str, Peer] = {}
        self._greetings: dict[str, _Greeting] = {}
        self._num_looks = 0
        self._newest_look = 0
        self._threads = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="open-group")

    @property
    def peers(self) -> list[Peer]:
        """The replicas met, in order of their names."""
        return sorted(self._peers.values(), key=lambda peer: peer.name)

    @property
    def has_one_group(self) -> bool:
        """Whether a member that breaks a transfer breaks it for all."""
        return self._layout == "one"

    async def meet(self) -> None:
        """Follow the leases: a channel to whoever came, none to whoever went.

        Who came belongs to `peers` once it has answered. That is waited for when the lease is new
        only: one that does not answer then holds nobody up any more, and is asked again beside.
        """
        self._num_looks += 1
        look = self._num_looks
        members = {member.token: member for member in await self._registry.members("rollout")}
        if look < self._newest_look:
            return  # a later look has seen newer leases, and this one may have waited for Redis
        self._newest_look = look
        for token in set(self._greetings) - set(members):
            self._greetings[token].task.cancel()
        for token in set(members) - set(self._peers) - set(self._greetings):
            self._begin_to_greet(members[token])
        gone = [self._part(token) for token in set(self._peers) - set(members)]
        for peer in gone:
            logger.warning("replica %s is gone", peer.name)
        await asyncio.gather(*(peer.channel.close() for peer in gone))
        await asyncio.gather(*(each.was_asked.wait() for each in self._greetings.values()))

    async def ask_who_lives(self, peers: list[Peer]) -> dict[Peer, PeerError]:
        """Ask each for a sign of life; returns the silent. A stopped process gives none."""
        timeout_seconds = self._timeout_seconds
        return await ask_each(
            {peer: peer.ask_status(timeout_seconds=timeout_seconds) for peer in peers}
        )

    async def connect(self, peers: list[Peer], *, until: float) -> list[Peer]:
        """See that each has its groups; returns those that do, the others are left behind.

        Args:
            until: monotonic; a group of all that did not form is not tried again later.
        """
        # An end that is opened holds a thread until the other end comes: never for a dead one.
        silent = await self.ask_who_lives([peer for peer in peers if not peer.groups])
        left_behind(silent, doing="asking whether it is there")
        peers = [peer for peer in peers if peer not in silent]
        if self._layout == "pairs":
            await self._connect_pairs([peer for peer in peers if not peer.groups])
        else:
            await self._connect_all(peers, until)
        connected = [peer for peer in peers if peer.groups]
        if peers and not connected:
            # Living replicas, and none came through: the store itself may be what failed.
            self._store = open_store(self._host)
        return connected

    async def close(self) -> None:
        """Leave every group and close every channel."""
        greetings = [greeting.task for greeting in self._greetings.values()]
        for greeting in greetings:
            greeting.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)
        gone = [self._part(token) for token in list(self._peers)]
        await asyncio.gather(*(peer.channel.close() for peer in gone))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin_to_greet(self, member: Member) -> None:
        def forget(done: asyncio.Task[None]) -> None:
            del self._greetings[member.token]
            was_asked.set()
            if not done.cancelled() and (error := done.exception()) is not None:
                logger.error("%s not met", member.name, exc_info=error)

        was_asked = asyncio.Event()
        task = asyncio.create_task(self._greet(member, was_asked), name=f"greets {member.name}")
        self._greetings[member.token] = _Greeting(task, was_asked)
        task.add_done_callback(forget)

    async def _greet(self, member: Member, was_asked: asyncio.Event) -> None:
        """Ask who it is until it says so, with longer and longer rests; stops when cancelled."""
        for num_failures in count(1):
            # A channel of its own each time: one that failed waits long before it connects again.
            channel = open_channel(member.address, role=ROLLOUT, tls=self._tls)
            peer = Peer(member, channel, pb_grpc.RolloutStub(channel), num_workers=1)
            try:
                status = await peer.ask_status(timeout_seconds=self._timeout_seconds)
                peer.num_workers = _workers_of(status)
                self._peers[member.token] = peer
            except PeerError as error:
                logger.warning("replica does not answer yet: %s", error)
            finally:
                was_asked.set()
                if member.token not in self._peers:
                    await channel.close()
            if member.token in self._peers:
                logger.info("met replica %s at %s", member.name, member.address)
                return
            await asyncio.sleep(rest_seconds(num_failures))

    def _part(self, token: str) -> Peer:
        """Whoever waits for it, in a call or in a transfer, need not wait any longer."""
        peer = self._peers.pop(token)
        peer.gone.set()
        peer.leave_groups()
        return peer

    async def _connect_pairs(self, newcomers: list[Peer]) -> None:
        specs = []
        for peer in newcomers:
            self._epoch += 1
            specs.append(self._spec(peer.name, rank=1, world_size=2))
        failed = await ask_each(
            {
                peer: self._connect_pair(peer, spec)
                for peer, spec in zip(newcomers, specs, strict=True)
            }
        )
        left_behind(failed, doing="joining its broadcast group")

    async def _connect_pair(self, peer: Peer, spec: GroupSpec) -> None:
        ends = [_learner_end(spec, worker=worker) for worker in range(peer.num_workers)]
        opening = asyncio.ensure_future(self._open(ends))
        try:
            opened, _ = await asyncio.gather(asyncio.shield(opening), self._ask_to_join(peer, spec))
        except PeerError:
            opening.add_done_callback(_close_opened)
            raise
        peer.groups, peer.epoch = opened, spec.epoch

    async def _connect_all(self, peers: list[Peer], until: float) -> None:
        """One group of exactly these; a culprit is left out and the rest tries again."""
        while peers and not self._share_a_group(peers):
            for peer in self._peers.values():
                peer.leave_groups()
            joined = await self._form_group(peers)
            if len(joined) == len(peers) or time.monotonic() > until:
                return
            peers = joined

    def _share_a_group(self, peers: list[Peer]) -> bool:
        """Whether one group reaches these peers and nobody else."""
        shared = {id(group) for peer in peers for group in peer.groups}
        members = sum(bool(peer.groups) for peer in self._peers.values())
        return len(shared) == 1 and members == len(peers) and all(peer.groups for peer in peers)

    async def _form_group(self, peers: list[Peer]) -> list[Peer]:
        """Returns those to try again with: everyone if it formed, else all but the culprits.

        Decided by the first failure, since a group that lacks one member never forms.
        """
        self._epoch += 1
        world_size, rank = 1 + sum(peer.num_workers for peer in peers), 1
        joins: dict[Peer, asyncio.Task[None]] = {}
        for peer in peers:
            spec = self._spec("all", rank=rank, world_size=world_size)
            joins[peer] = asyncio.create_task(self._ask_to_join(peer, spec))
            rank += peer.num_workers
        end = _learner_end(self._spec("all", rank=0, world_size=world_size), worker=0)
        opening = asyncio.create_task(self._open([end]))
        try:
            await asyncio.gather(asyncio.shield(opening), *joins.values())
        except PeerError as error:
            opening.add_done_callback(_close_opened)
            culprits = await self._find_culprits(joins, error)
            left_behind(culprits, doing="joining the group")
            return [peer for peer in peers if peer not in culprits]
        opened = opening.result()
        for peer in peers:
            peer.groups, peer.epoch = opened, self._epoch
        return peers

    async def _find_culprits(
        self, joins: dict[Peer, asyncio.Task[None]], first: PeerError
    ) -> dict[Peer, PeerError]:
        """Who refused to join; else who gives no sign of life; else everyone.

        ABORTED is what a replica answers that waited for the others in vain.
        """
        refused: dict[Peer, PeerError] = {}
        for peer, join in joins.items():
            error = join.exception() if join.done() and not join.cancelled() else None
            if isinstance(error, PeerError) and error.status != "ABORTED":
                refused[peer] = error
            join.cancel()
        silent = {} if refused else await self.ask_who_lives(list(joins))
        return refused or silent or dict.fromkeys(joins, first)

    async def _open(self, ends: list[GroupSpec]) -> list[BroadcastGroup]:
        """The learner's ends, all at once; if one fails the others are closed."""
        loop = asyncio.get_running_loop()
        results = await asyncio.gather(
            *(loop.run_in_executor(self._threads, open_group, end, self._store) for end in ends),
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
            # A transfer waits for its slowest member: who is not that one must outwait it.
            timeout_seconds=2 * spec.timeout_seconds,
        )
        await peer.ask(peer.stub.JoinBroadcast, request, timeout_seconds=2 * self._timeout_seconds)

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


def _workers_of(status: pb.GetRolloutStatusResponse) -> int:
    """Raises PeerError for more than any replica has."""
    if status.num_workers > _MAX_WORKERS:
        raise PeerError(f"{status.replica}: says that it has {status.num_workers} workers")
    return max(1, status.num_workers)


def _learner_end(spec: GroupSpec, *, worker: int) -> GroupSpec:
    """Rank 0's spec of the group that `spec` gives to a replica's worker."""
    return replace(spec, rank=0).for_worker(worker)


def _close_opened(opening: asyncio.Future[list[BroadcastGroup]]) -> None:
    """Of ends that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        for group in opening.result():
            group.close()
