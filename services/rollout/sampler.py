"""The rollout loop: prompt groups in, rollout groups out.

Consumes `prompts`. Waits for: the replica to serve, a free place, an entry; and, before a group
is handed on, for the learner's word on every version it saw. Unblocked by publications. Stops when
the replica drains: what is in flight is finished first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from services.rollout.replica import Replica
from shared.codec import decode_prompt_group, encode_rollout_group
from shared.errors import EngineError, StreamError
from shared.metrics import (
    BACKPRESSURE_SECONDS,
    DEAD_LETTERED,
    REDELIVERED,
    ROLLOUT_IDLE,
    ROLLOUT_IN_FLIGHT,
    ROLLOUT_MIXED,
    ROLLOUT_RESPONSE_TOKENS,
    ROLLOUT_SAMPLES,
    ROLLOUT_TOKENS,
)
from shared.records import Completion, PromptGroup, RolloutGroup
from shared.stream import Entry, Stream, finish_when_room

logger = logging.getLogger(__name__)

CLAIM_WAIT_SECONDS = 1.0
RETRY_SECONDS = 1.0


class Engine(Protocol):
    """What the sampler needs of vLLM; `services.rollout.engine.VllmEngine` is it."""

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Completion:
        """Sample one completion."""


class Sampler:
    """Keeps up to `max_concurrent_groups` groups in flight."""

    def __init__(
        self,
        *,
        name: str,
        engine: Engine,
        replica: Replica,
        prompts: Stream,
        rollouts: Stream,
        dead_letter: Stream,
        stop_token_ids: Sequence[int],
        max_concurrent_groups: int,
        max_attempts: int,
    ) -> None:
        self.groups_sampled = 0
        self.tokens_sampled = 0
        self.mixed_version_completions = 0
        self._name = name
        self._engine = engine
        self._replica = replica
        self._prompts = prompts
        self._rollouts = rollouts
        self._dead_letter = dead_letter
        self._stop_token_ids = tuple(stop_token_ids)
        self._max_concurrent_groups = max_concurrent_groups
        self._max_attempts = max_attempts
        self._in_flight: set[asyncio.Task[None]] = set()
        self._requests = 0

    @property
    def groups_in_flight(self) -> int:
        """Groups claimed and not finished."""
        return len(self._in_flight)

    async def run(self) -> None:
        """The loop; first what this name left pending when it last died."""
        backlog: list[Entry] | None = None
        while await self._may_serve():
            try:
                if backlog is None:
                    backlog = await self._prompts.pending(self._name)
                await self._take(backlog)
            except StreamError as error:
                logger.warning("prompts are out of reach, trying again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
        if self._in_flight:
            await asyncio.gather(*self._in_flight)

    async def _may_serve(self) -> bool:
        """Wait until this replica serves; False once it drains."""
        started, was_idle = time.monotonic(), not self._in_flight
        serves = await self._replica.wait_to_serve(min_policy_version=0)
        if was_idle:
            ROLLOUT_IDLE.labels(cause="weight_sync").inc(time.monotonic() - started)
        return serves

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over groups of replicas that died, as far as there are places."""
        if self._replica.is_ending:
            return
        free = self._max_concurrent_groups - len(self._in_flight)
        if free > 0:
            entries = await self._prompts.reclaim(
                self._name, idle_seconds=idle_seconds, alive=alive, count=free
            )
            REDELIVERED.labels(stream=self._prompts.name).inc(len(entries))
            for entry in entries:
                self._start(entry)

    async def _take(self, backlog: list[Entry]) -> None:
        """Start what there are places for; without a place, wait for one."""
        free = self._max_concurrent_groups - len(self._in_flight)
        if free <= 0:
            await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            return
        if backlog:
            entries, backlog[:] = backlog[:free], backlog[free:]
        else:
            entries = await self._claim(free)
        for entry in entries:
            self._start(entry)

    async def _claim(self, count: int) -> list[Entry]:
        started, was_idle = time.monotonic(), not self._in_flight
        entries = await self._prompts.claim(
            self._name, count=count, wait_seconds=CLAIM_WAIT_SECONDS
        )
        if was_idle:
            ROLLOUT_IDLE.labels(cause="no_prompts").inc(time.monotonic() - started)
        return entries

    def _start(self, entry: Entry) -> None:
        task = asyncio.create_task(self._complete(entry), name=f"group {entry.id}")
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _complete(self, entry: Entry) -> None:
        """One group from claim to finish; nothing it can raise may end the loop."""
        try:
            group = decode_prompt_group(entry.payload)
        except StreamError as error:
            await self._give_up(entry, str(error))
            return
        if entry.deliveries > self._max_attempts:
            await self._give_up(entry, f"{group.uid} was delivered {entry.deliveries} times")
            return
        try:
            rollout = await self._sample_confirmed(group)
        except (ValueError, EngineError) as error:
            await self._give_up(entry, f"{group.uid}: {error}")
            return
        if rollout is not None:
            await self._hand_on(entry, self._rollouts, encode_rollout_group(rollout))
            self._count(rollout)

    async def _sample_confirmed(self, group: PromptGroup) -> RolloutGroup | None:
        """Sample until every version seen was confirmed; None if the replica drains first."""
        failures = 0
        while await self._replica.wait_to_serve(min_policy_version=group.min_policy_version):
            try:
                completions = await self._sample(group)
            except EngineError as error:
                ROLLOUT_SAMPLES.labels(outcome="error").inc(group.group_size)
                logger.warning("group %s failed, sampling again: %s", group.uid, error)
                failures += 1
                if failures == self._max_attempts:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
                continue
            versions = {run.policy_version for each in completions for run in each.version_runs}
            verdicts = [await self._replica.wait_for_verdict(version) for version in versions]
            if all(verdicts):
                return RolloutGroup(group, completions, self._name, time.time())
            logger.warning("group %s saw rejected weights; sampling again", group.uid)
        return None

    async def _sample(self, group: PromptGroup) -> tuple[Completion, ...]:
        """All completions, or the first error with the other requests cancelled."""
        try:
            with ROLLOUT_IN_FLIGHT.track_inprogress():
                async with asyncio.TaskGroup() as requests:
                    tasks = [
                        requests.create_task(self._sample_one(group))
                        for _ in range(group.group_size)
                    ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tuple(task.result() for task in tasks)

    async def _sample_one(self, group: PromptGroup) -> Completion:
        self._requests += 1
        return await self._engine.generate(
            group.prompt_token_ids,
            temperature=group.temperature,
            max_completion_tokens=group.max_completion_tokens,
            stop_token_ids=self._stop_token_ids,
            request_id=f"{group.uid}/{self._requests}",
        )

    async def _give_up(self, entry: Entry, error: str) -> None:
        logger.error("dead letter from prompts: %s", error)
        DEAD_LETTERED.labels(stream=self._prompts.name).inc()
        await self._hand_on(entry, self._dead_letter, entry.payload)

    async def _hand_on(self, entry: Entry, output: Stream, payload: bytes) -> None:
        """Finish the entry, however long Redis or the room for it takes."""
        waited = BACKPRESSURE_SECONDS.labels(stream=output.name).inc
        while True:
            try:
                await finish_when_room(
                    self._prompts, entry, output=output, payload=payload, on_wait=waited
                )
                return
            except StreamError as error:
                logger.warning("%s is out of reach, trying again: %s", output.name, error)
                await asyncio.sleep(RETRY_SECONDS)

    def _count(self, rollout: RolloutGroup) -> None:
        self.groups_sampled += 1
        for completion in rollout.completions:
            num_tokens = len(completion.token_ids)
            self.tokens_sampled += num_tokens
            ROLLOUT_TOKENS.inc(num_tokens)
            ROLLOUT_RESPONSE_TOKENS.observe(num_tokens)
            outcome = "truncated" if completion.is_truncated else "finished"
            ROLLOUT_SAMPLES.labels(outcome=outcome).inc()
            if len(completion.version_runs) > 1:
                self.mixed_version_completions += 1
                ROLLOUT_MIXED.inc()
