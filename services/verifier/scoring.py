"""From a rollout group to a scored group, and the check that scoring works at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.verifier.sandbox import ScoringPool
from shared.errors import StartError
from shared.records import Completion, Outcome, RolloutGroup, Score, ScoredGroup
from shared.tasks.task import DemonstratedTask, Task
from shared.tokenizer import Tokenizer


async def score_group(
    pool: ScoringPool,
    tokenizer: Tokenizer,
    group: RolloutGroup,
    *,
    verifier: str,
    on_score: Callable[[], None] = lambda: None,
) -> ScoredGroup:
    """One score per completion; `verifier` names this replica, `on_score` is told of each."""

    async def judge(completion: Completion) -> Score:
        text = tokenizer.decode(completion.token_ids)
        score = await pool.score(text, answer=group.prompt.answer)
        on_score()
        return score

    if group.prompt.task == pool.task.name:
        scores = await asyncio.gather(*map(judge, group.completions))
    else:
        detail = f"{verifier} scores {pool.task.name!r}, not {group.prompt.task!r}"
        scores = [Score(Outcome.ERROR, 0.0, detail)] * len(group.completions)
    return ScoredGroup(
        rollout=group, scores=tuple(scores), verifier=verifier, scored_at=time.time()
    )


async def check_scorer(pool: ScoringPool, task: Task) -> None:
    """Have the scorer judge a solution that is known to be right, if its task has one.

    Raises:
        StartError: it does not pass; every completion of the run would be judged wrongly.
    """
    if not isinstance(task, DemonstratedTask):
        return
    problem, completion = next(task.demonstrations(seed=0))
    score = await pool.score(completion, answer=problem.answer)
    if score.outcome is not Outcome.PASS:
        raise StartError(
            f"task.name = {pool.task.name!r}: its own solution {completion!r} of"
            f" {problem.prompt!r} is scored {score.outcome.value} ({score.detail}); mend the task,"
            " or its limits in [verifier]"
        )
