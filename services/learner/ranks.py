"""The learner's processes among each other: who there is, what rank 0 asks of the others.

Ranks meet in one process group, NCCL on GPUs and gloo on CPUs. Rank 0 alone is called from
outside; it sends each command to the others before it does its own part, and so all ranks enter
the same collectives in the same order. A command is a header of four numbers and a payload of
bytes; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import BroadcastOptions

from shared.config import Environment
from shared.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Bounds a collective inside a command, where every rank is known to be at work; and what rank 0
gives, for which the others wait."""

COMMAND_TIMEOUT = timedelta(hours=1)
"""Bounds the wait for rank 0's next command. A rank 0 that dies closes its sockets, and the wait
ends at once; where its host is lost nothing closes them, and this ends it."""

REASSURE_SECONDS = 60.0
"""A rank 0 that waits itself, for data perhaps, says so this often."""


class Opcode(IntEnum):
    """What rank 0 asks the other ranks to take part in."""

    TRAIN = 1
    SCORE = 2
    GATHER = 3
    SNAPSHOT = 4
    LOAD = 5
    CLOSE = 6
    WAIT = 7


class Command(NamedTuple):
    """Two numbers and bytes, whose meaning the opcode tells."""

    opcode: Opcode
    first: int = 0
    second: int = 0
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the learner's.

    Attributes:
        commands: a group on the host whatever the device, so that a rank that waits occupies no
            GPU; None for a single rank.
        writers: another one, for the threads that write a checkpoint while training goes on.
        giving: bounds what rank 0 gives to a rank that may stand still, and the taking of what a
            command announced.
    """

    rank: int
    world_size: int
    device: torch.device
    commands: Any
    writers: Any = None
    giving: timedelta = COLLECTIVE_TIMEOUT

    @classmethod
    def join(cls, environment: Environment) -> Ranks:
        """Wait for the other ranks, and make the process groups.

        Raises:
            ConfigError: several ranks without an address to meet at.
        """
        has_gpu = torch.cuda.is_available()
        device = torch.device("cuda", environment.local_rank) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            **_meeting_place(environment),
        )
        commands = writers = None
        if environment.world_size > 1:
            commands = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
            writers = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        return cls(environment.rank, environment.world_size, device, commands, writers)

    def send(self, command: Command) -> None:
        """Rank 0 to all others.

        Raises:
            RuntimeError: a rank is gone, or took nothing for as long as `giving`.
        """
        assert self.rank == 0, "only rank 0 gives commands"
        if self.commands is None:
            return
        size = len(command.payload)
        header = torch.tensor([command.opcode, command.first, command.second, size])
        self._broadcast(header)
        if size:
            self._broadcast(torch.frombuffer(bytearray(command.payload), dtype=torch.uint8))

    def receive(self) -> Command:
        """Wait for rank 0's next command.

        Raises:
            RuntimeError: rank 0 is gone, or sent nothing for COMMAND_TIMEOUT.
        """
        header = torch.zeros(4, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self.commands)
        opcode, first, second, size = header.tolist()
        payload = torch.zeros(size, dtype=torch.uint8)
        if size:
            self._broadcast(payload)
        return Command(Opcode(opcode), first, second, payload.numpy().tobytes())

    def tell_writers(self, payload: bytes) -> bytes:
        """What rank 0 tells the other ranks' writing threads; all of them call it together.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self.writers is None:
            return payload
        size = torch.tensor([len(payload)])
        dist.broadcast(size, src=0, group=self.writers)
        told = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0 and payload:
            told = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if len(told):
            dist.broadcast(told, src=0, group=self.writers)
        return told.numpy().tobytes()

    def gather_writers(self, payload: bytes) -> list[bytes]:
        """What the writing thread of each rank has to say, by rank; all of them call it together.

        Raises:
            RuntimeError: a rank is gone, or took longer than COLLECTIVE_TIMEOUT.
        """
        if self.writers is None:
            return [payload]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.writers)
        room = max(int(size) for size in sizes)
        said = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
        padded = bytearray(payload.ljust(room, b"\0"))
        dist.all_gather(said, torch.frombuffer(padded, dtype=torch.uint8), group=self.writers)
        return [each[: int(size)].numpy().tobytes() for each, size in zip(said, sizes, strict=True)]

    def hand_out(self, payloads: Sequence[bytes]) -> None:
        """Rank 0 to each other, in their order; who gets an empty one is not sent any.

        Raises:
            RuntimeError: a rank is gone, or took nothing for as long as `giving`.
        """
        assert self.rank == 0, "only rank 0 hands out"
        sent = []
        for rank, payload in enumerate(payloads, start=1):
            if payload:
                tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
                work = dist.isend(tensor, rank, group=self.commands)
                assert work is not None, "rank 0 is in the group"
                sent.append((tensor, work))
        for _, work in sent:
            work.wait(self.giving)

    def take(self, size: int) -> bytes:
        """What rank 0 hands out to this one.

        Raises:
            RuntimeError: rank 0 is gone, or gave nothing for as long as `giving`.
        """
        payload = torch.zeros(size, dtype=torch.uint8)
        if size:
            work = dist.irecv(payload, 0, group=self.commands)
            assert work is not None, "this rank is in the group"
            work.wait(self.giving)
        return payload.numpy().tobytes()

    def _broadcast(self, tensor: Tensor) -> None:
        """From rank 0, with a deadline of its own: the group's is that of the next command."""
        options = BroadcastOptions()
        options.rootRank, options.timeout = 0, self.giving
        self.commands.broadcast([tensor], options).wait()

    def sum_in_place(self, values: Tensor) -> None:
        """Replace values by their sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)


def reason_of(error: RuntimeError) -> str:
    """What torch raises in a line; of a lost connection also where the cause is told."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, dist.DistError) or "gloo" in reason:
        return f"another rank is gone or stands still: its log says why; then resume ({reason})"
    return reason


def _meeting_place(environment: Environment) -> dict[str, Any]:
    if environment.world_size == 1:
        return {"store": dist.HashStore()}  # type: ignore[attr-defined]
    if environment.master_port == 0:
        raise ConfigError(
            f"MASTER_PORT is not set: {environment.world_size} learner ranks need a port to meet at"
        )
    address = f"tcp://{environment.master_address}:{environment.master_port}"
    return {"init_method": address}
