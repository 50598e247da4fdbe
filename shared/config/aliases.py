"""Run files that use another project's spelling, read as if they used ours.

verl's names are ours, but its recipes nest them deeper, and other projects have names of their
own. Whatever is read as something else is said in a notice, one line for each key.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.config.section import spelled
from shared.config.spellings import ALIASES, SWITCHES, VALUES
from shared.errors import ConfigError

Document = dict[str, Any]


def read_aliases(
    document: Document, *, sections: frozenset[str]
) -> tuple[Document, tuple[str, ...]]:
    """The document in our spelling, and a notice for each key or value that was in another.

    Args:
        document: parsed TOML; left as it is.
        sections: names of our own tables.
    Raises:
        ConfigError: a key of ours is set twice, a value has no counterpart, or a table of another
            project holds a key that has none.
    """
    reading = _Reading(document)
    for path, value in _leaves(document):
        reading.take(path, value)
    reading.settle()
    _refuse_leftovers(reading.document, sections)
    return reading.document, tuple(each.notice() for each in reading.taken)


@dataclass(slots=True)
class _Taken:
    """A foreign key or value, and the keys of ours that it has set."""

    path: str
    value: Any
    keys: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    implied: Mapping[str, Any] = field(default_factory=dict)
    suggested: Mapping[str, Any] = field(default_factory=dict)

    def notice(self) -> str:
        readings = ", ".join(f"{key} = {spelled(value)}" for key, value in self.keys.items())
        note = f" ({self.note})" if self.note else ""
        return f"{self.path} = {spelled(self.value)}: " + (
            f"read as {readings}{note}" if readings else f"sets nothing{note}"
        )


class _Reading:
    """A document on its way to our spelling."""

    def __init__(self, document: Document) -> None:
        self.document = copy.deepcopy(document)
        self.taken: list[_Taken] = []
        self._off = _paths_switched_off(document)

    def take(self, path: str, value: Any) -> None:
        """Read one leaf of the document."""
        if path in self._off:
            _remove(self.document, path)
            note = f"no effect with {self._off[path]} = false"
            self.taken.append(_Taken(path, value, note=note))
        elif path in ALIASES:
            self._take_alias(path, value)
        elif path in SWITCHES:
            self._take_switch(path, value)
        elif _is_foreign_value(path, value):
            ours = VALUES[path][value]
            _put(self.document, path, ours)
            self.taken.append(_Taken(path, value, {path: ours}))

    def settle(self) -> None:
        """Set what follows from what was read, as far as nothing else sets it."""
        for each in self.taken:
            self._refuse_otherwise(each)
            self._set_where_free(each, each.implied)
        for each in self.taken:
            self._set_where_free(each, each.suggested)

    def _take_alias(self, path: str, value: Any) -> None:
        alias = ALIASES[path]
        try:
            ours = alias.convert(value)
        except ValueError as error:
            raise ConfigError(f"{path} = {spelled(value)}: {error}") from None
        if _is_foreign_value(alias.key, ours):
            ours = VALUES[alias.key][ours]
        taken = _Taken(path, value, {}, alias.note, alias.implies(value), alias.suggests(value))
        self._replace(taken, {alias.key: ours})

    def _take_switch(self, path: str, value: Any) -> None:
        switch = SWITCHES[path]
        if not isinstance(value, bool):
            raise ConfigError(f"{path} = {spelled(value)}: must be true or false")
        if not value and switch.remedy:
            raise ConfigError(f"{path} = false: has no counterpart; {switch.remedy}")
        taken = _Taken(path, value, suggested=switch.defaults if value else {})
        self._replace(taken, switch.on if value else switch.off)

    def _replace(self, taken: _Taken, keys: Mapping[str, Any]) -> None:
        _remove(self.document, taken.path)
        for key, ours in keys.items():
            self._refuse_twice(taken, key)
            _put(self.document, key, ours)
            taken.keys[key] = ours
        self.taken.append(taken)

    def _refuse_twice(self, taken: _Taken, key: str) -> None:
        given = _get(self.document, key)
        if given is None:
            return
        others = (each.path for each in self.taken if key in each.keys)
        other = next(others, f"{key} = {spelled(given)}")
        raise ConfigError(
            f"{taken.path} = {spelled(taken.value)}: sets {key}, as {other} does; leave one out"
        )

    def _refuse_otherwise(self, taken: _Taken) -> None:
        for key, value in taken.implied.items():
            given = _get(self.document, key)
            if given not in (None, value):
                raise ConfigError(
                    f"{taken.path} = {spelled(taken.value)}: goes with {key} = {spelled(value)},"
                    f" not {spelled(given)}; leave one out"
                )

    def _set_where_free(self, taken: _Taken, keys: Mapping[str, Any]) -> None:
        for key, value in keys.items():
            if _get(self.document, key) is None:
                _put(self.document, key, value)
                taken.keys[key] = value


def _paths_switched_off(document: Document) -> dict[str, str]:
    """Paths that a switch in the document leaves without effect, and that switch."""
    off: dict[str, str] = {}
    for path, value in _leaves(document):
        if path in SWITCHES and value is False:
            table = path.rpartition(".")[0]
            names = SWITCHES[path].governs
            off |= {f"{table}.{name}" if table else name: path for name in names}
    return off


def _is_foreign_value(key: str, value: Any) -> bool:
    return isinstance(value, str) and value in VALUES.get(key, {})


def _refuse_leftovers(document: Document, sections: frozenset[str]) -> None:
    """Refuse what is left of other projects' tables; below our own, validation does."""
    known = [*ALIASES, *SWITCHES]
    foreign = {path.partition(".")[0] for path in known if "." in path} - sections
    for path, value in _leaves(document):
        if path.partition(".")[0] in foreign:
            close = difflib.get_close_matches(path, known, n=1, cutoff=0.8)
            remedy = f"did you mean {close[0]}?" if close else "it has no counterpart; leave it out"
            raise ConfigError(f"{path} = {spelled(value)}: unknown key; {remedy}")


def _leaves(table: Document, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of the document that is not a table, with its dotted path."""
    for name, value in table.items():
        if "." in name:  # Quoted in TOML, and so no path.
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _get(document: Document, path: str) -> Any:
    """What is there, None if nothing is; TOML has no null."""
    found: Any = document
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _put(document: Document, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    table = document.setdefault(section, {})
    if isinstance(table, dict):  # Else validation refuses the section.
        table[name] = value


def _remove(document: Document, path: str) -> None:
    """Take a value out, and the tables that are empty without it."""
    name, _, rest = path.partition(".")
    if not rest:
        del document[name]
        return
    _remove(document[name], rest)
    if not document[name]:
        del document[name]
