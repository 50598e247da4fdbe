"""What a PromQL expression names, read without a parser: enough to find what does not exist.

Whether it is PromQL at all is for `make alerts` to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_DURATION = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_SELECTOR = re.compile(r"(?<![\w.:])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w)(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "inf", "nan"}


@dataclass(frozen=True, slots=True)
class Selector:
    """A series that an expression asks for.

    Attributes:
        matchers: label and what it is compared with, a text or a pattern.
    """

    metric: str
    matchers: Mapping[str, str]


def selectors(expression: str) -> list[Selector]:
    """The series that are asked for, in order."""
    bare = _DURATION.sub("", _GROUPING.sub("", expression))
    return [
        Selector(found[1], dict(_MATCHER.findall(found[2] or "")))
        for found in _SELECTOR.finditer(bare)
        if found[1].lower() not in _WORDS
    ]


def grouping_labels(expression: str) -> set[str]:
    """The labels that series are grouped by or joined on."""
    return {
        label.strip()
        for labels in _GROUPING.findall(expression)
        for label in labels.split(",")
        if label.strip()
    }


def kept_labels(expression: str) -> set[str]:
    """The labels by which the expression sums, the only ones that its result can have."""
    return {
        label.strip()
        for labels in re.findall(r"\bby\s*\(([^()]*)\)", expression)
        for label in labels.split(",")
    }
