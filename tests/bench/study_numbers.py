"""What one run of the entropy study came to, and how arms compare over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shared.rl.entropy_law import MIN_POINTS, EntropyLaw, fit
from shared.rl.student_t import t_quantile

END_STEPS = 10
"""Steps whose mean is the entropy at the start and at the end."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run.

    Attributes:
        entropies: token mean by step. scores: (step, evaluation score).
        points: (entropy, score) of the evaluated versions, for the law.
        solved: how many of `samples` were right, by problem, of `eval` and `hard`.
        positive_covariances: share of the steps whose mean covariance is above 0.
        clipped: share of tokens where the clip bound, mean over steps.
    """

    entropies: list[float]
    scores: list[tuple[int, float]]
    points: list[tuple[float, float]]
    solved: dict[str, list[int]]
    samples: int
    positive_covariances: float
    clipped: float

    @property
    def entropy_ratio(self) -> float:
        """Entropy at the end over entropy at the start."""
        start = statistics.fmean(self.entropies[:END_STEPS])
        return statistics.fmean(self.entropies[-END_STEPS:]) / start

    def pass_at(self, k: int, split: str = "eval") -> float:
        """Unbiased estimate of the chance that one of k samples solves a problem, mean over them.

        1 - C(n - c, k) / C(n, k) with c of n samples right (https://arxiv.org/abs/2107.03374); NaN
        for more than there are, and for a split without problems.
        """
        n, solved = self.samples, self.solved[split]
        if k > n or not solved:
            return math.nan
        return statistics.fmean(1 - math.comb(n - right, k) / math.comb(n, k) for right in solved)

    @property
    def law(self) -> EntropyLaw:
        """Fitted on all evaluated versions."""
        return fit([entropy for entropy, _ in self.points], [score for _, score in self.points])

    @property
    def extrapolation_error(self) -> float:
        """RMSE, on the other points, of the law fitted on the first third; NaN if it has none."""
        count = max(MIN_POINTS, len(self.points) // 3)
        early, late = self.points[:count], self.points[count:]
        law = fit([entropy for entropy, _ in early], [score for _, score in early])
        if not late or not law.is_identifiable:
            return math.nan
        return law.rmse_on([entropy for entropy, _ in late], [score for _, score in late])


class Estimate(NamedTuple):
    """A mean over seeds with the half width of its 95 % t-interval; NaN for one seed."""

    mean: float
    half_width: float
    num_values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of the values that are finite; all NaN without one."""
        values = [value for value in values if math.isfinite(value)]
        if not values:
            return cls(math.nan, math.nan, 0)
        half_width = math.nan
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            half_width = t_quantile(0.975, len(values) - 1) * error
        return cls(statistics.fmean(values), half_width, len(values))

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half_width


Runs = dict[str, dict[int, RunResult]]
"""By arm and seed."""


def read_results(folder: Path) -> Runs:
    """The results that `write_result` wrote for a regime."""
    runs: Runs = {}
    for path in sorted(folder.glob("*.json")):
        arm, _, seed = path.stem.rpartition("-")
        runs.setdefault(arm, {})[int(seed)] = RunResult(**json.loads(path.read_text("utf8")))
    return runs


def write_result(result: RunResult, path: Path) -> None:
    """As JSON, four decimals a number: enough for every table and plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = json.loads(json.dumps(asdict(result)), parse_float=lambda text: round(float(text), 4))
    path.write_text(json.dumps(numbers) + "\n", "utf8")


def read_rows(path: Path) -> RunResult:
    """Of the rows that `tests.bench.lockstep` wrote."""
    rows = [json.loads(line) for line in path.read_text("utf8").splitlines()]
    steps = [row for row in rows if "entropy" in row]
    scores = [
        (int(row["eval_step"]), float(row["eval_score"])) for row in rows if "eval_score" in row
    ]
    # A step's entropy is that of the version before it.
    filtered = {int(row["step"]) - 1: row.get("entropy_after_filter") for row in steps}
    final: dict[str, Any] = rows[-1]["final"]
    samples = final["samples"]
    clipped = [row.get(f"clip_fraction_{side}", 0.0) for row in steps for side in ("low", "high")]
    return RunResult(
        entropies=[row["entropy"] for row in steps],
        scores=scores,
        points=[
            (entropy, score)
            for step, score in scores
            if (entropy := filtered.get(step)) is not None
        ],
        solved={
            split: [round(share * samples) for share in final[split]] for split in ("eval", "hard")
        },
        samples=samples,
        positive_covariances=statistics.fmean(row["covariance_mean"] > 0 for row in steps),
        clipped=2 * statistics.fmean(clipped),
    )


def over_seeds(runs: Mapping[int, RunResult], measure: Callable[[RunResult], float]) -> Estimate:
    """A measure's mean over the seeds of an arm."""
    return Estimate.of([measure(run) for run in runs.values()])


def paired_difference(
    runs: Runs, arm: str, control: str, measure: Callable[[RunResult], float]
) -> Estimate:
    """Arm minus control, paired by seed: both start from the same model, on the same prompts."""
    common = sorted(runs.get(arm, {}).keys() & runs.get(control, {}).keys())
    return Estimate.of([measure(runs[arm][seed]) - measure(runs[control][seed]) for seed in common])
