"""The report and its figures, from rows as a learner writes them."""

from __future__ import annotations

import html
import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from services.cli.figures import SUBJECTS, law_points
from services.cli.report import make_report
from services.cli.run_folder import RunFolder
from services.cli.summary import difference_error, evaluation_text, law_text, overstale_text

Row = dict[str, Any]
Rows = list[Row]

PERCENTILES = {"50": 1e-4, "90": 0.02, "99": 0.4, "99_8": 1.6, "100": 6.0}
TOPS = {"0_02": 5.0, "0_2": 2.4, "2": 0.5, "20": 0.06, "50": 0.02, "100": 0.004}
A, B = 0.9, 1.5


def report_of(folder: Path, rows: Rows, *, more: str = "") -> str:
    """The text of the report on these rows, images left out."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    page = make_report(RunFolder(folder)).read_text("utf8")
    return html.unescape(re.sub(r"<[^>]*>", "\n", page))


def plots(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").iterdir()}


def test_a_whole_run_has_every_figure_inside_the_file_and_beside_it(tmp_path: Path) -> None:
    text = report_of(tmp_path, run_rows())
    assert plots(tmp_path) == {subject.name for subject in SUBJECTS}
    page = (tmp_path / "report.html").read_text("utf8")
    assert page.count("data:image/png;base64,iVBOR") == len(SUBJECTS)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "needs nothing but itself"
    assert "Left out" not in text


def test_the_sentences_are_computed_from_the_rows(tmp_path: Path) -> None:
    rows = [{"step": step, "entropy": h} for step, h in enumerate([0.22, 0.2, 0.15])]
    counts = {"step": 3, "staleness_counts": {"0": 6, "1": 2}}
    scores = [
        {"step": at, "eval_step": at, "eval_score": score, "eval_stderr": 0.03}
        for at, score in ((0, 0.3), (3, 0.5))
    ]
    text = report_of(tmp_path, [*rows, counts, *scores])
    assert "Entropy fell from 0.220 to 0.150 nats: 32 % consumed." in text
    assert "Of 8 completions 75 % were trained by the version that sampled them" in text
    assert "The evaluation score rose from 0.300 to 0.500, +4.7 standard errors" in text


def test_what_cannot_be_drawn_is_left_out_with_the_reason(tmp_path: Path) -> None:
    report_of(tmp_path, run_rows(12))
    rows = [{"step": step, "entropy": 0.2, "reward_mean": None} for step in range(3)]
    text = report_of(tmp_path, rows)
    assert plots(tmp_path) == {"entropy"}, "old figures are gone"
    assert "Left out: no row has reward_mean or eval_score." in text
    assert "Left out: no row has staleness_counts." in text
    assert "Left out: no evaluated version has both a score and an entropy." in text
    assert "Entropy stayed, from 0.200 to 0.200 nats." in text


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1, "rew', "[]\nnull\n"])
def test_a_file_without_a_row_makes_a_report_that_says_so(tmp_path: Path, content: str) -> None:
    text = report_of(tmp_path, [], more=content)
    assert "none: metrics.jsonl is missing or empty" in text
    assert plots(tmp_path) == set()


def test_a_single_row_is_drawn(tmp_path: Path) -> None:
    text = report_of(tmp_path, run_rows(1))
    assert plots(tmp_path) == {subject.name for subject in SUBJECTS}
    assert "The mean training reward of the only step is" in text


def test_numbers_that_are_not_are_skipped(tmp_path: Path) -> None:
    rows = run_rows(8)
    rows[2] = dict.fromkeys(rows[2], math.nan) | {"step": 2}
    rows[3] = dict.fromkeys(rows[3]) | {"step": 3}
    rows[4] |= {"covariance_p50": -math.inf, "staleness_counts": "all", "entropy": "much"}
    report_of(tmp_path, rows, more='{"step": 9, "entr')
    assert plots(tmp_path) == {subject.name for subject in SUBJECTS}


def test_a_negative_covariance_is_drawn_too(tmp_path: Path) -> None:
    rows = [{"step": step, "covariance_p50": -0.1, "covariance_p100": 3.0} for step in range(5)]
    report_of(tmp_path, rows)
    assert "covariance" in plots(tmp_path)


def test_points_of_the_law_join_a_score_with_the_entropy_of_the_same_version() -> None:
    rows: Rows = [
        {"step": 1, "policy_version": 1, "entropy": 0.9, "entropy_after_filter": 0.3},
        {"step": 1, "eval_policy_version": 0, "eval_score": 0.4, "eval_stderr": 0.01},
        {"step": 2, "policy_version": 2, "entropy": 0.2},
        {"step": 2, "eval_policy_version": 1, "eval_score": 0.5},
        {"step": 2, "eval_policy_version": 2, "eval_score": 0.6},
    ]
    assert law_points(rows) == [(0.3, 0.4, 0.01), (0.2, 0.5, 0.0)]


def test_the_law_is_spelled_with_its_ceiling_or_why_there_is_none() -> None:
    assert law_text(run_rows()) == f"R = -{A} exp(H) + {B}, ceiling {B - A:.4g}, R² 0.97"
    assert law_text(run_rows(10)).startswith("not identifiable")
    assert "no ceiling" in law_text([{"law_a": -0.5, "law_b": 0.1, "law_ceiling": 0.6}])


def test_a_difference_is_paired_where_the_rows_allow_it() -> None:
    before = {"eval_score": 0.5, "eval_stderr": 0.3, "eval_problem_scores": [0.0, 0.5, 1.0]}
    after = {"eval_score": 0.7, "eval_stderr": 0.4, "eval_problem_scores": [0.2, 0.8, 1.1]}
    how, error = difference_error(before, after)
    assert how == "paired by problem"
    assert error == pytest.approx(statistics.stdev([0.2, 0.3, 0.1]) / math.sqrt(3))
    del after["eval_problem_scores"]
    how, error = difference_error(before, after)
    assert how == "unpaired"
    assert error == pytest.approx(0.5)
    assert evaluation_text([before, after]).endswith("+0.200, +0.4 standard errors (unpaired)")


def test_what_was_trained_over_the_bound_is_counted() -> None:
    rows: Rows = [{"staleness_counts": {"0": 5, "3": 2}}, {"staleness_counts": [[1, 4], [4, 1]]}]
    assert overstale_text(rows, 4) == "0 of 12"
    assert overstale_text(rows, 2) == "3 of 12"
    assert overstale_text([{"staleness_max": 2.0}], 2) == "0"
    assert overstale_text([{"staleness_max": 3.0}], 2) == "some: staleness reached 3"
    assert overstale_text([{}], 2) == "not measured"


def run_rows(num_steps: int = 100, *, every: int = 10) -> list[Row]:
    """All keys, as a run whose entropy falls while its score rises writes them.

    An evaluation comes back one step after its version.
    """
    draw = random.Random(1)
    entropies = [0.15 + 0.07 * math.exp(-step / 40) for step in range(num_steps + 1)]
    rows = [evaluation_row(0, entropies[0], draw)]
    for step in range(1, num_steps + 1):
        rows.append(step_row(step, entropies[step - 1], draw))
        if step % every == 1 and step > 1:
            rows.append(evaluation_row(step - 1, entropies[step - 1], draw))
    fit = {"law_a": A, "law_b": B, "law_ceiling": B - A, "law_r2": 0.97, "law_points": 9.0}
    return [row | fit if "eval_score" in row and row["step"] > 30 else row for row in rows]


def step_row(step: int, entropy: float, draw: random.Random) -> Row:
    """What a training step measures."""
    reward = B - A * math.exp(entropy) - 0.02
    slow = 6.0 if step == 1 else 0.0
    wait, train = 0.5 + draw.random() * 0.4 + slow, 0.9 + draw.random() * 0.1
    return {
        "step": step,
        "policy_version": step,
        "time": 1000.0 + 1.8 * step,
        "reward_mean": reward + draw.gauss(0, 0.03),
        "reward_std": 0.45,
        "entropy": entropy * (1 + draw.gauss(0, 0.02)),
        "entropy_seq_mean": entropy * 1.1,
        "entropy_after_filter": entropy,
        "entropy_clamped": entropy * 0.8,
        "entropy_coefficient": 6e-4 + 2e-5 * step,
        **{f"entropy_p{p}": entropy * p / 50 for p in (10, 50, 80, 90, 99)},
        "covariance_mean": 0.004,
        **{f"covariance_p{p}": v * draw.uniform(0.7, 1.4) for p, v in PERCENTILES.items()},
        **{f"covariance_top_{p}": v for p, v in TOPS.items()},
        "staleness_mean": 0.7,
        "staleness_max": 2,
        "staleness_counts": {"0": 60, "1": 48, "2": 20},
        "groups_over_max_staleness": 0,
        "mismatch_kl": 2e-4 * draw.uniform(0.5, 2.0),
        "clip_fraction_low": 0.004 * draw.random(),
        "clip_fraction_high": 0.009 * draw.random(),
        "tokens": 2500,
        "seconds": wait + train + 0.2,
        "wait_data_seconds": wait,
        "train_seconds": train,
        "publish_seconds": 0.15,
        "pause_seconds": 0.04,
    }


def evaluation_row(step: int, entropy: float, draw: random.Random) -> Row:
    """What an evaluation measures, in a row of its own."""
    score = B - A * math.exp(entropy) + draw.gauss(0, 0.006)
    return {
        "step": step,
        "eval_step": float(step),
        "eval_policy_version": float(step),
        "eval_score": score,
        "eval_stderr": 0.012,
        "eval_pass_rate": score,
        "eval_pass_at_k": min(1.0, score + 0.2),
        "eval_problems": 150.0,
    }
