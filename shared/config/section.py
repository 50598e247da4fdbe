"""The base of every section of the run file, and the field types they share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from shared.records import MAX_GROUP_SIZE


class Section(BaseModel):
    """A frozen table of the run file; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""

GroupSize = Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE)]
"""Completions of one prompt."""

Index = Annotated[int, Field(ge=0)]
"""A number of things that may be zero."""

Seconds = Annotated[float, Field(gt=0)]
"""A duration in seconds."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share between 0 and 1; never a percentage."""

Nats = Annotated[float, Field(ge=0)]
"""An entropy."""

Port = Annotated[int, Field(ge=0, le=65535)]
"""A TCP port; 0 takes a free one."""


def spelled(value: Any) -> str:
    """The value as the run file spells it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def refuse_idle(section: Section, path: str, keys: Iterable[str], *, choice: str) -> None:
    """Refuse keys that the run file sets and nothing reads.

    Args:
        path: of the section, for the message.
        choice: the `key = value` that leaves them idle.
    Raises:
        ValueError: names the first of them.
    """
    for key in keys:
        if key in section.model_fields_set:
            raise ValueError(
                f"{path}.{key} = {spelled(getattr(section, key))}: has no effect with {choice};"
                " leave it out"
            )
