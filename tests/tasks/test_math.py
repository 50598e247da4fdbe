from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import ConfigError

pytest.importorskip("math_verify")

from shared.tasks.math import MathTask


def write(path: Path, problems: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in problems]
    path.write_text("\n".join(lines) + "\n\n", "utf8")
    return str(path)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so it is \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("therefore $0.5$", r"\frac{1}{2}"),
        (r"\boxed{1+x^2}", "x^2+1"),
        (r"\boxed{7}", r"\boxed{7}"),
        ("It is \\boxed{3}. Wait.\n\nIt is \\boxed{4}.", "$4$"),
    ],
)
def test_equal_mathematics_passes(completion: str, answer: str) -> None:
    verdict = MathTask("unread.jsonl").score(completion, answer=answer)
    assert (verdict.reward, verdict.is_pass) == (1.0, True)


@pytest.mark.parametrize(
    ("completion", "detail"),
    [(r"\boxed{41}", "wrong (41)"), ("no idea", "no answer found"), ("", "no answer found")],
)
def test_anything_else_fails_and_says_what_was_read(completion: str, detail: str) -> None:
    verdict = MathTask("unread.jsonl").score(completion, answer="42")
    assert (verdict.reward, verdict.is_pass, verdict.detail) == (0.0, False, detail)


def test_an_answer_that_is_not_mathematics_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not mathematics"):
        MathTask("unread.jsonl").score("3", answer="")


def test_a_share_of_one_file_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(f"{number}+1?", str(number + 1)) for number in range(50)])
    task = MathTask(path, held_out=0.2)
    train, held_out = task.problems("train"), task.problems("eval")
    assert (len(train), len(held_out), task.problems("hard")) == (40, 10, [])
    assert len({*train, *held_out}) == 50


def test_a_file_for_evaluation_leaves_the_other_whole(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("1+1?", "2"), ("1+2?", "3")])
    held_out = write(tmp_path / "eval.jsonl", [("2+2?", "4")])
    task = MathTask(train, eval_path=held_out)
    assert [problem.answer for problem in task.problems("train")] == ["2", "3"]
    assert [problem.answer for problem in task.problems("eval")] == ["4"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.params\.path = '/no/such.*cannot be read"):
        MathTask("/no/such/file").problems("train")


@pytest.mark.parametrize(
    "line", ["{", "[]", '"x"', '{"prompt": "a"}', '{"prompt": 1, "answer": 2}']
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line, "utf8")
    with pytest.raises(ConfigError, match="line 2: not a"):
        MathTask(str(path)).problems("train")


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a share"):
        MathTask("unread.jsonl", held_out=1.0)
