from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.ledger import Ledger


def make_ledger(num_problems: int = 5, seed: int = 1) -> Ledger:
    return Ledger(run_id="run", num_problems=num_problems, seed=seed)


def test_each_epoch_is_a_permutation_of_the_problems_and_no_two_are_alike() -> None:
    ledger = make_ledger(num_problems=50)
    uids = [ledger.issue_next() for _ in range(100)]
    first = [ledger.problem_index(uid) for uid in uids[:50]]
    second = [ledger.problem_index(uid) for uid in uids[50:]]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert {uid.epoch for uid in uids[:50]} == {0}
    assert {uid.epoch for uid in uids[50:]} == {1}


def test_the_order_is_the_seed_s() -> None:
    def order(seed: int) -> list[int]:
        ledger = make_ledger(num_problems=50, seed=seed)
        return [ledger.problem_index(ledger.issue_next()) for _ in range(50)]

    assert order(1) == order(1) != order(2)


def test_only_the_first_arrival_of_a_position_is_wanted() -> None:
    ledger = make_ledger()
    uid = ledger.issue_next()
    again = ledger.reissue(ledger.position(uid))
    assert again.attempt == 1
    assert ledger.is_wanted(uid)
    assert ledger.is_wanted(again)
    ledger.finish(ledger.position(uid))
    assert not ledger.is_wanted(again)


def test_a_group_of_another_run_is_not_wanted() -> None:
    ledger = make_ledger()
    ledger.issue_next()
    stranger = Ledger(run_id="other", num_problems=5, seed=1).issue_next()
    assert not ledger.is_wanted(stranger)


@given(
    st.permutations(range(20)),
    st.lists(st.sampled_from(["finish", "abandon", "skip"]), min_size=20, max_size=20),
)
def test_every_position_is_done_once_in_whatever_order_and_way(
    order: list[int], ways: list[str]
) -> None:
    ledger = make_ledger(num_problems=7)
    for _ in range(20):
        ledger.issue_next()
    for position in order:
        getattr(ledger, ways[position])(position)
        before = ledger.state_dict()
        for way in (ledger.finish, ledger.abandon, ledger.skip):
            with pytest.raises(KeyError):
                way(position)
        assert ledger.state_dict() == before
    assert ledger.num_outstanding == 0
    assert ledger.num_trained == ways.count("finish")
    assert ledger.num_skipped == ways.count("skip")
    assert len(ledger.abandoned) == ways.count("abandon")
    assert (ledger.frontier, ledger.done) == (20, set())


def test_what_was_replaced_is_counted_until_a_group_is_trained_on() -> None:
    ledger = make_ledger()
    for _ in range(5):
        ledger.issue_next()
    ledger.skip(3)
    ledger.skip(0)
    ledger.abandon(1)
    assert (ledger.num_replaced, ledger.num_skipped) == (2, 2)
    ledger.finish(2)
    assert (ledger.num_replaced, ledger.num_skipped) == (0, 2)
    ledger.skip(4)
    assert (ledger.num_replaced, ledger.num_skipped) == (1, 3)


def test_a_restored_ledger_goes_on_where_the_first_one_was() -> None:
    ledger = make_ledger()
    for _ in range(6):
        ledger.issue_next()
    ledger.finish(2)
    ledger.finish(0)
    ledger.skip(4)
    ledger.reissue(3)
    ledger.abandon(5)
    assert (ledger.fail(1), ledger.fail(1)) == (1, 2)
    restored = make_ledger()
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert restored == ledger
    assert restored.issue_next() == ledger.issue_next()


def test_a_checkpoint_from_before_dynamic_sampling_is_that_of_a_run_that_skipped_nothing() -> None:
    ledger = make_ledger()
    ledger.issue_next()
    ledger.finish(0)
    state = ledger.state_dict()
    del state["num_skipped"], state["num_replaced"]
    restored = make_ledger()
    restored.load_state_dict(state)
    assert restored == ledger


@pytest.mark.parametrize("other", [make_ledger(seed=2), make_ledger(num_problems=6)])
def test_a_ledger_of_another_run_is_refused(other: Ledger) -> None:
    with pytest.raises(ValueError, match="the ledger has"):
        make_ledger().load_state_dict(other.state_dict())


def test_after_a_crash_what_the_streams_hold_is_adopted_and_only_the_rest_is_missing() -> None:
    before = make_ledger()
    held = [before.issue_next() for _ in range(4)]
    after = make_ledger()
    for _ in range(2):
        after.issue_next()
    after.finish(0)
    after.adopt([held[0], held[3]])
    assert after.missing({3}) == [1]
    assert after.issue_next().index == 2
    assert after.issue_next() == make_ledger_at(4)


def make_ledger_at(position: int) -> object:
    ledger = make_ledger()
    uids = [ledger.issue_next() for _ in range(position + 1)]
    return uids[-1]
