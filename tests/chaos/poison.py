"""Entries that no service can make anything of, and those that are not of this run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from shared.codec import (
    decode_prompt_group,
    decode_rollout_group,
    decode_scored_group,
    encode_prompt_group,
    encode_rollout_group,
    encode_scored_group,
)
from shared.errors import StreamError
from shared.stream import PROMPTS, ROLLOUTS, SCORED
from tests.factories import make_prompt, make_scored

GARBAGE = "random bytes"
TRUNCATED = "a message cut short"
FOREIGN = "a group of another run"
POISONS = (GARBAGE, TRUNCATED, FOREIGN)

_GARBAGE_BYTES = 400


@dataclass(frozen=True, slots=True)
class Poison:
    """One entry; `is_dead` if it must end as a dead letter, else it is dropped by the learner."""

    kind: str
    stream: str
    payload: bytes

    @property
    def is_dead(self) -> bool:
        return self.kind != FOREIGN


def brew(kind: str, stream: str, random: Random) -> Poison:
    """A poison of that kind for that stream; no two are equal."""
    if kind == GARBAGE:
        return Poison(kind, stream, b"\xff" + random.randbytes(_GARBAGE_BYTES))
    payload = _group(stream, random.randrange(2**31))
    if kind == TRUNCATED:
        return Poison(kind, stream, _cut_short(stream, payload))
    return Poison(kind, stream, payload)


def _group(stream: str, index: int) -> bytes:
    run_id = "another-run"
    scored = make_scored(index, run_id=run_id)
    match stream:
        case "prompts":
            return encode_prompt_group(make_prompt(index, run_id=run_id))
        case "rollouts":
            return encode_rollout_group(scored.rollout)
        case _:
            return encode_scored_group(scored)


def _cut_short(stream: str, payload: bytes) -> bytes:
    """Its longest beginning, of at most two thirds, that cannot be read."""
    decode: Callable[[bytes], object] = {
        PROMPTS: decode_prompt_group,
        ROLLOUTS: decode_rollout_group,
        SCORED: decode_scored_group,
    }[stream]
    for length in range(len(payload) * 2 // 3, 0, -1):
        try:
            decode(payload[:length])
        except StreamError:
            return payload[:length]
    raise AssertionError("every beginning of a group can be read")
