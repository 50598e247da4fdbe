"""The report and its figures, from rows as a learner writes them."""

from __future__ import annotations

import html
import json
import math
import random
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.cli.chapters import SUBJECTS
from services.cli.entropy_readings import Prediction
from services.cli.figures import EndLabel, label_ends, panels_below
from services.cli.law import law_text
from services.cli.law_figures import (
    LawPoint,
    band_half_width,
    draw_forecast,
    draw_law,
    law_points,
)
from services.cli.report import make_report
from services.cli.run_folder import RunFolder
from services.cli.summary import (
    difference_error,
    evaluation_text,
    law_facts,
    overstale_text,
)
from shared.rl.entropy_law import fit

Row = dict[str, Any]
Rows = list[Row]

PERCENTILES = {"50": 1e-4, "90": 0.02, "99": 0.4, "99_8": 1.6, "100": 6.0}
TOPS = {"0_02": 5.0, "0_2": 2.4, "2": 0.5, "20": 0.06, "50": 0.02, "100": 0.004}
BUCKETS = ("0", "0_25", "0_5", "0_75", "1")
A, B, FLOOR = 0.9, 1.5, 0.02


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
    report_of(tmp_path, [{"step": 1, "completion_length_correct": 12.0}])
    assert plots(tmp_path) == {"lengths"}
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
    assert law_points(rows) == [LawPoint(0.3, 0.4, 0.01), LawPoint(0.2, 0.5, 0.0)]


def test_the_law_is_spelled_with_its_ceiling_or_why_there_is_none() -> None:
    spelled = "R = -0.9 exp(H) + 1.5, ceiling 0.600 (95 %: 0.560 to 0.640), R² 0.97"
    assert law_text(run_rows()) == spelled
    assert law_text(run_rows(10)).startswith("not identifiable (1 point, condition number 120;")
    assert "no ceiling" in law_text([{"law_a": -0.5, "law_b": 0.1, "law_ceiling": 0.6}])
    assert law_text([]) == "not identifiable (needs 3 evaluations at entropies that differ)"


def test_the_newest_row_says_whether_the_law_is_identified() -> None:
    rows = run_rows()
    lost = {**law_keys(10), "law_points": 5.0, "law_condition": None}
    assert law_text([*rows, {"step": 101, **lost}]) == (
        "not identifiable (5 points, condition number infinite; needs 3 evaluations at entropies"
        " that differ)"
    )
    assert law_text([*rows, {"step": 101, "entropy": 0.1}]) == law_text(rows)


def test_a_forecast_is_said_and_so_is_what_it_cannot_say() -> None:
    facts = dict(law_facts(run_rows()))
    assert facts["score at the entropy floor"] == "0.582 at H = 0.02 nats, +0.133 from now"
    assert facts["steps to the entropy floor"] == "about 945 steps at -0.00014 nats a step"
    rising = {"law_a": None, "entropy_rate": 2e-3, "law_steps_left": None}
    facts = dict(law_facts([rising]))
    assert facts["score at the entropy floor"] == ""
    assert facts["steps to the entropy floor"] == "not reached at +0.002 nats a step"
    assert "at it" in dict(law_facts([rising | {"law_steps_left": 0.0}]))[
        "steps to the entropy floor"
    ]  # fmt: skip


def test_the_band_is_that_of_the_fit() -> None:
    entropies, scores = [0.3, 0.25, 0.2, 0.12], [0.31, 0.37, 0.4, 0.52]
    law = fit(entropies, scores)
    row = {"law_a": law.a, "law_b": law.b}
    row |= dict(zip(("law_a_low", "law_a_high"), law.a_interval, strict=True))
    points = [LawPoint(h, score, 0.0) for h, score in zip(entropies, scores, strict=True)]
    half = (law.ceiling_interval[1] - law.ceiling_interval[0]) / 2
    assert band_half_width(row, points, 1.0) == pytest.approx(half)


def test_a_slope_that_may_be_none_is_called_that() -> None:
    rows = [row | {"law_a_low": -0.2} for row in run_rows(60)]
    assert "the 95 % interval of a, -0.2 to 1, includes 0" in draw_law(rows).reading
    assert "includes 0" not in draw_law(run_rows(60)).reading


def test_a_law_that_is_not_identified_is_drawn_as_points_and_said() -> None:
    drawing = draw_law(run_rows(12))
    assert "the law is not identifiable (1 point, condition number 120;" in drawing.reading
    (axes,) = drawing.figure.axes
    assert [text.get_text()[:24] for text in axes.texts] == ["Law not identifiable (1 "]
    assert "no score forecast" in draw_forecast(run_rows(12)).reading


def test_predictions_are_scaled_but_keep_their_signs() -> None:
    measured = [-0.3, -0.1, 0.1, -0.2]
    prediction = Prediction("pg", [-60.0, -20.0, 20.0, -40.0], measured)
    assert prediction.scaled() == pytest.approx(measured)
    assert prediction.correlation() == pytest.approx(1.0)
    assert prediction.equal_signs() == 1.0
    opposite = Prediction("pg", [6.0, 2.0, -2.0, -4.0], measured)
    assert statistics.pstdev(opposite.scaled()) == pytest.approx(statistics.pstdev(measured))
    assert opposite.equal_signs() == 0.25
    assert Prediction("pg", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).correlation() is None
    assert Prediction("pg", [1.0, 2.0], [1.0, 2.0]).correlation() is None, "two always agree"
    assert Prediction("pg", [0.0], [1.0]).scaled() == [0.0]


def test_the_diagnostics_are_read_from_the_rows(tmp_path: Path) -> None:
    rows = [
        {
            "step": 1,
            "covariance_top_0_02": 5.0,
            "covariance_top_100": 0.004,
            "selected_tokens": 1,
            "selected_quota": 4,
            "selected_negative_advantage_fraction": 0.0,
            "selected_probability_mean": 0.1,
            "tokens": 1000,
            "entropy_histogram": [60, *[0] * 12, 40],
            "entropy_by_position": [0.4, None, *[0.1] * 8],
            "completion_length_correct": 10.0,
            "truncated_fraction": 0.5,
        },
        {
            "step": 2,
            "covariance_top_0_02": 6.0,
            "covariance_top_100": 0.002,
            "selected_tokens": 3,
            "selected_quota": 4,
            "selected_negative_advantage_fraction": 1.0,
            "selected_probability_mean": 0.02,
            "tokens": 1000,
            "entropy_histogram": [75, *[0] * 12, 25],
            "entropy_by_position": [0.1, 0.2, *[0.1] * 8],
            "completion_length_correct": 12.0,
            "truncated_fraction": 0.0,
        },
    ]
    text = report_of(tmp_path, rows)
    for part in (
        "top 0.02 % 5 -> 6 (5.654), all 0.004 -> 0.002 (0.003).",
        "4 tokens were selected, 50 % of the quota and 0.200 % of all tokens; 75 % of them have"
        " A < 0; their mean probability is 0.04.",
        "60.0 % of the tokens are under 0.05 nats and 40.0 % above 1.2 in step 1; 75.0 %",
        "highest in tenth 2 (0.200 nats); it fell most in tenth 1, from 0.400 to 0.100.",
        "correct ones rose from 10.0 to 12.0 tokens; cut off at the limit were 50.0 % at first,"
        " 0.0 % last.",
    ):
        assert part in text, part


def test_what_was_left_out_stands_after_the_figures_of_its_chapter(tmp_path: Path) -> None:
    rows = [{"step": step, "covariance_p50": 0.1 * step, "lengths": 0} for step in range(1, 4)]
    text = report_of(tmp_path, rows)
    order = ["Covariance and token selection", "Covariance percentiles", "Covariance of the top",
             "Completions and pipeline"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_a_histogram_of_other_bins_is_not_drawn(tmp_path: Path) -> None:
    text = report_of(tmp_path, [{"step": 1, "entropy_histogram": [1, 2, 3]}])
    assert "no row has entropy_histogram with 14 counts" in text


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    figure, (axes,) = panels_below("title", ["nats"])
    axes.plot([0, 1], [0, 1])
    label_ends(axes, [EndLabel(str(place), 0.5, "black") for place in range(5)])
    heights = sorted(text.xy[1] for text in axes.texts)
    inches = axes.get_position().height * figure.get_figheight()
    assert all((high - low) * inches > 0.14 for low, high in pairwise(heights))


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
    entropies = [entropy_at(step) for step in range(num_steps + 1)]
    rows: Rows = []
    for step in range(num_steps + 1):
        if step:
            rows.append(step_row(step, entropies[step - 1], draw))
        if step == 0 or (step % every == 1 and step > 1):
            made = max(0, step - 1)
            rows.append(evaluation_row(made, entropies[made], draw))
    return [row | law_keys(row["step"]) for row in rows]


def entropy_at(step: int) -> float:
    return 0.15 + 0.07 * math.exp(-step / 40)


def law_keys(step: int) -> Row:
    """What the learner knows of the law after a step: nothing before the fourth evaluation."""
    entropy, rate = entropy_at(step), -0.07 / 40 * math.exp(-step / 40)
    known = {
        "law_points": float(step // 10),
        "law_condition": 120.0,
        "entropy_consumed": (entropy_at(0) - entropy) / (entropy_at(0) - FLOOR),
        "entropy_rate": rate,
        "law_steps_left": (entropy - FLOOR) / -rate,
    }
    numbers = {
        "law_a": A,
        "law_a_low": A - 0.1,
        "law_a_high": A + 0.1,
        "law_b": B,
        "law_ceiling": B - A,
        "law_ceiling_low": B - A - 4 / step if step else 0.0,
        "law_ceiling_high": B - A + 4 / step if step else 0.0,
        "law_rmse": 0.006,
        "law_r2": 0.97,
        "law_floor": FLOOR,
        "law_score_at_floor": B - A * math.exp(FLOOR),
        "law_gain_left": A * (math.exp(entropy) - math.exp(FLOOR)),
    }
    is_identifiable = step > 30
    return known | {
        "law_identifiable": float(is_identifiable),
        **(numbers if is_identifiable else dict.fromkeys(numbers)),
    }


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
        **entropy_keys(step, entropy, draw),
        "covariance_mean": 0.004,
        **{f"covariance_p{p}": v * draw.uniform(0.7, 1.4) for p, v in PERCENTILES.items()},
        **{f"covariance_top_{p}": v * draw.uniform(0.7, 1.4) for p, v in TOPS.items()},
        "covariance_response": 0.01 * draw.uniform(0.2, 1.4),
        **{f"covariance_by_accuracy_{k}": draw.gauss(0.01, 0.005) for k in BUCKETS},
        **selection_keys(draw),
        "completion_length_mean": 19.0,
        "completion_length_correct": 18.0 + step / 50 + draw.gauss(0, 0.4),
        "completion_length_incorrect": 21.0 + draw.gauss(0, 0.6),
        "truncated_fraction": max(0.0, draw.gauss(0.004, 0.003)),
        "staleness_mean": 0.7,
        "staleness_max": 2,
        "staleness_counts": {"0": 60, "1": 48, "2": 20},
        "groups_over_max_staleness": 0,
        "mismatch_kl": 2e-4 * draw.uniform(0.5, 2.0),
        "update_kl": 6e-4 * draw.uniform(0.5, 2.0),
        "reference_kl": 3e-5 * step * draw.uniform(0.8, 1.2),
        "ratio_max": 1 + draw.expovariate(2.0),
        "ratio_min": 1 / (1 + draw.expovariate(2.0)),
        "clip_fraction_low": 0.004 * draw.random(),
        "clip_fraction_high": 0.009 * draw.random(),
        "importance_weight_ess": 1 - 0.03 * draw.random(),
        "tokens": 2500,
        "seconds": wait + train + 0.2,
        "wait_data_seconds": wait,
        "train_seconds": train,
        "publish_seconds": 0.15,
        "pause_seconds": 0.04,
    }


def entropy_keys(step: int, entropy: float, draw: random.Random) -> Row:
    """Entropies of a step; every tenth compares the change with its predictions."""
    change = -0.0017 * math.exp(-step / 40) * draw.uniform(-0.4, 2.0)
    changes = {
        "entropy_change_measured": change,
        "entropy_change_predicted_pg": change * draw.uniform(20, 40),
        "entropy_change_predicted_npg": change * draw.uniform(-5, 60),
        "entropy_change_predicted_influence": change * draw.uniform(9, 11),
    }
    return {
        "entropy": entropy * (1 + draw.gauss(0, 0.02)),
        "entropy_seq_mean": entropy * 1.1,
        "entropy_after_filter": entropy,
        "entropy_clamped": entropy * 0.8,
        "entropy_coefficient": 6e-4 + 2e-5 * step,
        **{f"entropy_p{p}": entropy * p / 50 for p in (10, 50, 80, 90, 99)},
        "entropy_reward_positive": entropy * draw.uniform(0.7, 0.9),
        "entropy_reward_other": entropy * draw.uniform(1.1, 1.3),
        **{
            f"entropy_by_accuracy_{k}": entropy * (1.5 - place / 5) * draw.uniform(0.9, 1.1)
            for place, k in enumerate(BUCKETS)
        },
        "entropy_histogram": [1700 + 2 * step, 150, *[60 - step // 4] * 11, 40],
        "entropy_by_position": [entropy * (0.6 + abs(place - 4) / 6) for place in range(10)],
        **(changes if step % 10 == 1 else {}),
    }


def selection_keys(draw: random.Random) -> Row:
    """What Clip-Cov selected."""
    return {
        "selected_tokens": draw.randrange(6),
        "selected_quota": 5,
        "selected_fraction": 0.002,
        "selected_negative_advantage_fraction": draw.choice([0.6, 0.8, 1.0]),
        "selected_abs_advantage_mean": 1.4,
        "selected_probability_mean": 0.02 * draw.uniform(0.2, 2),
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
