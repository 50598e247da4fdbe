"""Numbers in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float, digits: int = 0) -> str:
    """A share of one as `32 %`."""
    return f"{100 * share:.{digits}f} %"


def moved(start: float, end: float) -> str:
    """`rose`, `fell`, or `stayed`, to go before `from ... to ...`."""
    return "rose" if end > start else "fell" if end < start else "stayed,"
