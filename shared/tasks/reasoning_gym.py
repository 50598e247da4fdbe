"""Any data set of reasoning-gym: generated problems, judged by the library's own scorers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, overload

import reasoning_gym

from shared.tasks.task import Problem, Split, Verdict

INSTRUCTION = "Give your final answer between <answer> and </answer>."

_OPEN, _CLOSE = "<answer>", "</answer>"


class ReasoningGymTask:
    """The task.

    A problem is named by its split and index and generated anew where it is needed: a data set is
    a function of its seed, and its entries hold more than text can carry.

    Args:
        dataset: a name that reasoning-gym knows, as `countdown` or `knights_knaves`.
        size: problems to train on.
        eval_size: problems to evaluate on, generated from seeds that no other problem has.
        seed: of the problems to train on.
        threshold: least score that counts as a pass; the reward is the score itself.
        params: of the data set, as reasoning-gym calls them.
    """

    def __init__(
        self,
        dataset: str,
        size: int = 10_000,
        eval_size: int = 500,
        seed: int = 0,
        threshold: float = 1.0,
        **params: str | int | float | bool,
    ) -> None:
        self._threshold = threshold
        # Entry i of a data set is drawn from seed + i: neighbouring seeds would share entries.
        self._splits: dict[str, Any] = {
            "train": _create(dataset, seed=seed, size=size, **params),
            "eval": _create(dataset, seed=seed + size, size=eval_size, **params),
        }

    def problems(self, split: Split) -> Sequence[Problem]:
        """Generated one by one as they are asked for; `hard` is empty."""
        return [] if split == "hard" else _Problems(split, self._splits[split])

    def score(self, completion: str, *, answer: str) -> Verdict:
        """The library's score of the last answer between tags; 0 without one.

        Raises:
            ValueError: `answer` does not name one of this task's problems.
        """
        entry = self._entry(answer)
        stated = last_answer(completion)
        if stated is None:
            return Verdict(reward=0.0, is_pass=False, detail=f"no {_OPEN}...{_CLOSE}")
        split = answer.partition(" ")[0]
        reward = float(self._splits[split].score_answer(answer=stated, entry=entry))
        return Verdict(reward=reward, is_pass=reward >= self._threshold, detail=f"score {reward:g}")

    @lru_cache(maxsize=64)  # noqa: B019  a task lives as long as its process
    def _entry(self, answer: str) -> Any:
        split, _, index = answer.partition(" ")
        dataset = self._splits.get(split, [])
        if not index.isdecimal() or int(index) >= len(dataset):
            raise ValueError(f"answer {answer[:40]!r} names no problem; as 'train 17'")
        return dataset[int(index)]


class _Problems(Sequence[Problem]):
    """The problems of a split."""

    def __init__(self, split: Split, dataset: Any) -> None:
        self._split = split
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        question = self._dataset[place]["question"]
        return Problem(prompt=f"{question}\n{INSTRUCTION}", answer=f"{self._split} {place}")


def last_answer(completion: str) -> str | None:
    """What stands between the last pair of answer tags; None without one. Linear time."""
    end = completion.rfind(_CLOSE)
    start = completion.rfind(_OPEN, 0, max(end, 0))
    return completion[start + len(_OPEN) : end].strip() if start >= 0 else None


def _create(dataset: str, **params: str | int | float | bool) -> Any:
    try:
        return reasoning_gym.create_dataset(dataset, **params)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"dataset = {dataset!r}: reasoning-gym refuses it ({error})") from None
