"""What a task must be able to do, and the values it deals in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Split = Literal["train", "eval", "hard"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and the text its task's scorer needs to judge a completion of it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer found.

    Attributes:
        reward: what the learner maximises.
        is_pass: True if the completion solves the problem; pass@k counts it.
        detail: one line for a person.
    """

    reward: float
    is_pass: bool
    detail: str


class Task(Protocol):
    """A source of problems with a scorer.

    Constructed in the learner, which asks for problems, and in every scoring process, which only
    scores: put what is expensive into `problems`.
    """

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of `split`, the same ones in the same order every time.

        No problem of `eval` or `hard` is in `train`. `hard` is the part of `eval` that guessing
        hardly solves; it is empty where a task knows no such part.
        """

    def score(self, completion: str, *, answer: str) -> Verdict:
        """Judge a completion of the problem whose `Problem.answer` is `answer`.

        May be slow, raise or crash on hostile input: it runs in a sandbox.
        """


@runtime_checkable
class DemonstratedTask(Task, Protocol):
    """A task that can show solutions, one character a token, to warm up a small model."""

    alphabet: str
    """Every character of a prompt or completion, `end` not included."""

    end: str
    """The character that ends a completion; it is the model's end of sequence."""

    def demonstrations(self, seed: int) -> Iterator[tuple[Problem, str]]:
        """Endless pairs of a problem outside `eval` and a completion that solves it."""
