"""The values that travel between services, as plain frozen dataclasses.

Protobuf stops at `shared.codec`; everything else sees these. Token ids and log-probs are
`array.array`, which is typed, compact and readable by torch without a copy per element.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from enum import Enum

MAX_GROUP_SIZE = 4096
"""Completions of a prompt: a number is all that asks for them, and each takes memory."""


class Purpose(Enum):
    """What a prompt group is sampled for."""

    TRAIN = "train"
    EVAL = "eval"


class Outcome(Enum):
    """How scoring a completion ended; kept apart from the reward it earned."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    TIMEOUT = "timeout"

    @property
    def is_verdict(self) -> bool:
        """True if the scorer reached a judgement about the completion."""
        return self in (Outcome.PASS, Outcome.FAIL)


@dataclass(frozen=True, slots=True)
class GroupUid:
    """Identity of one issue of one prompt.

    `(epoch, index)` names the place in the seeded prompt order; `attempt` counts re-issues of
    that place, so that the ledger can tell a duplicate from a replacement.
    """

    run_id: str
    epoch: int
    index: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.run_id}/{self.epoch}/{self.index}/{self.attempt}"


@dataclass(frozen=True, slots=True)
class VersionRun:
    """`num_tokens` consecutive tokens sampled by `policy_version`."""

    policy_version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt to be completed `group_size` times.

    Attributes:
        problem_index: the problem in its task's split, for diagnostics per problem.
        prompt_token_ids: array("I").
        answer: what the task's scorer needs to judge a completion; task-defined text.
        group_size: at most MAX_GROUP_SIZE.
        temperature: finite, above 0.
        min_policy_version: a replica samples the group only once it serves this version.
        issued_at: Unix seconds.
        trace_context: of the last span of its trace, as `shared.tracing` has it.
    """

    uid: GroupUid
    purpose: Purpose
    task: str
    problem_index: int
    prompt_token_ids: array[int]
    answer: str
    group_size: int
    temperature: float
    max_completion_tokens: int
    min_policy_version: int
    issued_at: float
    trace_context: bytes = b""


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request sampled.

    Attributes:
        token_ids: array("I"), at least one, end-of-sequence included if it was sampled.
        behaviour_logprobs: array("f"), one per token id: log-prob, in nats, under the distribution
            that was really sampled from, as the engine reported it.
        version_runs: in token order; their `num_tokens` sum to `len(token_ids)`.
        is_truncated: True if the completion stopped at its length limit.
    """

    token_ids: array[int]
    behaviour_logprobs: array[float]
    version_runs: tuple[VersionRun, ...]
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A prompt group with its completions; `sampled_at` is Unix seconds."""

    prompt: PromptGroup
    completions: tuple[Completion, ...]
    replica: str
    sampled_at: float


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's judgement of one completion.

    Attributes:
        reward: meaningful only if `outcome.is_verdict`; 0 otherwise.
        detail: one line for a person: what was wrong, or which error.
    """

    outcome: Outcome
    reward: float
    detail: str

    @property
    def is_usable(self) -> bool:
        """Whether the completion can be compared with others: judged, with a finite reward."""
        return self.outcome.is_verdict and math.isfinite(self.reward)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A rollout group with one score per completion; `scored_at` is Unix seconds."""

    rollout: RolloutGroup
    scores: tuple[Score, ...]
    verifier: str
    scored_at: float
