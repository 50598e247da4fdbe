"""One sentence on each figure of the run, computed from what it shows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from services.cli.measurements import Row, number, values
from services.cli.summary import difference_error
from services.cli.words import moved, percent

WINDOW = 10
"""Steps that a first and a last mean are over."""


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


def read_lengths(rows: Sequence[Row]) -> str:
    """How the lengths moved, and how many completions were cut off."""
    texts = []
    for name in ("correct", "incorrect"):
        lengths = values(rows, f"completion_length_{name}")
        if lengths:
            start, end = ends(lengths)
            texts.append(f"{name} ones {moved(start, end)} from {start:.1f} to {end:.1f} tokens")
    text = f"The completions' mean length: {', '.join(texts)}"
    truncated = values(rows, "truncated_fraction")
    if truncated:
        start, end = ends(truncated)
        text += f"; cut off at the limit were {percent(start, 1)} at first, {percent(end, 1)} last"
    return f"{text}."


def read_mismatch(rows: Sequence[Row]) -> str:
    """How off-policy the training is."""
    texts = []
    for name, key in (
        ("mismatch KL", "mismatch_kl"),
        ("KL of an update", "update_kl"),
        ("KL to the reference", "reference_kl"),
    ):
        numbers = values(rows, key)
        if numbers:
            middle, top = statistics.median(numbers), max(numbers)
            texts.append(f"the median {name} is {middle:.2g} nats, the largest {top:.2g}")
    lowest, highest = values(rows, "ratio_min"), values(rows, "ratio_max")
    if highest:
        span = f"{min(lowest):.3g} to {max(highest):.3g}" if lowest else f"up to {max(highest):.3g}"
        texts.append(f"the ratio went {'from ' if lowest else ''}{span}")
    cut = [
        f"{percent(statistics.fmean(shares), 2)} at the {side} bound"
        for side in ("low", "high")
        if (shares := values(rows, f"clip_fraction_{side}"))
    ]
    if cut:
        texts.append(f"the ratio was clipped in {' and '.join(cut)} of the tokens on average")
    sizes = values(rows, "importance_weight_ess")
    if sizes:
        texts.append(f"the effective sample was {percent(min(sizes), 1)} of the tokens at least")
    text = "; ".join(texts) or "no distance was measured"
    return f"{text[0].upper()}{text[1:]}."


def ends(numbers: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last steps, of which there is at least one."""
    window = max(1, min(WINDOW, len(numbers) // 2))
    return statistics.fmean(numbers[:window]), statistics.fmean(numbers[-window:])
