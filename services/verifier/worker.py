"""The verifier's stage: rollout groups in, scored groups out.

Consumes `rollouts`. Waits for: a free place, an entry, and room on `scored`. Unblocked by rollout
replicas, which bring entries, and by the learner, which makes room. Stops when told to: it claims
nothing more and finishes what is in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace

from services.verifier.sandbox import ScoringPool
from services.verifier.scoring import score_group
from shared import tracing
from shared.activity import Report
from shared.codec import decode_rollout_group, encode_scored_group
from shared.errors import StreamError
from shared.records import RolloutGroup, ScoredGroup
from shared.stage import Stage, UnworkableError
from shared.stream import ROLLOUTS, Entry, Stream
from shared.tokenizer import Tokenizer

STOP_SECONDS = 20.0
"""How long groups in flight may take after the order to stop."""


class Worker:
    """Scores up to `max_concurrent_groups` groups at a time."""

    def __init__(
        self,
        *,
        name: str,
        pool: ScoringPool,
        tokenizer: Tokenizer,
        rollouts: Stream,
        scored: Stream,
        dead_letter: Stream,
        max_concurrent_groups: int,
        max_attempts: int,
    ) -> None:
        self.groups_scored = 0
        self.completions_scored = 0
        self._name = name
        self._pool = pool
        self._tokenizer = tokenizer
        self._stage = Stage(
            name=name,
            source=rollouts,
            output=scored,
            dead_letter=dead_letter,
            work=self._score,
            max_in_flight=max_concurrent_groups,
            max_attempts=max_attempts,
            verb="scores",
        )

    def report(self) -> Report:
        """What this verifier does or waits for."""
        return self._stage.activity.report()

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; what is in flight is finished, or left to other verifiers."""

        async def goes_on() -> bool:
            return not stop.is_set()

        await self._stage.run(goes_on)
        await self._stage.finish(timeout_seconds=STOP_SECONDS)

    async def adopt(self, *, idle_seconds: float, alive: Collection[str]) -> None:
        """Take over groups of verifiers that died, as far as there are places."""
        await self._stage.adopt(idle_seconds=idle_seconds, alive=alive)

    async def _score(self, entry: Entry) -> bytes:
        try:
            group = decode_rollout_group(entry.payload)
            scored = await self._score_traced(group)
        except StreamError as error:
            raise UnworkableError(str(error)) from None
        self.groups_scored += 1
        self.completions_scored += len(scored.scores)
        return encode_scored_group(scored)

    async def _score_traced(self, group: RolloutGroup) -> ScoredGroup:
        with tracing.stage(
            "score",
            group.prompt.trace_context,
            stream=ROLLOUTS,
            since=group.sampled_at,
            verifier=self._name,
        ) as span:
            prompt = replace(group.prompt, trace_context=span.context)
            return await score_group(
                self._pool,
                self._tokenizer,
                replace(group, prompt=prompt),
                verifier=self._name,
                on_score=self._stage.activity.progress,
            )
