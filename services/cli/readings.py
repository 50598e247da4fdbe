"""One sentence on each figure, computed from what it shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from services.cli.measurements import Row, first, latest, number, values
from services.cli.summary import difference_error, law_text
from services.cli.words import moved, percent

WINDOW = 10
"""Steps that a first and a last mean are over."""

Course = tuple[list[float], list[float]]
"""Steps, and a value for each."""


def read_reward(rewards: Sequence[float]) -> str:
    """The course of the training reward."""
    if not rewards:
        return ""
    window = min(WINDOW, max(1, len(rewards) // 2))
    if len(rewards) == 1:
        return f"The mean training reward of the only step is {rewards[0]:.3f}."
    before, after = statistics.fmean(rewards[:window]), statistics.fmean(rewards[-window:])
    return (
        f"The mean training reward {moved(before, after)} from {before:.3f} to {after:.3f} (means"
        f" of the first and last {window} steps)."
    )


def read_evaluation(scored: Sequence[Row]) -> str:
    """The course of the evaluation score, and whether it is more than noise."""
    if not scored:
        return "No evaluation finished."
    start, end = number(scored[0], "eval_score") or 0.0, number(scored[-1], "eval_score") or 0.0
    if len(scored) == 1:
        return f"The only evaluation scored {start:.3f}."
    text = f"The evaluation score {moved(start, end)} from {start:.3f} to {end:.3f}"
    how, error = difference_error(scored[0], scored[-1])
    return f"{text}, {(end - start) / error:+.1f} standard errors ({how})." if error else f"{text}."


def read_entropy(rows: Sequence[Row], coefficient: Sequence[float]) -> str:
    """How much entropy was spent."""
    start, end = first(rows, "entropy") or 0.0, latest(rows, "entropy") or 0.0
    text = f"Entropy {moved(start, end)} from {start:.3f} to {end:.3f} nats"
    if 0 < end < start:
        text += f": {percent((start - end) / start)} consumed"
    if coefficient:
        text += f"; the coefficient went from {coefficient[0]:.2g} to {coefficient[-1]:.2g}"
    return f"{text}."


def read_covariance(rows: Sequence[Row], keys: Sequence[tuple[float, str]]) -> str:
    """How far the tail of the covariance is from the rest."""
    percentile, key = keys[-1]
    name = "largest covariance" if percentile == 100 else f"{percentile:g} % percentile"
    text = f"In the last step the {name} is {latest(rows, key):.3g}"
    tops = numbered(rows, "covariance_top_")
    mean = latest(rows, "covariance_mean")
    if tops and mean:
        share, top_key = tops[0]
        top = latest(rows, top_key) or 0.0
        text += (
            f"; the top {share:g} % of tokens have a mean of {top:.3g}, that of all is {mean:.2g}"
        )
    return f"{text}."


def read_law(rows: Sequence[Row], num_points: int) -> str:
    """The law, or why there is none."""
    text = law_text(rows)
    if text.startswith("not"):
        return f"{num_points} evaluated versions; the law is {text}."
    text = f"{text}, from {num_points} evaluated versions"
    ceiling, score = latest(rows, "law_ceiling"), latest(rows, "eval_score")
    if ceiling is not None and score is not None and ceiling > score:
        text += f"; {ceiling - score:.3f} of score is left to the ceiling"
    return f"{text}."


def read_balance(
    phases: Sequence[tuple[str, str, str]],
    parts: Sequence[Sequence[float]],
    whole: Sequence[float],
    timed: Sequence[Row],
) -> str:
    """What the learner spends its time on; `phases` and `parts` go together."""
    total = sum(whole) or 1.0
    shares = [
        f"{name} {percent(sum(part) / total)}"
        for (_, name, _), part in zip(phases, parts, strict=True)
    ]
    text = f"Of {total / len(whole):.2f} s per step the learner {', '.join(shares)} of the time"
    pauses = values(timed, "pause_seconds")
    if pauses:
        text += f"; an update pauses the replicas for {statistics.median(pauses):.3f} s (median)"
    return f"{text}."


def read_mismatch(mismatch: Sequence[float], clipped: Mapping[str, Course]) -> str:
    """How off-policy the training is; `clipped` has steps and shares by side."""
    texts = []
    if mismatch:
        texts.append(
            f"The median mismatch KL is {statistics.median(mismatch):.2g} nats, the largest"
            f" {max(mismatch):.2g}"
        )
    means = [
        f"{percent(statistics.fmean(shares), 2)} at the {side} bound"
        for side, (_, shares) in clipped.items()
        if shares
    ]
    if means:
        texts.append(f"the ratio was clipped in {' and '.join(means)} of the tokens on average")
    text = "; ".join(texts)
    return f"{text[0].upper()}{text[1:]}."


def numbered(rows: Sequence[Row], prefix: str) -> list[tuple[float, str]]:
    """Keys such as covariance_p99_8 that have a value, with their numbers, rising."""
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    found = []
    for key in keys:
        try:
            found.append((float(key.removeprefix(prefix).replace("_", ".")), key))
        except ValueError:
            continue
    return sorted((percentile, key) for percentile, key in found if values(rows, key))
