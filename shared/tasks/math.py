"""Problems with a mathematical answer, from a file of your own, judged by math-verify."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from shared.errors import ConfigError
from shared.tasks.holdout import hold_out
from shared.tasks.task import Problem, Split, Verdict

# math-verify warns at every call that its timeouts are off; the sandbox has its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathTask:
    r"""The task.

    Each line of the file is `{"prompt": "...", "answer": "..."}`: the prompt is given to the model
    as it stands, the answer is LaTeX or a number, with or without `$` or `\boxed`.

    Args:
        path: a JSON Lines file of problems to train on; only the learner reads it.
        eval_path: one of problems to evaluate on; without it a share of `path` is held out.
        held_out: that share.
    """

    def __init__(self, path: str, eval_path: str = "", held_out: float = 0.1) -> None:
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out = {held_out}: must be a share from 0 to below 1")
        self._path = path
        self._eval_path = eval_path
        self._held_out = held_out

    def problems(self, split: Split) -> Sequence[Problem]:
        """`hard` is empty.

        Raises:
            ConfigError: a file cannot be read, or a line of it is not a problem.
        """
        held_out, rest = self._cut
        return {"train": rest, "eval": held_out, "hard": []}[split]

    def score(self, completion: str, *, answer: str) -> Verdict:
        """Reward 1 if the answer that math-verify reads in `completion` equals `answer`, else 0.

        Raises:
            ValueError: `answer` is nothing that math-verify understands.
        """
        found = _parse(completion)
        is_pass = verify(_parse_answer(answer), found, timeout_seconds=None)
        stated = "".join(f" ({text:.80})" for text in found[-1:] if isinstance(text, str))
        detail = "right" if is_pass else f"wrong{stated}" if found else "no answer found"
        return Verdict(reward=float(is_pass), is_pass=is_pass, detail=detail)

    @cached_property
    def _cut(self) -> tuple[list[Problem], list[Problem]]:
        problems = list(_read("path", self._path))
        if self._eval_path:
            return list(_read("eval_path", self._eval_path)), problems
        return hold_out(problems, share=self._held_out)


def _parse(text: str) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _parse_answer(answer: str) -> list[Any]:
    """A reference as files state it: marked as mathematics, or bare LaTeX."""
    gold = _parse(f"${answer}$") if "$" not in answer and "\\boxed" not in answer else []
    gold = gold or _parse(answer)
    if not gold:
        raise ValueError(f"answer {answer[:80]!r} is not mathematics that math-verify understands")
    return gold


def _read(key: str, path: str) -> Iterator[Problem]:
    try:
        lines = Path(path).read_text("utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"task.params.{key} = {path!r}: cannot be read ({error}); give a JSON Lines file"
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _problem(line, place=f"task.params.{key} = {path!r}, line {number}")


def _problem(line: str, *, place: str) -> Problem:
    try:
        found = json.loads(line)
        prompt, answer = found["prompt"], found["answer"]
    except (ValueError, KeyError, TypeError):
        prompt = answer = None
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ConfigError(f'{place}: not a {{"prompt": "...", "answer": "..."}} of two texts')
    return Problem(prompt=prompt, answer=answer)
