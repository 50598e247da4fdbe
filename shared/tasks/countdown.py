"""Countdown chains: combine small numbers, step by step, into a target.

The prompt `3 4 7>19=` is solved by `3*4=12,7+12=19$`: with n numbers exactly n - 1 steps, each
taking two operands out of the numbers and earlier results, each of which is used once; every
result is right and between 0 and 99, written without leading zeros; the last one is the target;
`$` ends the completion. Many chains solve one prompt, so coverage can be told from accuracy.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import combinations_with_replacement
from typing import NamedTuple

from shared.tasks.holdout import hold_out
from shared.tasks.task import Problem, Split, Verdict

LARGEST_RESULT = 99
MIN_NUMBERS, MAX_NUMBERS = 2, 5
HELD_OUT_SHARE = 0.1
HARD_SHARE = 0.03
"""A problem is hard if at most this share of random legal chains solves it."""

_NUMBER = "(?:0|[1-9][0-9]?)"
_STEP = re.compile(rf"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})")
_ANSWER = re.compile(rf"({_NUMBER}(?: {_NUMBER})*)>({_NUMBER})")


class Step(NamedTuple):
    """`left operator right = result`."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


class Countdown:
    """The task.

    Args:
        numbers: how many numbers a prompt has, 2 to 5.
    """

    alphabet = "0123456789+-*/=,> "
    end = "$"

    def __init__(self, numbers: int = 3) -> None:
        if numbers not in range(MIN_NUMBERS, MAX_NUMBERS + 1):
            raise ValueError(f"numbers = {numbers!r}: must be {MIN_NUMBERS} to {MAX_NUMBERS}")
        self._num_numbers = numbers

    def problems(self, split: Split) -> Sequence[Problem]:
        """Every pair of numbers and reachable target is in exactly one of `train` and `eval`."""
        held_out, rest = self._cut
        if split == "train":
            return rest
        if split == "eval":
            return held_out
        return [problem for problem in held_out if _chance(problem) <= HARD_SHARE]

    def score(self, completion: str, *, answer: str) -> Verdict:
        """Reward 1 for a right chain, else 0.

        Raises:
            ValueError: `answer` is not one of this task's.
        """
        numbers, target = parse_answer(answer)
        fault = find_fault(completion, numbers=numbers, target=target)
        return Verdict(reward=float(not fault), is_pass=not fault, detail=fault or "solved")

    def demonstrations(self, seed: int) -> Iterator[tuple[Problem, str]]:
        """Random legal chains over random numbers, those of held-out problems left out."""
        generator = random.Random(seed)
        held_out = set(self._cut[0])
        while True:
            numbers = sorted(generator.randint(1, 9) for _ in range(self._num_numbers))
            chain = random_chain(numbers, generator)
            problem = make_problem(numbers, target=chain[-1].result)
            if chain[-1].result > 0 and problem not in held_out:
                yield problem, ",".join(map(str, chain)) + self.end

    @cached_property
    def _cut(self) -> tuple[list[Problem], list[Problem]]:
        return hold_out(
            (
                make_problem(numbers, target=target)
                for numbers in combinations_with_replacement(range(1, 10), self._num_numbers)
                for target in outcome_chances(numbers)
                if target > 0
            ),
            share=HELD_OUT_SHARE,
        )


def make_problem(numbers: Sequence[int], *, target: int) -> Problem:
    """The problem with `numbers`, in the order given, and `target`."""
    answer = f"{' '.join(map(str, numbers))}>{target}"
    return Problem(prompt=f"{answer}=", answer=answer)


def parse_answer(answer: str) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a `Problem.answer`.

    Raises:
        ValueError: it is not of the form `3 4 7>19`.
    """
    match = _ANSWER.fullmatch(answer)
    if match is None:
        raise ValueError(f"answer {answer[:40]!r} is not of the form '3 4 7>19'")
    return tuple(int(number) for number in match[1].split(" ")), int(match[2])


def find_fault(completion: str, *, numbers: Sequence[int], target: int) -> str:
    """What is wrong with a completion, in one line; empty if it solves the problem."""
    steps = _parse_chain(completion, num_steps=len(numbers) - 1)
    if steps is None:
        return f"not {len(numbers) - 1} steps like 3*4=12 joined by commas and ended by $"
    available = Counter(numbers)
    for step in steps:
        for operand in (step.left, step.right):
            if not available[operand]:
                return f"{step}: {operand} is not available"
            available[operand] -= 1
        if step not in legal_steps(step.left, step.right):
            return f"{step}: wrong"
        available[step.result] += 1
    return "" if steps[-1].result == target else f"ends on {steps[-1].result}, not {target}"


def _parse_chain(completion: str, *, num_steps: int) -> list[Step] | None:
    """The steps of a well-formed completion.

    Linear in `num_steps` whatever the length of `completion`, and blind to digits beyond ASCII.
    """
    steps: list[Step] = []
    position = 0
    for index in range(num_steps):
        match = _STEP.match(completion, position)
        separator = "$" if index == num_steps - 1 else ","
        if match is None or not completion.startswith(separator, match.end()):
            return None
        steps.append(Step(int(match[1]), match[2], int(match[3]), int(match[4])))
        position = match.end() + 1
    return steps if position == len(completion) else None


def legal_steps(left: int, right: int) -> list[Step]:
    """Every right step of these operands, in this order, whose result is in range."""
    steps = [
        Step(left, "+", right, left + right),
        Step(left, "-", right, left - right),
        Step(left, "*", right, left * right),
    ]
    if right and left % right == 0:
        steps.append(Step(left, "/", right, left // right))
    return [step for step in steps if 0 <= step.result <= LARGEST_RESULT]


def next_steps(numbers: Sequence[int]) -> list[tuple[Step, tuple[int, ...]]]:
    """Each legal step from `numbers`, with the sorted numbers it leaves."""
    found: list[tuple[Step, tuple[int, ...]]] = []
    for i, left in enumerate(numbers):
        for j, right in enumerate(numbers):
            if i != j:
                rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
                for step in legal_steps(left, right):
                    found.append((step, tuple(sorted([*rest, step.result]))))
    return found


def random_chain(numbers: Sequence[int], generator: random.Random) -> list[Step]:
    """Steps chosen uniformly among the legal ones until one number is left."""
    chain: list[Step] = []
    while len(numbers) > 1:
        step, numbers = generator.choice(next_steps(numbers))
        chain.append(step)
    return chain


@cache
def outcome_chances(numbers: tuple[int, ...]) -> dict[int, float]:
    """For each result that chains over sorted `numbers` reach, the chance of a random chain."""
    if len(numbers) == 1:
        return {numbers[0]: 1.0}
    choices = next_steps(numbers)
    chances: Counter[int] = Counter()
    for _, rest in choices:
        for outcome, chance in outcome_chances(rest).items():
            chances[outcome] += chance / len(choices)  # type: ignore[assignment]
    return dict(sorted(chances.items()))


def _chance(problem: Problem) -> float:
    numbers, target = parse_answer(problem.answer)
    return outcome_chances(tuple(sorted(numbers)))[target]
