"""Puts prompt groups on the stream `prompts`, never more than admission allows.

Consumes the seeded prompt order. Waits for room in the stream. Unblocked by groups that are
trained, abandoned or skipped. Stops when enough positions for the whole run are issued.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from services.learner.labels import label_of
from services.learner.ledger import Ledger
from shared import tracing
from shared.codec import encode_prompt_group
from shared.config import RunConfig
from shared.metrics.learner import LEARNER_REISSUED
from shared.metrics.queues import BACKPRESSURE_SECONDS
from shared.records import GroupUid, PromptGroup, Purpose
from shared.rl.staleness import admissible
from shared.stream import Stream, put_when_room
from shared.tasks.task import Problem
from shared.tokenizer import Tokenizer


class Feeder:
    """The only writer of `prompts`."""

    def __init__(
        self,
        *,
        config: RunConfig,
        ledger: Ledger,
        prompts: Stream,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._prompts = prompts
        self._problems = problems
        self._tokenizer = tokenizer
        self._total = config.run.num_steps * config.learner.groups_per_batch

    async def fill(self, *, policy_version: int) -> int:
        """Issue what admission allows; returns how many groups that was.

        Afterwards a batch's worth is out, or all that the run has still to train: a position that
        ended untrained is needed again, so no wait for a batch is in vain.
        """
        ledger = self._ledger
        room = admissible(
            ledger.num_outstanding,
            max_staleness=self._config.learner.max_staleness,
            groups_per_batch=self._config.learner.groups_per_batch,
        )
        needed = self._total - ledger.num_trained - ledger.num_outstanding
        count = max(0, min(room, needed))
        for _ in range(count):
            await self._put(ledger.issue_next(), policy_version)
        return count

    async def reissue(self, position: int, *, reason: str, policy_version: int) -> None:
        """Issue an outstanding position again."""
        LEARNER_REISSUED.labels(reason=reason).inc()
        await self._put(self._ledger.reissue(position), policy_version)

    async def _put(self, uid: GroupUid, policy_version: int) -> None:
        index = self._ledger.problem_index(uid)
        group = make_group(
            self._config,
            self._tokenizer,
            uid=uid,
            purpose=Purpose.TRAIN,
            problem=self._problems[index],
            problem_index=index,
            policy_version=policy_version,
        )
        await put_group(self._prompts, group)


async def put_group(prompts: Stream, group: PromptGroup) -> None:
    """Put a group on `prompts` under its label, when there is room; its trace begins here."""
    uid, purpose = str(group.uid), group.purpose.value
    with tracing.span("issue", began=group.issued_at, uid=uid, purpose=purpose) as span:
        await put_when_room(
            prompts,
            encode_prompt_group(replace(group, trace_context=span.context)),
            label=label_of(group),
            on_wait=BACKPRESSURE_SECONDS.labels(stream=prompts.name).inc,
        )


def make_group(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    uid: GroupUid,
    purpose: Purpose,
    problem: Problem,
    problem_index: int,
    policy_version: int,
) -> PromptGroup:
    """A prompt group for `problem`; training groups may be sampled by any version."""
    is_training = purpose is Purpose.TRAIN
    sampling = config.rollout if is_training else config.evaluation
    return PromptGroup(
        uid=uid,
        purpose=purpose,
        task=config.task.name,
        problem_index=problem_index,
        prompt_token_ids=tokenizer.encode_prompt(problem.prompt),
        answer=problem.answer,
        group_size=sampling.group_size,
        temperature=sampling.temperature,
        max_completion_tokens=config.rollout.max_completion_tokens,
        min_policy_version=0 if is_training else policy_version,
        issued_at=time.time(),
    )
