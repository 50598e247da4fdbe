from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.bench.learner import regressions
from tests.bench.learner_async import FIRST_STEPS, Timing, summarise, timing
from tests.bench.learner_groups import CPU_SIZES, random_groups
from tests.bench.learner_phases import Stopwatch, TimedModel
from tests.bench.mismatch import compare as compare_logprobs
from tests.bench.trl_paired import Round, compare, trl_round


def stored(**changes: Any) -> dict[str, Any]:
    return {"size": "25M", "step_utilisation": 0.6, "memory_ratio": 4.0, **changes}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"step_utilisation": 0.55, "memory_ratio": 4.3}, []),
        ({"step_utilisation": 0.9, "memory_ratio": 2.0}, []),
        ({"step_utilisation": 0.5}, ["step_utilisation"]),
        ({"memory_ratio": 4.5}, ["memory_ratio"]),
        ({"size": "7B"}, ["7B: not in the baseline"]),
    ],
)
def test_what_is_worse_than_the_baseline_beyond_the_tolerance_is_named(
    changes: dict[str, Any], names: list[str]
) -> None:
    found = regressions([stored(**changes)], [stored()], tolerance=0.1)
    assert len(found) == len(names)
    assert all(name in line for name, line in zip(names, found, strict=True))


def test_a_batch_has_the_lengths_that_its_size_says_and_is_the_same_each_time() -> None:
    size = CPU_SIZES["25M"]
    groups = random_groups(size)
    lengths = [len(each.token_ids) for group in groups for each in group.rollout.completions]
    low, high = size.completion_tokens
    assert len(groups) == size.groups
    assert len(lengths) == size.groups * size.group_size
    assert low <= min(lengths) <= max(lengths) <= high
    assert random_groups(size) == groups


class OneWeight:
    """A model of one weight, as far as a stopwatch looks at one."""

    cost = "of a pass"

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)

    def forward(self, factor: float) -> torch.Tensor:
        return self.weight * factor

    def accumulate(self, loss: torch.Tensor, *, is_last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        assert self.weight.grad is not None
        return float(self.weight.grad)


def test_a_pass_without_gradient_is_a_measuring_one_and_results_pass_through() -> None:
    stopwatch = Stopwatch(by_cpu=True)
    model = TimedModel(OneWeight(), stopwatch)
    with torch.no_grad():
        assert float(model.forward(2.0)) == 2.0  # type: ignore[arg-type]
    assert set(stopwatch.seconds) == {"measure"}
    model.accumulate(model.forward(3.0), is_last=True)  # type: ignore[arg-type]
    assert model.step() == 3.0  # type: ignore[comparison-overlap]
    assert set(stopwatch.seconds) == {"measure", "forward", "backward", "optimiser"}
    assert model.cost == "of a pass"


def test_a_step_is_timed_between_ends_of_steps_and_the_first_ones_are_left_out() -> None:
    cold = [{"time": 10.0 * step, "wait_data_seconds": 9.0} for step in range(FIRST_STEPS)]
    start = cold[-1]["time"]
    warm = [{"time": start + 2.0 * step, "wait_data_seconds": 0.5} for step in (1, 2, 3)]
    assert timing([{"eval_score": 0.1}, *cold, *warm]) == Timing(2.0, 0.5)


def test_a_run_that_hides_the_shorter_part_wholly_has_all_of_the_ideal_gain() -> None:
    waiting = Timing(seconds=3.0, wait_seconds=1.0)
    assert waiting.ideal == pytest.approx(1.5)
    row = summarise(2, [(waiting, Timing(2.0, 0.0))])
    assert (row.speed_up, row.ideal, row.share_of_ideal) == (1.5, 1.5, 1.0)
    none = summarise(2, [(waiting, waiting)])
    assert none.share_of_ideal == pytest.approx(1 / 1.5, abs=1e-3)


def test_equal_logprobs_have_no_mismatch_and_a_shift_has_that_of_its_closed_form() -> None:
    vllm = [[-1.0, -2.0], [-0.5]]
    same = compare_logprobs(vllm, vllm)
    assert (same["tokens"], same["mean_abs"], same["kl"], same["max_ratio"]) == (3, 0, 0, 1)
    assert same["effective_tokens"] == same["effective_completions"] == 1
    shift = 0.1
    moved = compare_logprobs([[each + shift for each in row] for row in vllm], vllm)
    assert moved["mean_abs"] == pytest.approx(shift)
    assert moved["kl"] == pytest.approx(math.exp(shift) - 1 - shift)
    assert moved["max_ratio"] == pytest.approx(math.exp(shift))
    assert moved["effective_tokens"] == pytest.approx(1)
    # Weights e^0.2 and e^0.1 of the two completions.
    first, second = math.exp(2 * shift), math.exp(shift)
    expected = (first + second) ** 2 / (first**2 + second**2) / 2
    assert moved["effective_completions"] == pytest.approx(expected)


def test_of_trl_the_faster_number_of_threads_counts_and_parts_are_of_one_thread() -> None:
    cold = {"clock": 100.0, "train": 100.0, "measure": 100.0}
    one = {"clock": 4.0, "train": 1.0, "measure": 0.5}
    two = {"clock": 2.0, "train": 7.0, "measure": 7.0}
    found = trl_round([{"batches": [cold, one, one]}, {"batches": [cold, two, two]}])
    assert found == Round(256 / 2.0, 1.0, 0.5)


def test_a_ratio_above_one_is_in_our_favour() -> None:
    ours, trl = Round(300.0, 0.5, 0.5), Round(100.0, 1.0, 0.25)
    assert [row.ratio for row in compare([(ours, trl)])] == [3.0, 2.0, 1.25]
