"""Records for tests, with defaults for whatever a test does not care about."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from shared.records import (
    Completion,
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)


def make_prompt(
    index: int = 0,
    *,
    run_id: str = "run",
    epoch: int = 0,
    attempt: int = 0,
    purpose: Purpose = Purpose.TRAIN,
    group_size: int = 2,
    min_policy_version: int = 0,
) -> PromptGroup:
    return PromptGroup(
        uid=GroupUid(run_id, epoch, index, attempt),
        purpose=purpose,
        task="countdown",
        problem_index=index,
        prompt_token_ids=array("I", [1, 2, 3]),
        answer="1 2 3>6",
        group_size=group_size,
        temperature=1.0,
        max_completion_tokens=8,
        min_policy_version=min_policy_version,
        issued_at=time.time(),
    )


def make_completion(
    num_tokens: int = 3, *, runs: Sequence[tuple[int, int]] | None = None
) -> Completion:
    version_runs = runs if runs is not None else [(0, num_tokens)]
    return Completion(
        token_ids=array("I", range(4, 4 + num_tokens)),
        behaviour_logprobs=array("f", [-0.5] * num_tokens),
        version_runs=tuple(VersionRun(version, count) for version, count in version_runs),
        is_truncated=False,
    )


def make_scored(
    index: int = 0,
    *,
    run_id: str = "run",
    epoch: int = 0,
    attempt: int = 0,
    purpose: Purpose = Purpose.TRAIN,
    outcomes: Sequence[Outcome] = (Outcome.PASS, Outcome.FAIL),
    versions: Sequence[int] = (0, 0),
) -> ScoredGroup:
    prompt = make_prompt(
        index,
        run_id=run_id,
        epoch=epoch,
        attempt=attempt,
        purpose=purpose,
        group_size=len(outcomes),
    )
    completions = tuple(make_completion(runs=[(version, 3)]) for version in versions)
    return ScoredGroup(
        rollout=RolloutGroup(prompt, completions, "rollout-0", time.time()),
        scores=tuple(
            Score(outcome, 1.0 if outcome is Outcome.PASS else 0.0, "") for outcome in outcomes
        ),
        verifier="verifier-0",
        scored_at=time.time(),
    )
