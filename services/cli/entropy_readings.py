"""One sentence on each figure of entropy and covariance, computed from what it shows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.law import (
    coefficients,
    consumed_text,
    floor_score_text,
    interval,
    law_row,
    law_text,
    steps_left_text,
)
from services.cli.measurements import Row, first, latest, numbered, series, values
from services.cli.readings import ends
from services.cli.words import moved, percent

_TABLE_1 = {0.02: 5.654, 0.2: 3.112, 2.0: 1.385, 20.0: 0.351, 50.0: 0.152, 100.0: 0.003}
"""Mean covariance of the top percents: arXiv 2505.22617, Qwen2.5-7B at its first step."""

_BUCKET_STARTS = {0.25: "0", 0.5: "25", 0.75: "50", 1.0: "75"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction of the entropy's change, of unknown scale, and the change; a value a step."""

    name: str
    predicted: Sequence[float]
    measured: Sequence[float]

    def scaled(self) -> list[float]:
        """The predictions with the standard deviation of the measurements, and their own signs."""
        own = statistics.pstdev(self.predicted)
        target = statistics.pstdev(self.measured)
        if not (own > 0 and target > 0):
            own = statistics.fmean(map(abs, self.predicted))
            target = statistics.fmean(map(abs, self.measured))
        return [value * target / own if own > 0 else value for value in self.predicted]

    def correlation(self) -> float | None:
        """Pearson's; None for fewer than three steps, or where one of the two does not vary."""
        if len(self.measured) < 3:
            return None
        try:
            return statistics.correlation(self.predicted, self.measured)
        except statistics.StatisticsError:
            return None

    def equal_signs(self) -> float:
        """Share of the steps in which both rise or both fall."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return statistics.fmean(float(each * other > 0) for each, other in pairs)


def accuracy_name(end: float) -> str:
    """The bucket of prompts whose share of solved completions is up to `end`."""
    if end == 0:
        return "never solved"
    return f"solved {_BUCKET_STARTS.get(end, '?')}-{100 * end:.0f} %"


def read_entropy(rows: Sequence[Row], coefficient: Sequence[float]) -> str:
    """How much entropy was spent."""
    start, end = first(rows, "entropy") or 0.0, latest(rows, "entropy") or 0.0
    text = f"Entropy {moved(start, end)} from {start:.3f} to {end:.3f} nats"
    share = consumed_text(rows)
    if share:
        text += f": {share}"
    if coefficient:
        text += f"; the coefficient went from {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    return f"{text}."


def read_entropy_of_outcomes(rows: Sequence[Row]) -> str:
    """Where the entropy fell most."""
    texts = []
    for name, key in (
        ("completions with a reward above 0", "entropy_reward_positive"),
        ("the other completions", "entropy_reward_other"),
    ):
        if numbers := values(rows, key):
            start, end = ends(numbers)
            texts.append(f"that of {name} {moved(start, end)} from {start:.3f} to {end:.3f} nats")
    text = "; ".join(texts)
    buckets = numbered(rows, "entropy_by_accuracy_")
    if len(buckets) > 1:
        last = {end: ends(values(rows, key))[1] for end, key in buckets}
        top, bottom = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
        comparison = (
            f"at the end prompts {accuracy_name(top)} have the most ({last[top]:.3f}),"
            f" those {accuracy_name(bottom)} the least ({last[bottom]:.3f})"
        )
        text = f"{text}; {comparison}" if text else comparison
    return f"Mean entropy: {text}." if text else "One group of prompts only."


def read_entropy_histogram(shares_by_step: Sequence[tuple[float, Sequence[float]]]) -> str:
    """How many tokens are nearly certain, and how many are forks."""
    texts = [
        f"{percent(shares[0], 1)} of the tokens are under 0.05 nats and"
        f" {percent(shares[-1], 1)} above 1.2 in step {step:.0f}"
        for step, shares in (shares_by_step[0], shares_by_step[-1])[: len(shares_by_step)]
    ]
    return f"{'; '.join(texts)}."


def read_entropy_positions(
    start: Sequence[tuple[int, float]], end: Sequence[tuple[int, float]]
) -> str:
    """Which part of the completion lost most entropy; pairs of tenth and mean."""
    if not start or not end:
        return "No position has a value."
    before, after = dict(start), dict(end)
    falls = {place: before[place] - after[place] for place in before.keys() & after.keys()}
    highest = max(after, key=after.__getitem__)
    text = f"At the end the entropy is highest in tenth {highest + 1} ({after[highest]:.3f} nats)"
    if falls and max(falls.values()) > 0:
        most = max(falls, key=falls.__getitem__)
        text += f"; it fell most in tenth {most + 1}, from {before[most]:.3f} to {after[most]:.3f}"
    return f"{text}."


def read_entropy_change(predictions: Sequence[Prediction]) -> str:
    """How well each prediction follows the measured change."""
    texts = []
    for each in predictions:
        r = each.correlation()
        follows = "no correlation (needs 3 steps)" if r is None else f"correlation {r:+.2f}"
        texts.append(f"{each.name}: {follows}, equal sign in {percent(each.equal_signs())}")
    steps = max(len(each.measured) for each in predictions)
    return f"Of {steps} measured step{'s' * (steps != 1)}, {'; '.join(texts)}."


def read_law(rows: Sequence[Row], num_points: int) -> str:
    """The law, what it leaves to gain and how sure that is, or why there is none."""
    row, text = law_row(rows), law_text(rows)
    if coefficients(row) is None:
        return f"{num_points} evaluated versions; the law is {text}."
    text = f"{text}, from {num_points} evaluated versions"
    floor = floor_score_text(row)
    if floor:
        text += f"; forecast at the floor: {floor}"
    slope = interval(row, "law_a")
    if slope is not None and slope[0] <= 0 <= slope[1]:
        text += (
            f"; the 95 % interval of a, {slope[0]:.3g} to {slope[1]:.3g}, includes 0: these points"
            " do not tell a law from none"
        )
    return f"{text}. The intervals take the points as independent."


def read_forecast(rows: Sequence[Row]) -> str:
    """Where the run stands between its first entropy and the floor."""
    row = law_row(rows)
    text = consumed_text(rows) or "Share consumed unknown"
    left, score = steps_left_text(row), floor_score_text(row)
    text += f"; to the floor: {left}" if left else "; no rate yet"
    text += f"; score there: {score}" if score else "; no score forecast: the law is not identified"
    rates = values(rows, "entropy_rate")
    rising = sum(rate >= 0 for rate in rates)
    if rising:
        text += f"; in {percent(rising / len(rates))} of the rows the entropy did not fall"
    return f"{text}."


def read_covariance(rows: Sequence[Row], keys: Sequence[tuple[float, str]]) -> str:
    """How far the tail of the covariance is from the rest."""
    percentile, key = keys[-1]
    name = "largest covariance" if percentile == 100 else f"{percentile:g} % percentile"
    text = f"In the last step the {name} is {latest(rows, key):.3g}"
    if len(keys) > 1 and (middle := next((key for p, key in keys if p == 50), None)):
        text += f", the median {latest(rows, middle):.2g}"
    return f"{text}."


def read_covariance_tops(rows: Sequence[Row], tops: Sequence[tuple[float, str]]) -> str:
    """Table 1 of the paper for this run, with the paper's own numbers."""
    texts = [
        f"{'all' if share == 100 else f'top {share:g} %'} {first(rows, key):.3g}"
        f" -> {latest(rows, key):.3g}" + (f" ({_TABLE_1[share]:g})" if share in _TABLE_1 else "")
        for share, key in tops
    ]
    return (
        f"Mean covariance, first -> last step (in brackets Table 1 of arXiv 2505.22617, Qwen2.5-7B"
        f" at its first step): {', '.join(texts)}."
    )


def read_covariance_by_accuracy(rows: Sequence[Row], buckets: Sequence[tuple[float, str]]) -> str:
    """Which prompts push the entropy down."""
    texts = []
    if responses := values(rows, "covariance_response"):
        start, end = ends(responses)
        texts.append(f"over all prompts it {moved(start, end)} from {start:.2g} to {end:.2g} nats")
    means = {end: statistics.fmean(values(rows, key)) for end, key in buckets}
    if means:
        top = max(means, key=means.__getitem__)
        texts.append(f"it is largest for prompts {accuracy_name(top)}: {means[top]:.2g} on average")
    return (
        "Covariance of a completion's mean log-probability with its probability times advantage;"
        f" above 0 it lowers the entropy: {'; '.join(texts)}."
    )


def read_selection(rows: Sequence[Row]) -> str:
    """How much of the quota was used, and what was selected."""
    selected, quota = sum(values(rows, "selected_tokens")), sum(values(rows, "selected_quota"))
    text = f"{selected:,.0f} tokens were selected"
    if quota > 0:
        text += f", {percent(selected / quota)} of the quota"
    tokens = sum(values([row for row in rows if "selected_tokens" in row], "tokens"))
    if tokens > 0:
        text += f" and {percent(selected / tokens, 3)} of all tokens"
    if selected > 0:
        negative = _weighted(rows, "selected_negative_advantage_fraction")
        probability = _weighted(rows, "selected_probability_mean")
        if negative is not None:
            text += f"; {percent(negative)} of them have A < 0"
        if probability is not None:
            text += f"; their mean probability is {probability:.2g}"
    return f"{text}."


def _weighted(rows: Sequence[Row], key: str) -> float | None:
    """Mean over the selected tokens of all steps."""
    counts, means = series(rows, key, by="selected_tokens")
    total = sum(counts)
    if not total > 0:
        return None
    return sum(count * mean for count, mean in zip(counts, means, strict=True)) / total
