"""How a key of another project becomes one of ours: by name, by value, or by a switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NO_DUAL_CLIP = 1e9
"""Above every importance ratio that the loss can meet, so a dual clip there never binds."""


def _same(value: Any) -> Any:
    return value


def _nothing(value: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Alias:
    """A foreign key that means one of ours.

    Attributes:
        key: ours, as `section.key`.
        convert: the foreign value to ours; a ValueError says why there is none.
        note: what the conversion does, for the notice.
        implies: keys of ours that follow from the foreign value and that nothing may set otherwise.
        suggests: keys of ours that follow where nothing else sets them.
    """

    key: str
    convert: Callable[[Any], Any] = _same
    note: str = ""
    implies: Callable[[Any], Mapping[str, Any]] = _nothing
    suggests: Callable[[Any], Mapping[str, Any]] = _nothing


@dataclass(frozen=True, slots=True)
class Switch:
    """A foreign true or false that decides whether its neighbours mean anything.

    Attributes:
        on, off: keys of ours that true and false set.
        governs: neighbours, in the same table, that a false leaves without effect.
        defaults: keys of ours that true sets unless the file does: the other project's defaults.
        remedy: what to write instead of false, if that has no counterpart.
    """

    on: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    governs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""


def one_of(names: Mapping[Any, Any], refused: Mapping[Any, str] | None = None) -> Any:
    """A conversion by a table; values outside it stay, and are refused as ours would be."""

    def convert(value: Any) -> Any:
        if isinstance(value, str | bool):
            if refused and value in refused:
                raise ValueError(refused[value])
            return names.get(value, value)
        return value

    return convert


def both_sides(value: Any) -> Mapping[str, Any]:
    """The upper clip, where one number gives both."""
    return {"policy_loss.clip_ratio_high": value}


def without_dual_clip(value: Any) -> Mapping[str, Any]:
    """SkyRL's `regular` loss has none, its `dual_clip` has."""
    return {"policy_loss.clip_ratio_c": NO_DUAL_CLIP} if value == "regular" else {}


def bonus(value: Any) -> Mapping[str, Any]:
    """A coefficient above 0 is, without another method, that of a plain bonus."""
    return {"entropy.method": "bonus"} if value else {}


def always(key: str, chosen: str) -> Callable[[Any], Mapping[str, Any]]:
    """Whatever the value, this key of ours is so."""
    return lambda value: {key: chosen}


def percent(value: Any) -> Any:
    """A percentage as a share, without the last digits that dividing leaves."""
    return round(value / 100, 15) if isinstance(value, int | float) else value


def two_later(value: Any) -> Any:
    """`step > value` counted from 0 is `step >= value + 2` counted from 1."""
    return value + 2 if isinstance(value, int) else value
