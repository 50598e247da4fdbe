"""The base of every section of the run file, and the field types they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen table of the run file; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""

Index = Annotated[int, Field(ge=0)]
"""A number of things that may be zero."""

Seconds = Annotated[float, Field(gt=0)]
"""A duration in seconds."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share between 0 and 1; never a percentage."""

Port = Annotated[int, Field(ge=0, le=65535)]
"""A TCP port; 0 takes a free one."""
