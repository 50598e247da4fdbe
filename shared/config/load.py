"""Read a run file; say what is wrong with it in one line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared.config.aliases import read_aliases
from shared.config.notices import notices
from shared.config.run import RunConfig
from shared.errors import ConfigError

Notices = tuple[str, ...]
"""Lines worth a look before the run starts: foreign spellings, unusual choices."""


def load_run(path: Path) -> RunConfig:
    """The validated run file at `path`.

    Raises:
        ConfigError: unreadable, not TOML, or refused; one line naming key, value and remedy.
    """
    return load_run_with_notices(path)[0]


def load_run_with_notices(path: Path) -> tuple[RunConfig, Notices]:
    """As `load_run`, with what a person should be told about the file.

    Raises:
        ConfigError: as `load_run`.
    """
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a run file"
        ) from None
    try:
        return parse_run_with_notices(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_run(text: str) -> RunConfig:
    """The validated run file with this TOML text.

    Raises:
        ConfigError: as `load_run`.
    """
    return parse_run_with_notices(text)[0]


def parse_run_with_notices(text: str) -> tuple[RunConfig, Notices]:
    """As `parse_run`, with what a person should be told about the file.

    Raises:
        ConfigError: as `load_run`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    ours, readings = read_aliases(document, sections=frozenset(RunConfig.model_fields))
    try:
        config = RunConfig.model_validate(ours)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None
    return config, readings + notices(config)


def _explain(error: ErrorDetails) -> str:
    """One line of `key = value: what is wrong; remedy`."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "missing":
        return f"{key}: is missing; add it"
    if error["type"] == "extra_forbidden":
        return f"{key} = {error['input']!r}: unknown key; {_suggestion(location)}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], Mapping):
        return f"{key}: {error['msg']}"
    return f"{key} = {error['input']!r}: {error['msg'].lower()}"


def _suggestion(location: Sequence[str]) -> str:
    """The nearest known key of the section an unknown key was found in."""
    known = list(_section_at(location[:-1]).model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _section_at(location: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in location:
        section = _model_of(section.model_fields[name].annotation)
    return section


def _model_of(annotation: Any) -> type[BaseModel]:
    """The model in `Model` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models: list[type[BaseModel]] = [
        part for part in annotation.__args__ if issubclass(part, BaseModel)
    ]
    return models[0]
