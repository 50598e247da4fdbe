"""What a run looks like from outside: leases, health, status calls and the learner's rows."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import learner_pb2, learner_pb2_grpc, rollout_pb2, rollout_pb2_grpc, verifier_pb2_grpc
from protos import verifier_pb2 as verifier_pb
from services.cli.measurements import Row, RowReader
from shared.config import Environment
from shared.errors import PeerError, StreamError
from shared.lease import Member, Registry
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from shared.roles import OPERATOR
from shared.rpc import PROGRESS, call, open_channel
from shared.tls import Credentials

_CALL_SECONDS = 2.0
_STATE_PREFIX = "REPLICA_STATE_"


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A service that holds a lease.

    Attributes:
        answers: its gRPC server does.
        state: one word, or what it has done so far.
        groups: sampled, or scored.
        activity: what it says that it does or waits for; empty from the learner.
        progress_age_seconds: without progress in what it has to do.
        is_stalled: it makes no progress in work of its own.
    """

    member: Member
    answers: bool
    state: str
    policy_version: int | None = None
    groups: int = 0
    groups_in_flight: int = 0
    mixed_version_completions: int = 0
    activity: str = ""
    progress_age_seconds: float = 0.0
    is_stalled: bool = False


@dataclass(frozen=True, slots=True)
class LearnerView:
    """The learner's own account.

    Attributes:
        activity: what it does, or whom it waits for.
        is_stalled: no step ended for `watchdog.stall_seconds`.
    """

    step: int
    num_steps: int
    policy_version: int
    activity: str
    is_paused: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    queue_depths: Mapping[str, int] = field(default_factory=dict)
    is_stalled: bool = False
    seconds_without_step: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """One look at the run.

    Attributes:
        trouble: why something could not be seen; empty if all could.
    """

    learner: LearnerView | None
    services: Sequence[ServiceView]
    rows: Sequence[Row]
    trouble: str = ""


def own_credentials() -> Credentials | None:
    """Those of a person who looks: an operator's where ISENTROPE_TLS has them, else those of the
    service in whose pod the person is.

    Raises:
        StartError: they do not hold together.
    """
    folder = Environment.read().tls_folder
    return None if folder is None else Credentials.find(folder, OPERATOR)


class Observer:
    """Looks at one run again and again; close it.

    Args:
        tls: what services are shown who ask for a certificate.
    """

    def __init__(
        self, *, redis_url: str, run_id: str, metrics: Path, tls: Credentials | None = None
    ) -> None:
        self._client = connect(redis_url, timeout_seconds=_CALL_SECONDS, retries=0)
        self._registry = Registry(self._client, prefix=key_prefix(run_id))
        self._rows = RowReader(metrics)
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def look(self) -> View:
        """One look; what does not answer in time is missing, never an error."""
        rows = self._rows.read()
        try:
            members = await self._registry.members()
        except StreamError as error:
            return View(None, (), rows, trouble=f"Redis does not answer: {error}")
        await self._forget_channels({member.address for member in members})
        learners = [member for member in members if member.role == "learner"]
        learner, services = await asyncio.gather(
            self._look_at_learner(learners), asyncio.gather(*map(self._look_at, members))
        )
        return View(learner, services, rows)

    async def close(self) -> None:
        """Give the connections back."""
        await self._forget_channels(set())
        await self._client.aclose()

    async def _look_at(self, member: Member) -> ServiceView:
        try:
            match member.role:
                case "rollout":
                    return await self._look_at_rollout(member)
                case "verifier":
                    return await self._look_at_verifier(member)
                case _:
                    return await self._check_health(member)
        except PeerError:
            return ServiceView(member, answers=False, state="silent")

    async def _look_at_rollout(self, member: Member) -> ServiceView:
        stub = rollout_pb2_grpc.RolloutStub(self._channel(member))
        status, is_stalled = await asyncio.gather(
            _ask(stub.GetStatus, rollout_pb2.GetRolloutStatusRequest(), member),
            self._is_stalled(member),
        )
        state = rollout_pb2.ReplicaState.Name(status.state).removeprefix(_STATE_PREFIX).lower()
        return ServiceView(
            member,
            answers=True,
            state=state,
            policy_version=status.policy_version,
            groups=status.groups_sampled,
            groups_in_flight=status.groups_in_flight,
            mixed_version_completions=status.mixed_version_completions,
            activity=status.activity,
            progress_age_seconds=status.progress_age_seconds,
            is_stalled=is_stalled,
        )

    async def _look_at_verifier(self, member: Member) -> ServiceView:
        stub = verifier_pb2_grpc.VerifierStub(self._channel(member))
        status, is_stalled = await asyncio.gather(
            _ask(stub.GetStatus, verifier_pb.GetVerifierStatusRequest(), member),
            self._is_stalled(member),
        )
        return ServiceView(
            member,
            answers=True,
            state="scoring",
            groups=status.groups_scored,
            activity=status.activity,
            progress_age_seconds=status.progress_age_seconds,
            is_stalled=is_stalled,
        )

    async def _check_health(self, member: Member) -> ServiceView:
        is_stalled = await self._is_stalled(member)
        return ServiceView(member, answers=True, state="up", is_stalled=is_stalled)

    async def _is_stalled(self, member: Member) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channel(member))
        answer = await _ask(stub.Check, health_pb2.HealthCheckRequest(service=PROGRESS), member)
        return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _look_at_learner(self, learners: Sequence[Member]) -> LearnerView | None:
        if not learners:
            return None
        stub = learner_pb2_grpc.LearnerStub(self._channel(learners[0]))
        try:
            status = await _ask(stub.GetStatus, learner_pb2.GetLearnerStatusRequest(), learners[0])
        except PeerError:
            return None
        return LearnerView(
            step=status.step,
            num_steps=status.num_steps,
            policy_version=status.policy_version,
            activity=status.activity,
            is_paused=status.is_paused,
            metrics=dict(status.metrics),
            queue_depths=dict(status.queue_depths),
            is_stalled=status.is_stalled,
            seconds_without_step=status.seconds_without_step,
        )

    def _channel(self, member: Member) -> grpc.aio.Channel:
        address = member.address
        if address not in self._channels:
            self._channels[address] = open_channel(address, role=member.role, tls=self._tls)
        return self._channels[address]

    async def _forget_channels(self, wanted: Collection[str]) -> None:
        for address in set(self._channels) - set(wanted):
            await self._channels.pop(address).close()


async def _ask(method: Any, request: Any, member: Member) -> Any:
    return await call(method, request, peer=member.name, timeout_seconds=_CALL_SECONDS)
