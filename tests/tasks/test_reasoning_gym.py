from __future__ import annotations

import pytest

pytest.importorskip("reasoning_gym")

from shared.tasks.reasoning_gym import INSTRUCTION, ReasoningGymTask, last_answer


@pytest.fixture(scope="module")
def task() -> ReasoningGymTask:
    return ReasoningGymTask("basic_arithmetic", size=20, eval_size=10, seed=7)


def known_answer(task: ReasoningGymTask, answer: str) -> str:
    return str(task._entry(answer)["answer"])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_librarys_own_answers_pass(task: ReasoningGymTask, split: str) -> None:
    for problem in task.problems(split):  # type: ignore[arg-type]
        completion = f"hm, <answer>{known_answer(task, problem.answer)}</answer>"
        assert task.score(completion, answer=problem.answer).is_pass


def test_wrong_and_missing_answers_fail(task: ReasoningGymTask) -> None:
    wrong = task.score("<answer>no number</answer>", answer="train 0")
    missing = task.score(known_answer(task, "train 0"), answer="train 0")
    assert not wrong.is_pass
    assert (missing.reward, missing.detail) == (0.0, "no <answer>...</answer>")


def test_the_threshold_decides_what_passes() -> None:
    strict = ReasoningGymTask("countdown", size=3)
    generous = ReasoningGymTask("countdown", size=3, threshold=0.01)
    completion = "<answer>1</answer>"
    assert 0 < strict.score(completion, answer="train 0").reward < 1
    assert not strict.score(completion, answer="train 0").is_pass
    assert generous.score(completion, answer="train 0").is_pass


def test_no_problem_of_one_split_is_in_the_other(task: ReasoningGymTask) -> None:
    train = {problem.prompt for problem in task.problems("train")}
    held_out = {problem.prompt for problem in task.problems("eval")}
    assert len(train) == 20
    assert not train & held_out
    assert len(task.problems("hard")) == 0


def test_problems_are_a_sequence_and_the_same_every_time(task: ReasoningGymTask) -> None:
    problems = task.problems("train")
    again = ReasoningGymTask("basic_arithmetic", size=20, eval_size=10, seed=7).problems("train")
    assert list(problems) == list(again)
    assert problems[-1] == problems[19]
    assert problems[2:4] == [problems[2], problems[3]]
    assert problems[0].prompt.endswith(INSTRUCTION)
    with pytest.raises(IndexError):
        problems[20]


@pytest.mark.parametrize("answer", ["", "train", "train 20", "train -1", "hard 0", "train x", "42"])
def test_an_answer_that_names_no_problem_is_an_error(task: ReasoningGymTask, answer: str) -> None:
    with pytest.raises(ValueError, match="names no problem"):
        task.score("<answer>1</answer>", answer=answer)


@pytest.mark.parametrize(
    ("dataset", "params"),
    [("nope", {}), ("countdown", {"zz": 1}), ("countdown", {"min_value": -9})],
)
def test_what_the_library_refuses_is_refused(dataset: str, params: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="reasoning-gym refuses it"):
        ReasoningGymTask(dataset, **params)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer>", "1"),
        ("<answer>1</answer> or <answer> 2 </answer> done", "2"),
        ("<answer>1</answer> or <answer>2", "1"),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
        ("1</answer>", None),
        ("<answer>1", None),
        ("", None),
    ],
)
def test_the_last_pair_of_tags_is_the_answer(completion: str, answer: str | None) -> None:
    assert last_answer(completion) == answer


@pytest.mark.timeout(120)
def test_a_megabyte_of_tags_takes_no_time() -> None:
    for text in ("<answer>" * 125_000, "</answer>" * 125_000, "<answer></answer>" * 60_000):
        for _ in range(100):
            last_answer(text)
