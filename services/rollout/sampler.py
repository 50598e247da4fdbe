"""The rollout's stage: prompt groups in, rollout groups out.

Consumes `prompts`. Waits for: the replica to serve, a free place, an entry; and, before a group
is handed on, for the learner's word on every version it saw. Unblocked by publications. Stops when
the replica drains: what is in flight is finished first.

A group that the replica has not been able to sample for `reclaim_seconds`, though the learner has
announced a version, is left to others: this replica may never be refitted, and lives on. What it
was merely waiting for, with a version that serves, it keeps: a prompt, room, a long completion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import replace

from services.rollout.announced import Announced
from services.rollout.concurrency import Change, Concurrency
from services.rollout.draft import GroupDraft
from services.rollout.keeper import Keeper
from services.rollout.replica import Replica
from services.rollout.requests import Engine, Requests
from shared import tracing
from shared.activity import Phase, Report
from shared.codec import decode_prompt_group, encode_rollout_group
from shared.errors import EngineError, StreamError
from shared.metrics.rollout import (
    ROLLOUT_CONCURRENCY,
    ROLLOUT_CONCURRENCY_CHANGES,
    ROLLOUT_GIVEN_BACK,
    ROLLOUT_IDLE,
    ROLLOUT_MIXED,
    ROLLOUT_RESPONSE_TOKENS,
    ROLLOUT_SAMPLES,
    ROLLOUT_TOKENS,
)
from shared.records import Completion, PromptGroup, RolloutGroup
from shared.stage import RETRY_SECONDS, Stage, UnworkableError
from shared.stream import PROMPTS, Entry, Stream

logger = logging.getLogger(__name__)

_ADAPT_SECONDS = 1.0
_LAST_SAVE_SECONDS = 5.0


class Sampler:
    """Samples as many groups at a time as `concurrency` allows.

    Args:
        reclaim_seconds: a group that cannot be sampled here for so long is given back.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: Engine,
        replica: Replica,
        announced: Announced,
        prompts: Stream,
        rollouts: Stream,
        dead_letter: Stream,
        stop_token_ids: Sequence[int],
        concurrency: Concurrency,
        keeper: Keeper,
        max_attempts: int,
        reclaim_seconds: float,
        drain_seconds: float,
    ) -> None:
        self.groups_sampled = 0
        self.tokens_sampled = 0
        self.mixed_version_completions = 0
        self._name = name
        self._engine = engine
        self._replica = replica
        self._announced = announced
        self._stop_token_ids = tuple(stop_token_ids)
        self._concurrency = concurrency
        self._keeper = keeper
        self._max_attempts = max_attempts
        self._reclaim_seconds = reclaim_seconds
        self._drain_seconds = drain_seconds
        self._in_work: dict[str, tuple[int, float]] = {}
        self._stage = Stage(
            name=name,
            source=prompts,
            output=rollouts,
            dead_letter=dead_letter,
            work=self._complete,
            max_in_flight=concurrency.limit,
            max_attempts=max_attempts,
            on_done=keeper.drop,
            on_idle=ROLLOUT_IDLE.labels(cause="no_prompts").inc,
            verb="samples",
        )
        self._requests = Requests(
            engine,
            name=name,
            stop_token_ids=stop_token_ids,
            on_progress=self._stage.activity.progress,
        )

    @property
    def groups_in_flight(self) -> int:
        """Groups claimed and not finished."""
        return self._stage.num_in_flight

    def report(self) -> Report:
        """What this replica does or waits for."""
        return self._stage.activity.report(standing=self._standing)

    def chore(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Something that the replica does beside sampling; told if it takes long."""
        return self._stage.activity.chore(what)

    async def run(self) -> None:
        """Until the replica drains, or its engine dies, and nothing is in flight any more.

        What is not done in time then is saved and left to others.
        """
        beside = [
            asyncio.create_task(self._adapt(), name="concurrency"),
            asyncio.create_task(self._follow_learner(), name="announcements"),
        ]
        try:
            await self._stage.run(self._may_serve)
            await self._stage.finish(timeout_seconds=self._drain_seconds)
        finally:
            for task in beside:
                task.cancel()

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over groups that others died with or gave back, as far as there are places."""
        replica = self._replica
        may_sample = not (replica.is_outdated or self._is_stranded(replica.claims_from))
        if may_sample and not replica.is_ending:
            await self._stage.adopt(idle_seconds=idle_seconds, alive=alive)

    async def sample(
        self,
        prompt_token_ids: array[int],
        *,
        num_completions: int,
        temperature: float,
        max_completion_tokens: int,
    ) -> tuple[Completion, ...]:
        """Completions of one prompt at the same time, outside the streams.

        Raises:
            EngineError, ValueError: the first that failed; the others are cancelled.
        """
        return await self._requests.sample(
            prompt_token_ids,
            num_completions=num_completions,
            temperature=temperature,
            max_completion_tokens=max_completion_tokens,
        )

    async def _adapt(self) -> None:
        """Look at the engine's load at intervals, and let in as many groups as it carries."""
        ROLLOUT_CONCURRENCY.set(self._concurrency.limit)
        for change in Change:
            ROLLOUT_CONCURRENCY_CHANGES.labels(reason=change.value)
        while True:
            await asyncio.sleep(_ADAPT_SECONDS)
            moved = self._concurrency.update(
                self._engine.load,
                num_claimed=self._stage.num_in_flight,
                num_sampling=self._requests.num_groups,
            )
            if moved is not None:
                self._stage.max_in_flight = self._concurrency.limit
                ROLLOUT_CONCURRENCY.set(self._concurrency.limit)
                ROLLOUT_CONCURRENCY_CHANGES.labels(reason=moved.value).inc()
                logger.debug("%d groups at a time: %s", self._concurrency.limit, moved.value)

    async def _follow_learner(self) -> None:
        """Now and then hear what was announced, and leave to others what cannot be sampled here."""
        while True:
            await asyncio.sleep(self._reclaim_seconds / 3)
            try:
                await self._announced.look()
                if self._announced.version is not None and not self._replica.is_ending:
                    await self._give_back()
            except StreamError as error:
                logger.warning("cannot hear of the learner, or give back groups: %s", error)

    async def _give_back(self) -> None:
        stranded = {
            entry_id: version
            for entry_id, (version, since) in self._in_work.items()
            if self._is_stranded(version, since=since)
        }
        await self._announced.need(max(stranded.values(), default=0))
        if stranded or self._is_stranded(self._replica.claims_from):
            count = await self._stage.give_back(stranded, idle_seconds=self._reclaim_seconds)
            ROLLOUT_GIVEN_BACK.inc(count)
            if count:
                logger.warning("gave back %d groups: %s", count, self._standing)

    @property
    def _standing(self) -> str:
        """What the learner is to change."""
        version = self._replica.policy_version
        has = "no version yet" if version < 0 else f"version {version}"
        if self._announced.version not in (None, version):
            has += f" of {self._announced.version}"
        return f"{self._replica.state.value}, has {has}"

    def _is_stranded(self, min_policy_version: int, *, since: float = -math.inf) -> bool:
        """Whether nothing that needs this version could be sampled here for long, since then."""
        served_until = self._replica.served_until(min_policy_version)
        return time.monotonic() - max(since, served_until) >= self._reclaim_seconds

    async def _may_serve(self) -> bool:
        """Wait until this replica serves; False once it drains, or cannot serve any more."""
        started, was_idle = time.monotonic(), not self._stage.num_in_flight
        if not self._replica.serves(self._replica.claims_from):
            self._stage.activity.loop_enters(Phase.LEARNER)
        serves = await self._replica.wait_to_claim()
        if was_idle:
            ROLLOUT_IDLE.labels(cause="weight_sync").inc(time.monotonic() - started)
        return serves and self._engine.is_alive

    async def _complete(self, entry: Entry) -> bytes | None:
        """The rollout group of a prompt group; None if the replica drained first."""
        try:
            group = decode_prompt_group(entry.payload)
            self._in_work[entry.id] = (group.min_policy_version, time.monotonic())
            rollout = await self._sample_traced(entry, group)
        except (StreamError, ValueError) as error:
            raise UnworkableError(str(error)) from None
        finally:
            self._in_work.pop(entry.id, None)
        if rollout is None:
            return None
        self._count(rollout)
        return encode_rollout_group(rollout)

    async def _may_sample(self, entry_id: str, version: int) -> bool:
        """Wait until this replica serves `version` or a later one; False if it drains first."""
        note = f"it has not brought version {version}"
        with self._stage.activity.waiting(entry_id, Phase.LEARNER, note):
            return await self._replica.wait_to_serve(min_policy_version=version)

    async def _sample_traced(self, entry: Entry, group: PromptGroup) -> RolloutGroup | None:
        with tracing.stage(
            "sample",
            group.trace_context,
            stream=PROMPTS,
            since=group.issued_at,
            replica=self._name,
            deliveries=entry.deliveries,
        ) as span:
            rollout = await self._sample_confirmed(entry, group)
            if rollout is None:
                return None
            for number, completion in enumerate(rollout.completions):
                for run in completion.version_runs:
                    span.event(
                        "version run",
                        completion=number,
                        policy_version=run.policy_version,
                        num_tokens=run.num_tokens,
                    )
            return replace(rollout, prompt=replace(group, trace_context=span.context))

    async def _sample_confirmed(self, entry: Entry, group: PromptGroup) -> RolloutGroup | None:
        """Sample until every version seen was confirmed; None if that cannot be done here."""
        draft = GroupDraft(group, stop_token_ids=self._stop_token_ids)
        if await self._may_sample(entry.id, group.min_policy_version):
            await self._keeper.restore(entry, draft)
        progress = self._stage.activity.progress
        try:
            async with self._keeper.keeping(entry, draft, on_progress=progress):
                if await self._complete_draft(entry.id, draft):
                    return RolloutGroup(group, draft.completions(), self._name, time.time())
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SAVE_SECONDS):
                    await self._keeper.leave(entry, draft)
            raise
        await self._keeper.save(entry, draft)
        return None

    async def _complete_draft(self, entry_id: str, draft: GroupDraft) -> bool:
        """Sample what is missing, as often as need be; False if that cannot be done here."""
        group, failures = draft.group, 0
        while await self._may_sample(entry_id, group.min_policy_version):
            draft.cut(self._replica.confirmed_versions)
            if not self._keeper.is_on:
                draft.forget()
            try:
                await self._requests.finish(draft)
            except EngineError as error:
                ROLLOUT_SAMPLES.labels(outcome="error").inc(group.group_size)
                if not self._engine.is_alive:
                    return False
                logger.warning("group %s failed, sampling again: %s", group.uid, error)
                failures += 1
                if failures == self._max_attempts:
                    raise UnworkableError(f"failed {failures} times: {error}") from None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if await self._is_confirmed(draft):
                return True
            logger.warning("group %s saw rejected weights; sampling again", group.uid)
        return False

    async def _is_confirmed(self, draft: GroupDraft) -> bool:
        """Wait for the learner's word on what was sampled, and forget what it rejected."""
        versions = sorted(draft.versions_sampled_here())
        draft.cut([each for each in versions if await self._replica.wait_for_verdict(each)])
        return draft.is_complete

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
