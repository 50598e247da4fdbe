"""The study's arithmetic, its run files, and one run of it in a small form."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from services.learner.warmup import warm_up
from shared.config import parse_run
from tests.bench.entropy_study import Job, run_all, to_toml
from tests.bench.study_arms import ARMS, CONTROLS, REGIMES, SLOW, run_document
from tests.bench.study_numbers import (
    Estimate,
    RunResult,
    paired_difference,
    read_results,
    read_rows,
    write_result,
)
from tests.bench.study_report import write_report

SMALL = """
[run]
name = "small"
num_steps = 3
directory = "models"
[model]
max_length = 32
[warmup]
num_steps = 60
batch_size = 32
hidden_size = 64
num_layers = 2
num_heads = 2
intermediate_size = 128
[task]
name = "countdown"
params = { numbers = 2 }
[rollout]
group_size = 4
max_completion_tokens = 12
[learner]
groups_per_batch = 4
optimizer_steps_per_batch = 2
[evaluation]
every_steps = 2
num_problems = 4
group_size = 2
"""


def result(solved: list[int], *, samples: int = 4) -> RunResult:
    return RunResult(
        entropies=[0.4] * 10 + [0.1] * 10,
        scores=[(0, 0.1), (10, 0.2)],
        points=[(0.4, 0.1), (0.3, 0.2), (0.2, 0.25), (0.1, 0.3)],
        solved={"eval": solved, "hard": solved[:1]},
        samples=samples,
        positive_covariances=0.5,
        clipped=0.01,
    )


@pytest.mark.parametrize(("regime", "arm"), list(product(REGIMES, ARMS)))
def test_every_run_file_of_the_study_is_valid(regime: str, arm: str) -> None:
    config = parse_run(to_toml(run_document(REGIMES[regime], arm, 3)))
    assert config.run.seed == 3


def test_arms_of_a_seed_share_their_warm_up_model_and_seeds_do_not() -> None:
    models = {
        (arm, seed): Job(Path("study"), "base", arm, seed).model for arm in ARMS for seed in (1, 2)
    }
    assert len({model for (_, seed), model in models.items() if seed == 1}) == 1
    assert models["vanilla", 1] != models["vanilla", 2]


def test_every_control_is_an_arm() -> None:
    assert {*CONTROLS, *CONTROLS.values(), SLOW} <= set(ARMS)


def test_pass_at_k_is_the_share_of_draws_without_replacement_that_hold_a_solution() -> None:
    solved = [True, False, True, False, False]
    draws = list(combinations(solved, 3))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert result([2], samples=5).pass_at(3) == pytest.approx(expected)


def test_an_estimate_is_the_t_interval_over_seeds() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0, math.nan])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert not estimate.is_clear
    assert Estimate.of([2.0, 2.1, 2.2]).is_clear


def test_a_difference_is_paired_by_seed_and_leaves_lonely_seeds_out() -> None:
    runs = {
        "aent": {1: result([2]), 2: result([3]), 3: result([4])},
        "vanilla": {1: result([1]), 2: result([1])},
    }
    difference = paired_difference(runs, "aent", "vanilla", lambda run: run.pass_at(1))
    assert difference.mean == pytest.approx(0.375)
    assert difference.num_values == 2


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_result(result([1, 4]), tmp_path / "clip-cov-12.json")
    (read,) = read_results(tmp_path)["clip-cov"].values()
    assert read.pass_at(2) == result([1, 4]).pass_at(2)
    assert read.law == result([1, 4]).law


def test_a_report_forgets_other_results_unless_it_extends_them(tmp_path: Path) -> None:
    kept = tmp_path / "entropy-study" / "base" / "aent-1.json"
    write_result(result([1, 4]), kept)
    assert write_report(tmp_path / "study", tmp_path, ["base"], extend=True)
    assert kept.exists()
    assert write_report(tmp_path / "study", tmp_path, ["base"]) == []
    assert not kept.exists()


def test_the_entropy_ratio_compares_the_ends() -> None:
    assert result([2]).entropy_ratio == pytest.approx(0.25)


@pytest.mark.integration
def test_a_run_leaves_rows_that_the_report_reads_and_is_not_run_again(tmp_path: Path) -> None:
    folder, run_file = tmp_path / "study", tmp_path / "run.toml"
    run_file.write_text(SMALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    model = tmp_path / parse_run(SMALL).model_path
    rows = folder / "base" / "vanilla-1.jsonl"
    rows.parent.mkdir(parents=True)
    warm_up(parse_run(SMALL), model, report=lambda progress: None)
    module = ["tests.bench.lockstep", "--rows", str(rows), "--lag", "1", "--final-samples", "2"]
    command = [sys.executable, "-m", *module, "--config", str(run_file)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240)
    steps = [json.loads(line) for line in rows.read_text().splitlines()]
    trained = [row for row in steps if "entropy" in row]
    assert [row["staleness_max"] for row in trained] == [0, 1, 1]
    assert [row["eval_step"] for row in steps if "eval_step" in row] == [0, 2]
    assert read_rows(rows).samples == 2
    assert run_all([Job(folder, "base", "vanilla", 1)], parallel=1) == []
    (table,) = write_report(folder, tmp_path, ["base", "stale"])
    assert "| vanilla |" in table.read_text()
    assert len(list(tmp_path.glob("entropy-study-base-*.png"))) == 4
