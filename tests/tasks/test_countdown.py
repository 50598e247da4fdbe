from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import islice, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tasks.countdown import Countdown, outcome_chances, parse_answer, random_chain

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else -1,
}
FIRST_HELD_OUT = ["5 7 9>98=", "1 2 6>4=", "4 4 9>10="]
NASTY = "0123456789+-*/=,>$ .x\n٣²−\x00"  # noqa: RUF001


@cache
def every_solution(numbers: tuple[int, ...], target: int) -> frozenset[str]:
    """The oracle: all texts that solve a problem, by trying everything the rules allow."""
    return frozenset(",".join(chain) + "$" for chain in every_chain(numbers, target))


def every_chain(numbers: tuple[int, ...], target: int) -> list[tuple[str, ...]]:
    if len(numbers) == 1:
        return [()] if numbers[0] == target else []
    chains = set()
    for order, symbol in product(set(permutations(numbers)), OPERATIONS):
        left, right, rest = order[0], order[1], order[2:]
        result = OPERATIONS[symbol](left, right)
        if 0 <= result <= 99:
            for tail in every_chain(tuple(sorted((*rest, result))), target):
                chains.add((f"{left}{symbol}{right}={result}", *tail))
    return sorted(chains)


def passes(completion: str, answer: str) -> bool:
    return Countdown().score(completion, answer=answer).is_pass


PROBLEMS = [((3, 4, 7), 19), ((2, 2, 4), 4), ((5, 5, 5), 5), ((1, 8, 9), 99), ((4, 9), 36)]


@pytest.mark.parametrize(("numbers", "target"), [*PROBLEMS, ((1, 2, 3, 4), 24)])
def test_everything_the_oracle_finds_passes(numbers: tuple[int, ...], target: int) -> None:
    solutions = every_solution(numbers, target)
    answer = f"{' '.join(map(str, numbers))}>{target}"
    assert [text for text in sorted(solutions) if not passes(text, answer)] == []


@given(problem=st.sampled_from(PROBLEMS), text=st.text(NASTY, max_size=20))
def test_arbitrary_text_passes_only_if_the_oracle_has_it(
    problem: tuple[tuple[int, ...], int], text: str
) -> None:
    numbers, target = problem
    answer = f"{' '.join(map(str, numbers))}>{target}"
    assert passes(text, answer) == (text in every_solution(numbers, target))


@given(data=st.data())
@settings(max_examples=500)
def test_a_damaged_solution_passes_only_if_the_oracle_has_it(data: st.DataObject) -> None:
    numbers, target = data.draw(st.sampled_from([p for p in PROBLEMS if every_solution(*p)]))
    text = data.draw(st.sampled_from(sorted(every_solution(numbers, target))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 2))
        text = text[:place] + data.draw(st.text(NASTY, max_size=2)) + text[place + length :]
    answer = f"{' '.join(map(str, numbers))}>{target}"
    assert passes(text, answer) == (text in every_solution(numbers, target))


@given(data=st.data())
def test_well_formed_chains_pass_only_if_the_oracle_has_them(data: st.DataObject) -> None:
    numbers, target = data.draw(st.sampled_from(PROBLEMS[:4]))
    small = st.integers(0, 12)
    step = st.builds(
        lambda a, o, b, r: f"{a}{o}{b}={OPERATIONS[o](a, b) if r is None else r}",
        small,
        st.sampled_from("+-*/"),
        small,
        st.none() | small,
    )
    text = ",".join(data.draw(st.lists(step, min_size=1, max_size=3))) + "$"
    answer = f"{' '.join(map(str, numbers))}>{target}"
    assert passes(text, answer) == (text in every_solution(numbers, target))


@pytest.mark.parametrize(
    ("completion", "detail"),
    [
        ("3*4=12,7+12=19", "not 2 steps"),  # cut off before its end
        ("3*4=12,7+12=19$$", "not 2 steps"),
        ("3*4=12,7+12=19$3", "not 2 steps"),
        (" 3*4=12,7+12=19$", "not 2 steps"),
        ("3*4=12,7+12=19\n$", "not 2 steps"),
        ("3*4=12,7+12=019$", "not 2 steps"),
        ("03*4=12,7+12=19$", "not 2 steps"),
        ("3*4=12,7+12=19,19/1=19$", "not 2 steps"),
        ("7+12=19$", "not 2 steps"),
        ("", "not 2 steps"),
        ("$", "not 2 steps"),
        ("٣*4=12,7+12=19$", "not 2 steps"),
        ("3*4=1٢,7+12=19$", "not 2 steps"),
        ("3*4=-12,7+12=19$", "not 2 steps"),
        ("3-7=-4,4--4=8$", "not 2 steps"),
        ("3*4=12,7*12=84$", "ends on 84, not 19"),
        ("3*4=13,7+12=19$", "3*4=13: wrong"),
        ("3*4=12,7+12=18$", "7+12=18: wrong"),
        ("7/3=2,2+4=6$", "7/3=2: wrong"),
        ("8//0=0,7+12=19$", "not 2 steps"),
        ("3*4=12,12/0=12$", "12/0=12: 0 is not available"),
        ("3*4=12,12+12=24$", "12+12=24: 12 is not available"),
        ("3*4=12,3+7=10$", "3+7=10: 3 is not available"),
        ("7+7=14,14+4=18$", "7+7=14: 7 is not available"),
        ("3*4=12,99*99=99$", "99*99=99: 99 is not available"),
    ],
)
def test_a_fault_is_named(completion: str, detail: str) -> None:
    verdict = Countdown().score(completion, answer="3 4 7>19")
    assert (verdict.reward, verdict.is_pass) == (0.0, False)
    assert verdict.detail.startswith(detail)


def test_a_number_that_occurs_twice_may_be_used_twice() -> None:
    assert passes("5-5=0,0+3=3$", "3 5 5>3")
    assert not passes("5-5=0,0+5=5$", "3 5 5>5")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit", ["(", "9", "3*4=12,", "3*", "=", "$", "\x00", "٣", "-", "3*4=12,7+12=19$", " "]
)
def test_a_megabyte_of_anything_fails_in_no_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    for _ in range(1000):
        assert not passes(text, "3 4 7>19")


@pytest.mark.parametrize(
    "answer", ["", "3 4 7", "3 4 7>", "3  4>7", "3 4>019", "a>b", "3>4>5", "٣ 4>7"]
)
def test_an_answer_of_another_task_is_an_error_and_no_zero(answer: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        Countdown().score("3*4=12,7+12=19$", answer=answer)


def test_three_numbers_make_2144_problems_a_tenth_of_them_held_out() -> None:
    task = Countdown()
    train, held_out = task.problems("train"), task.problems("eval")
    assert (len(train), len(held_out)) == (1930, 214)
    assert len({*train, *held_out}) == 2144
    for problem in [*train, *held_out]:
        numbers, target = parse_answer(problem.answer)
        assert problem.prompt == problem.answer + "="
        assert numbers == tuple(sorted(numbers))
        assert 0 < target <= 99


def test_the_cut_between_training_and_evaluation_never_moves() -> None:
    first = [problem.prompt for problem in Countdown().problems("eval")[:3]]
    assert first == FIRST_HELD_OUT


def test_every_problem_is_solvable_and_no_reachable_target_is_missing() -> None:
    found = {
        problem.answer for split in ("train", "eval") for problem in Countdown().problems(split)
    }
    for numbers in [(1, 1, 1), (3, 4, 7), (9, 9, 9), (2, 6, 8)]:
        text = " ".join(map(str, numbers))
        reachable = {target for target in range(1, 100) if every_solution(numbers, target)}
        assert {answer for answer in found if answer.startswith(f"{text}>")} == {
            f"{text}>{target}" for target in reachable
        }


def test_hard_problems_are_held_out_ones_that_random_chains_rarely_solve() -> None:
    task = Countdown()
    hard, held_out = task.problems("hard"), task.problems("eval")
    assert 0 < len(hard) < len(held_out)
    assert set(hard) <= set(held_out)
    for problem in held_out:
        numbers, target = parse_answer(problem.answer)
        assert (problem in hard) == (outcome_chances(numbers)[target] <= 0.03)


@pytest.mark.parametrize("numbers", [(2, 3, 8), (5, 5, 9), (1, 2, 3, 4)])
def test_the_chances_are_those_of_random_chains(numbers: tuple[int, ...]) -> None:
    generator = random.Random(1)
    drawn = Counter(random_chain(numbers, generator)[-1].result for _ in range(20_000))
    chances = outcome_chances(numbers)
    assert sum(chances.values()) == pytest.approx(1.0)
    assert set(drawn) <= set(chances)
    for outcome, chance in chances.items():
        assert drawn[outcome] / 20_000 == pytest.approx(chance, abs=0.012)


def test_demonstrations_solve_problems_that_are_not_held_out() -> None:
    task = Countdown()
    held_out = set(task.problems("eval"))
    for problem, completion in islice(task.demonstrations(seed=3), 3000):
        assert problem not in held_out
        assert task.score(completion, answer=problem.answer).is_pass
        assert set(problem.prompt + completion) <= {*task.alphabet, task.end}


def test_demonstrations_are_a_function_of_their_seed() -> None:
    def first(seed: int) -> list[tuple[object, str]]:
        return list(islice(Countdown().demonstrations(seed), 20))

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize("numbers", [1, 6, 0, -3, True, 3.5, "x"])
def test_an_impossible_number_of_numbers_is_refused(numbers: int) -> None:
    with pytest.raises(ValueError, match="must be 2 to 5"):
        Countdown(numbers)
