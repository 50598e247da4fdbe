"""The rollout's stage: prompt groups in, rollout groups out.

Consumes `prompts`. Waits for: the replica to serve, a free place, an entry; and, before a group
is handed on, for the learner's word on every version it saw. Unblocked by publications. Stops when
the replica drains: what is in flight is finished first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Collection, Sequence
from typing import Protocol

from services.rollout.replica import Replica
from shared.codec import decode_prompt_group, encode_rollout_group
from shared.errors import EngineError, StreamError
from shared.metrics import (
    ROLLOUT_IDLE,
    ROLLOUT_IN_FLIGHT,
    ROLLOUT_MIXED,
    ROLLOUT_RESPONSE_TOKENS,
    ROLLOUT_SAMPLES,
    ROLLOUT_TOKENS,
)
from shared.records import Completion, PromptGroup, RolloutGroup
from shared.stage import RETRY_SECONDS, Stage, UnworkableError
from shared.stream import Entry, Stream

logger = logging.getLogger(__name__)


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
    """Samples up to `max_concurrent_groups` groups at a time."""

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
        self._stop_token_ids = tuple(stop_token_ids)
        self._max_attempts = max_attempts
        self._num_requests = 0
        self._stage = Stage(
            name=name,
            source=prompts,
            output=rollouts,
            dead_letter=dead_letter,
            work=self._complete,
            max_in_flight=max_concurrent_groups,
            max_attempts=max_attempts,
            on_idle=ROLLOUT_IDLE.labels(cause="no_prompts").inc,
        )

    @property
    def groups_in_flight(self) -> int:
        """Groups claimed and not finished."""
        return self._stage.num_in_flight

    async def run(self) -> None:
        """Until the replica drains and nothing is in flight any more."""
        await self._stage.run(self._may_serve)
        await self._stage.finish()

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over groups of replicas that died, as far as there are places."""
        if not self._replica.is_ending:
            await self._stage.adopt(idle_seconds=idle_seconds, alive=alive)

    async def sample(
        self,
        prompt_token_ids: array[int],
        *,
        num_completions: int,
        temperature: float,
        max_completion_tokens: int,
    ) -> tuple[Completion, ...]:
        """Completions of one prompt at the same time.

        Raises:
            EngineError, ValueError: the first that failed; the others are cancelled.
        """
        try:
            with ROLLOUT_IN_FLIGHT.track_inprogress():
                async with asyncio.TaskGroup() as requests:
                    tasks = [
                        requests.create_task(
                            self._engine.generate(
                                prompt_token_ids,
                                temperature=temperature,
                                max_completion_tokens=max_completion_tokens,
                                stop_token_ids=self._stop_token_ids,
                                request_id=self._next_request_id(),
                            )
                        )
                        for _ in range(num_completions)
                    ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tuple(task.result() for task in tasks)

    async def _may_serve(self) -> bool:
        """Wait until this replica serves; False once it drains."""
        started, was_idle = time.monotonic(), not self._stage.num_in_flight
        serves = await self._replica.wait_to_serve(min_policy_version=0)
        if was_idle:
            ROLLOUT_IDLE.labels(cause="weight_sync").inc(time.monotonic() - started)
        return serves

    async def _complete(self, entry: Entry) -> bytes | None:
        """The rollout group of a prompt group; None if the replica drained first."""
        try:
            group = decode_prompt_group(entry.payload)
            rollout = await self._sample_confirmed(group)
        except (StreamError, ValueError) as error:
            raise UnworkableError(str(error)) from None
        if rollout is None:
            return None
        self._count(rollout)
        return encode_rollout_group(rollout)

    async def _sample_confirmed(self, group: PromptGroup) -> RolloutGroup | None:
        """Sample until every version seen was confirmed; None if the replica drains first."""
        failures = 0
        while await self._replica.wait_to_serve(min_policy_version=group.min_policy_version):
            try:
                completions = await self.sample(
                    group.prompt_token_ids,
                    num_completions=group.group_size,
                    temperature=group.temperature,
                    max_completion_tokens=group.max_completion_tokens,
                )
            except EngineError as error:
                ROLLOUT_SAMPLES.labels(outcome="error").inc(group.group_size)
                logger.warning("group %s failed, sampling again: %s", group.uid, error)
                failures += 1
                if failures == self._max_attempts:
                    raise UnworkableError(f"failed {failures} times: {error}") from None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            versions = {run.policy_version for each in completions for run in each.version_runs}
            verdicts = [await self._replica.wait_for_verdict(version) for version in versions]
            if all(verdicts):
                return RolloutGroup(group, completions, self._name, time.time())
            logger.warning("group %s saw rejected weights; sampling again", group.uid)
        return None

    def _next_request_id(self) -> str:
        self._num_requests += 1
        return f"{self._name}/{self._num_requests}"

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
