"""Drafts against the plainest form of the same thing: a list of tokens, each with its version."""

from __future__ import annotations

import random
from array import array

import pytest

from services.rollout.draft import Draft, GroupDraft
from shared.partials import Piece, append_runs
from shared.records import Completion, VersionRun
from tests.factories import make_prompt

Token = tuple[int, int]
"""Id and policy version."""


def completion_of(tokens: list[Token], *, is_truncated: bool = False) -> Completion:
    runs: list[VersionRun] = []
    append_runs(runs, [VersionRun(version, 1) for _, version in tokens])
    ids = [id for id, _ in tokens]
    return Completion(array("I", ids), array("f", [-id for id in ids]), tuple(runs), is_truncated)


def confirmed_of(tokens: list[Token], num_restored: int, confirmed: set[int]) -> int:
    for place, (_, version) in enumerate(tokens):
        if place >= num_restored and version not in confirmed:
            return place
    return len(tokens)


@pytest.mark.parametrize("seed", range(30))
def test_a_draft_is_the_tokens_that_were_put_into_it(seed: int) -> None:
    draw = random.Random(seed)
    version = 0

    def some() -> list[Token]:
        nonlocal version
        found = []
        for _ in range(draw.randint(1, 6)):
            version += draw.random() < 0.3
            found.append((draw.randrange(1 << 31), version))
        return found

    tokens = some()
    num_restored = len(tokens)
    draft = Draft()
    draft.restore(completion_of(tokens), is_complete=False)
    for _ in range(20):
        if draw.random() < 0.7:
            more = some()
            tokens += more
            draft.extend(completion_of(more))
        else:
            count = draw.randint(0, len(tokens) + 2)
            del tokens[count:]
            num_restored = min(num_restored, count)
            draft.cut(count)
        assert len(draft) == len(tokens)
        confirmed = {each for each in range(version + 1) if draw.random() < 0.7}
        assert draft.num_confirmed(confirmed) == confirmed_of(tokens, num_restored, confirmed)
        assert draft.versions_sampled_here() == {each for _, each in tokens[num_restored:]}
        if tokens:
            start = draw.randrange(len(tokens))
            stop = draw.randint(start + 1, len(tokens))
            assert draft.piece(start, stop) == completion_of(tokens[start:stop])


def test_only_the_last_piece_of_a_truncated_completion_says_so() -> None:
    draft = Draft()
    draft.complete(completion_of([(1, 0), (2, 0), (3, 0)], is_truncated=True), start=0)
    assert draft.is_complete
    assert [draft.piece(0, stop).is_truncated for stop in (1, 2, 3)] == [False, False, True]
    draft.cut(2)
    assert not draft.is_complete and not draft.piece(0, 2).is_truncated


def test_the_whole_of_a_request_stands_in_place_of_what_was_read_of_it() -> None:
    tokens = [(id, 0) for id in range(5)]
    draft = Draft()
    draft.extend(completion_of(tokens[:2]))
    draft.read = lambda: completion_of(tokens[2:3])
    draft.catch_up()
    assert len(draft) == 3
    draft.complete(completion_of(tokens[2:]), start=2)
    assert draft.piece(0, 5) == completion_of(tokens)


@pytest.mark.parametrize(
    ("kept", "is_complete"),
    [
        (completion_of([(4, 0), (9, 0)]), True),
        (completion_of([(9, 0), (4, 0)]), False),
        (completion_of([(4, 0)], is_truncated=True), True),
    ],
    ids=["ends with a stop token", "does not", "ends at its limit"],
)
def test_what_was_saved_whole_is_complete(kept: Completion, is_complete: bool) -> None:
    draft = GroupDraft(make_prompt(group_size=1), stop_token_ids=(9,))
    draft.restore({0: kept, 7: kept})
    assert draft.is_complete is is_complete
    assert draft.completions() == (kept,)


def test_only_what_the_store_lacks_is_to_be_saved() -> None:
    draft = GroupDraft(make_prompt(group_size=2), stop_token_ids=())
    draft.drafts[0].extend(completion_of([(1, 0), (2, 0), (3, 1)]))
    assert draft.num_unsaved({0}) == 2
    pieces = draft.unsaved({0})
    assert pieces == [Piece(0, 0, completion_of([(1, 0), (2, 0)]))]
    draft.mark_saved(pieces, num_cuts=0)
    assert draft.unsaved({0}) == [] and not draft.is_saved_too_far({0})
    assert draft.unsaved({0, 1}) == [Piece(0, 2, completion_of([(3, 1)]))]
    assert draft.is_saved_too_far({1})
    draft.mark_dropped()
    assert not draft.is_saved_too_far({1})


def test_a_save_that_was_under_way_when_tokens_were_forgotten_is_in_doubt() -> None:
    draft = GroupDraft(make_prompt(group_size=1), stop_token_ids=())
    draft.drafts[0].extend(completion_of([(1, 0), (2, 1)]))
    pieces, num_cuts = draft.unsaved({0, 1}), draft.num_cuts
    draft.cut({0})
    draft.drafts[0].extend(completion_of([(3, 2), (4, 2)]))
    draft.mark_saved(pieces, num_cuts=num_cuts)
    assert draft.is_saved_too_far({0, 2}), "the store has token 2 where the draft has 3"
    draft.mark_dropped()
    assert draft.unsaved({0, 2}) == [Piece(0, 0, completion_of([(1, 0), (3, 2), (4, 2)]))]
