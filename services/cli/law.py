"""What the rows say of the entropy law, R = -a exp(H) + b, and of its forecast, in words.

The learner writes both into every row. While the points do not identify the law, what depends on
it is null; how much entropy is consumed and how fast it falls is known all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.cli.measurements import Row, first, latest, number
from services.cli.words import percent

Interval = tuple[float, float]


def law_row(rows: Sequence[Row]) -> Row:
    """The newest row with the law's keys, whether or not it was identified; {} without one."""
    return next((row for row in reversed(rows) if "law_a" in row), {})


def coefficients(row: Row) -> tuple[float, float] | None:
    """a and b, if the points identified them."""
    a, b = number(row, "law_a"), number(row, "law_b")
    return None if a is None or b is None else (a, b)


def interval(row: Row, key: str) -> Interval | None:
    """The 95 % interval of law_a or law_ceiling."""
    low, high = number(row, f"{key}_low"), number(row, f"{key}_high")
    return None if low is None or high is None else (low, high)


def law_text(rows: Sequence[Row]) -> str:
    """The fitted law with its ceiling and their precision, or why there is none."""
    row = law_row(rows)
    fitted = coefficients(row)
    if fitted is None:
        return f"not identifiable ({_why_not(row)})"
    a, b = fitted
    text = f"R = {-a:.4g} exp(H) + {b:.4g}, {_ceiling_or_none(row)}"
    r2 = number(row, "law_r2")
    return text if r2 is None else f"{text}, R² {r2:.2f}"


def ceiling_text(row: Row) -> str:
    """`0.712 (95 %: 0.690 to 0.735)`; empty while the law is not identified or has no ceiling."""
    ceiling = number(row, "law_ceiling")
    if ceiling is None or not has_ceiling(row):
        return ""
    span = interval(row, "law_ceiling")
    return f"{ceiling:.3f}" + (f" (95 %: {span[0]:.3f} to {span[1]:.3f})" if span else "")


def has_ceiling(row: Row) -> bool:
    """Whether the score rises as the entropy falls: with a <= 0 the law bounds nothing."""
    return (number(row, "law_a") or 0.0) > 0


def consumed_text(rows: Sequence[Row]) -> str:
    """The share of the entropy that is spent, down to the floor if the rows say that."""
    share = number(law_row(rows), "entropy_consumed")
    if share is not None:
        return f"{percent(share)} of what is above the floor consumed"
    start, end = first(rows, "entropy"), latest(rows, "entropy")
    if start is None or end is None or not 0 < end < start:
        return ""
    return f"{percent((start - end) / start)} consumed"


def floor_score_text(row: Row) -> str:
    """`0.702 at H = 0.02 nats, +0.051 from now`; empty while the law is not identified."""
    score, gain = number(row, "law_score_at_floor"), number(row, "law_gain_left")
    if score is None:
        return ""
    floor = number(row, "law_floor")
    text = f"{score:.3f}" + ("" if floor is None else f" at H = {floor:.3g} nats")
    return text if gain is None else f"{text}, {gain:+.3f} from now"


def steps_left_text(row: Row) -> str:
    """How far the floor is at the present rate; empty while no rate is known."""
    rate, left = number(row, "entropy_rate"), number(row, "law_steps_left")
    if rate is None:
        return ""
    if left is None:
        return f"not reached at {rate:+.2g} nats a step"
    if left == 0:
        return "0, the entropy is at it"
    return f"about {left:,.0f} steps at {rate:+.2g} nats a step"


def law_parts(row: Row) -> list[str]:
    """Where the law stands, as parts of a line; empty texts for what is not known."""
    if not row:
        return []
    consumed, left = number(row, "entropy_consumed"), number(row, "law_steps_left")
    score = number(row, "law_score_at_floor")
    if coefficients(row) is None:
        law = _not_yet_text(row)
    else:
        law = f"ceiling {ceiling_text(row)}" if has_ceiling(row) else "law: no ceiling"
    return [
        "" if consumed is None else f"consumed {percent(consumed)}",
        law,
        "" if score is None else f"at the floor {score:.3f}",
        "" if left is None else f"{left:.0f} steps to the floor",
    ]


def law_lines(row: Row) -> list[tuple[str, str, str]]:
    """Where the law stands, as lines of a table: name, figure and what qualifies it."""
    if not row:
        return []
    consumed, left = number(row, "entropy_consumed"), steps_left_text(row)
    share = "" if consumed is None else percent(consumed)
    lines = [("entropy consumed", share, f"floor: {left}" if left else "")]
    ceiling, span = number(row, "law_ceiling"), interval(row, "law_ceiling")
    score, gain = number(row, "law_score_at_floor"), number(row, "law_gain_left")
    if coefficients(row) is None:
        return [*lines, ("score ceiling", "?", _not_yet_text(row))]
    if ceiling is None or not has_ceiling(row):
        lines.append(("score ceiling", "none", "the score fell with the entropy"))
    else:
        bounds = f"95 % interval {span[0]:.3f} to {span[1]:.3f}" if span else ""
        lines.append(("score ceiling", f"{ceiling:.3f}", bounds))
    if score is not None:
        ahead = "" if gain is None else f"{gain:+.3f} from now"
        lines.append(("score at the floor", f"{score:.3f}", ahead))
    return lines


def _not_yet_text(row: Row) -> str:
    """`law not identifiable yet (2 points)`."""
    return f"law not identifiable yet ({_points(row)})"


def _ceiling_or_none(row: Row) -> str:
    if not has_ceiling(row):
        return "no ceiling: the score fell with H"
    text = ceiling_text(row)
    return f"ceiling {text}" if text else "ceiling unknown"


def _why_not(row: Row) -> str:
    needs = "needs 3 evaluations at entropies that differ"
    if not row:
        return needs
    condition = number(row, "law_condition")
    spelled = "infinite" if condition is None else f"{condition:.3g}"
    return f"{_points(row)}, condition number {spelled}; {needs}"


def _points(row: Row) -> str:
    count = number(row, "law_points") or 0.0
    return "1 point" if count == 1 else f"{count:.0f} points"
