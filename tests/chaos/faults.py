"""What goes wrong: one function a kind of fault, each done to a real process, link, disk or stream.

A fault returns who it struck, when it is over; a killed service is started again by the stack.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from random import Random

from services.cli.launch import LEARNER, REDIS, ROLLOUT, VERIFIER
from shared.dead_letters import decode_dead_letter
from shared.lease import Registry
from tests.chaos.disk import ROOM_BYTES, SmallDisk
from tests.chaos.poison import POISONS, Poison, brew
from tests.chaos.stack import POLL_SECONDS, START_SECONDS, ChaosError, Stack
from tests.end_to_end.real_run import children_of

FROZEN_SECONDS = 8.0
LINK_SECONDS = 10.0
AWAY_SECONDS = 15.0
DELAY_SECONDS = 0.2
LOSS_SECONDS = 3.0


@dataclass(slots=True)
class Scene:
    """What the faults act on, and what they leave to be accounted for.

    Attributes:
        poison: injected so far.
        letters: dead letters that were wiped.
        began: when the last fault struck, monotonic; `step` and `last_step_at` are of then.
    """

    stack: Stack
    random: Random
    disk: SmallDisk | None
    poison: list[Poison] = field(default_factory=list)
    letters: list[bytes] = field(default_factory=list)
    began: float = 0.0
    step: int = 0
    last_step_at: float = 0.0

    def begin(self) -> None:
        """A fault strikes now; steps that have ended do not count as recovery from it."""
        steps = self.stack.steps
        steps.look()
        self.step, self.last_step_at, self.began = steps.newest, steps.newest_at, time.monotonic()


Inject = Callable[[Scene], Awaitable[str]]


async def kill_learner(scene: Scene) -> str:
    return await _kill(scene, LEARNER)


async def kill_rollout(scene: Scene) -> str:
    return await _kill(scene, scene.random.choice(scene.stack.named(ROLLOUT)))


async def kill_engine(scene: Scene) -> str:
    """The vLLM engine beneath a replica's front end."""
    name, engines = await _with_children(scene, ROLLOUT)
    scene.stack.forgive(name)
    _signal(engines, signal.SIGKILL)
    scene.begin()
    return f"the engine of {name}"


async def kill_verifier(scene: Scene) -> str:
    return await _kill(scene, scene.random.choice(scene.stack.named(VERIFIER)))


async def kill_scorer(scene: Scene) -> str:
    """A scoring process of a verifier."""
    name, scorers = await _with_children(scene, VERIFIER)
    _signal(scorers[:1], signal.SIGKILL)
    scene.begin()
    return f"a scorer of {name}"


async def kill_redis(scene: Scene) -> str:
    return await _kill(scene, REDIS)


async def lose_redis(scene: Scene) -> str:
    """Killed, and back only after a while, as when a node is replaced."""
    await _until_running(scene, REDIS)
    scene.stack.kill(REDIS, away_seconds=AWAY_SECONDS)
    scene.begin()
    await asyncio.sleep(AWAY_SECONDS)
    return f"for {AWAY_SECONDS:.0f} s"


async def kill_everything(scene: Scene) -> str:
    """Every process of the run at once, as when its machine fails."""
    stack = scene.stack
    for name in [*stack.services, REDIS]:
        stack.kill(name)
    scene.begin()
    return "all services and Redis"


async def freeze_learner(scene: Scene) -> str:
    """SIGSTOP, for longer than the lease."""
    pids = [await _until_running(scene, LEARNER)]
    _signal(pids, signal.SIGSTOP)
    scene.begin()
    try:
        await asyncio.sleep(FROZEN_SECONDS)
    finally:
        _signal(pids, signal.SIGCONT)
    return f"for {FROZEN_SECONDS:.0f} s"


async def freeze_rollout(scene: Scene) -> str:
    """SIGSTOP front end and engine, for longer than the lease."""
    name, engines = await _with_children(scene, ROLLOUT)
    front = scene.stack.pid_of(name)
    pids = [*([] if front is None else [front]), *engines]
    _signal(pids, signal.SIGSTOP)
    scene.begin()
    try:
        await asyncio.sleep(FROZEN_SECONDS)
    finally:
        _signal(pids, signal.SIGCONT)
    return f"{name} for {FROZEN_SECONDS:.0f} s"


async def retire_service(scene: Scene) -> str:
    """SIGTERM a replica, as a cluster does that drains a node: it finishes what it has begun."""
    stack = scene.stack
    names = [name for role in (ROLLOUT, VERIFIER) for name in stack.named(role)]
    present = [name for name in names if stack.is_there(name)]
    name = scene.random.choice(present or names)
    await stack.retire(name)
    return name


async def cut_redis(scene: Scene) -> str:
    for link in scene.stack.links.redis.values():
        link.cut()
    return "all connections"


async def delay_redis(scene: Scene) -> str:
    async with AsyncExitStack() as links:
        for link in scene.stack.links.redis.values():
            await links.enter_async_context(link.delayed(DELAY_SECONDS))
        await asyncio.sleep(LINK_SECONDS)
    return f"by {DELAY_SECONDS * 1000:.0f} ms for {LINK_SECONDS:.0f} s"


async def stall_redis(scene: Scene) -> str:
    async with AsyncExitStack() as links:
        for link in scene.stack.links.redis.values():
            await links.enter_async_context(link.stalled())
        await asyncio.sleep(LINK_SECONDS)
    return f"for {LINK_SECONDS:.0f} s"


async def lose_redis_replies(scene: Scene) -> str:
    name = scene.random.choice(sorted(scene.stack.links.redis))
    async with scene.stack.links.redis[name].losing_replies():
        await asyncio.sleep(LOSS_SECONDS)
    return f"those to {name} for {LOSS_SECONDS:.0f} s"


async def cut_control(scene: Scene) -> str:
    """The learner's gRPC connections to the replicas."""
    for link in scene.stack.links.control.values():
        link.cut()
    return "all connections"


async def stall_control(scene: Scene) -> str:
    """The learner's gRPC connections to one replica."""
    name = scene.random.choice(sorted(scene.stack.links.control))
    async with scene.stack.links.control[name].stalled():
        await asyncio.sleep(LINK_SECONDS)
    return f"to {name} for {LINK_SECONDS:.0f} s"


async def fill_checkpoint_disk(scene: Scene) -> str:
    """Room for half a checkpoint, until the learner has said that it could not write one."""
    disk, stack = scene.disk, scene.stack
    assert disk is not None
    size = stack.log_size(LEARNER)
    with disk.full(room_bytes=ROOM_BYTES):
        await stack.until(
            lambda: "No space left on device" in stack.log_since(LEARNER, size),
            what="a checkpoint that could not be written",
            timeout_seconds=START_SECONDS,
        )
    return "during a checkpoint"


async def fill_disk(scene: Scene) -> str:
    """No room for a byte of anything, until the run has gone on for a while all the same."""
    disk, stack = scene.disk, scene.stack
    assert disk is not None
    deadline = time.monotonic() + START_SECONDS
    with disk.full():
        first = await _published_version(stack)
        wanted = first + 2 * stack.config.checkpoint.every_steps
        while await _published_version(stack) < wanted:
            if time.monotonic() > deadline:
                raise ChaosError(f"waited in vain for version {wanted} while the disk was full")
            await asyncio.sleep(POLL_SECONDS)
    return f"from version {first} to {wanted}"


async def poison_stream(scene: Scene) -> str:
    """Each poison in turn, on each stream."""
    streams = scene.stack.streams
    for stream in streams.sources:
        for kind in POISONS:
            poison = brew(kind, stream.name, scene.random)
            if not await stream.put(poison.payload):
                raise ChaosError(f"{stream.name} is full, and took no poison")
            scene.poison.append(poison)
    return f"{len(streams.sources) * len(POISONS)} entries"


async def wipe_redis(scene: Scene) -> str:
    streams = scene.stack.streams
    letters = await streams.dead_letter.peek()
    await streams.client.flushall()
    scene.letters += letters
    buried = {decode_dead_letter(letter).payload for letter in scene.letters}
    # Poison that nobody had found yet went with the rest.
    scene.poison = [each for each in scene.poison if each.payload in buried or not each.is_dead]
    return "all keys"


FAULTS: dict[str, Inject] = {
    "learner killed": kill_learner,
    "rollout killed": kill_rollout,
    "engine killed": kill_engine,
    "verifier killed": kill_verifier,
    "scorer killed": kill_scorer,
    "Redis killed": kill_redis,
    "Redis away": lose_redis,
    "everything killed": kill_everything,
    "learner frozen": freeze_learner,
    "rollout frozen": freeze_rollout,
    "replica retired": retire_service,
    "Redis links cut": cut_redis,
    "Redis links slow": delay_redis,
    "Redis links stalled": stall_redis,
    "Redis replies lost": lose_redis_replies,
    "gRPC links cut": cut_control,
    "gRPC link stalled": stall_control,
    "disk full": fill_disk,
    "disk full for a checkpoint": fill_checkpoint_disk,
    "poison": poison_stream,
    "Redis wiped": wipe_redis,
}


def deal(kinds: Sequence[str], random: Random) -> Iterator[str]:
    """Every kind once in random order, again and again."""
    while True:
        deck = list(kinds)
        random.shuffle(deck)
        yield from deck


async def _published_version(stack: Stack) -> int:
    """The learner's last, as Redis knows it: no file of the run is needed to see it."""
    registry = Registry(stack.streams.client, prefix=stack.streams.prefix)
    version = await registry.announced_version()
    return -1 if version is None else version


async def _kill(scene: Scene, name: str) -> str:
    await _until_running(scene, name)
    scene.stack.kill(name)
    scene.begin()
    return name


async def _until_running(scene: Scene, name: str) -> int:
    """The process of a service that may be being started again."""
    await scene.stack.until(
        lambda: scene.stack.pid_of(name) is not None,
        what=f"{name} to be there again",
        timeout_seconds=START_SECONDS,
    )
    pid = scene.stack.pid_of(name)
    assert pid is not None
    return pid


async def _with_children(scene: Scene, role: str) -> tuple[str, list[int]]:
    """A service of that role that has started its own processes, and those."""
    stack = scene.stack
    names = stack.named(role)
    scene.random.shuffle(names)

    def found() -> list[tuple[str, list[int]]]:
        listed = [(name, stack.pid_of(name)) for name in names if stack.is_there(name)]
        return [(name, children) for name, pid in listed if pid and (children := children_of(pid))]

    await stack.until(
        lambda: bool(found()),
        what=f"a {role} with processes of its own",
        timeout_seconds=START_SECONDS,
    )
    return found()[0]


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
