"""Poison is poison, and what is left in the streams is told from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

import pytest

from shared.codec import decode_prompt_group, decode_rollout_group, decode_scored_group
from shared.dead_letters import DeadLetter, encode_dead_letter
from shared.errors import StreamError
from tests.chaos.faults import FAULTS, deal
from tests.chaos.poison import FOREIGN, GARBAGE, POISONS, TRUNCATED, Poison, brew
from tests.chaos.reckoning import reckon_streams

DECODERS = {
    "prompts": decode_prompt_group,
    "rollouts": decode_rollout_group,
    "scored": decode_scored_group,
}
EMPTY: dict[str, Sequence[bytes]] = {name: [] for name in DECODERS}


def buried(poison: Poison) -> bytes:
    letter = DeadLetter(poison.stream, "not a group", 1, poison.payload, time.time())
    return encode_dead_letter(letter)


@pytest.mark.parametrize("stream", DECODERS)
@pytest.mark.parametrize("kind", [GARBAGE, TRUNCATED])
def test_a_deadly_poison_cannot_be_read(kind: str, stream: str) -> None:
    for seed in range(20):
        with pytest.raises(StreamError):
            DECODERS[stream](brew(kind, stream, Random(seed)).payload)


@pytest.mark.parametrize("stream", DECODERS)
def test_a_group_of_another_run_can_be_read(stream: str) -> None:
    poison = brew(FOREIGN, stream, Random(1))
    assert not poison.is_dead
    assert DECODERS[stream](poison.payload)


def test_dead_letters_that_are_the_poison_are_as_they_should_be() -> None:
    poison = [brew(kind, stream, Random(2)) for kind in POISONS for stream in DECODERS]
    letters = [buried(each) for each in poison if each.is_dead]
    findings = list(reckon_streams({**EMPTY, "dead_letter": letters}, poison))
    assert [each.what for each in findings if not each.holds] == []


def test_a_poison_that_is_nowhere_is_found() -> None:
    poison = [brew(GARBAGE, stream, Random(3)) for stream in DECODERS]
    letters = [buried(each) for each in poison[1:]]
    findings = reckon_streams({**EMPTY, "dead_letter": letters}, poison)
    assert [each.holds for each in findings] == [True, False]


def test_a_dead_letter_that_nobody_injected_is_found_with_its_reason() -> None:
    stranger = buried(brew(GARBAGE, "rollouts", Random(4)))
    *_, letters = reckon_streams({**EMPTY, "dead_letter": [stranger]}, [])
    assert not letters.holds
    assert "rollouts: not a group" in letters.found


def test_an_entry_that_is_left_over_is_found() -> None:
    streams, _ = reckon_streams({**EMPTY, "scored": [b"x"], "dead_letter": []}, [])
    assert not streams.holds
    assert streams.found == "{'scored': 1}"


def test_every_kind_of_fault_is_dealt_before_one_comes_again_and_a_seed_gives_one_order() -> None:
    kinds, number = list(FAULTS), len(FAULTS)
    first, again, other = (deal(kinds, Random(seed)) for seed in (1, 1, 2))
    dealt = [next(first) for _ in range(2 * number)]
    assert sorted(dealt[:number]) == sorted(dealt[number:]) == sorted(kinds)
    assert dealt == [next(again) for _ in range(2 * number)]
    assert dealt != [next(other) for _ in range(2 * number)]
