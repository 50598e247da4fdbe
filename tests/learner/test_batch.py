"""Rows, mini-batches, micro-batches: nothing is lost, nothing is trained twice."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.learner.balance import PassCost
from services.learner.batch import (
    Batch,
    build_batch,
    collate,
    hash_completion,
    plan_micro_batches,
    selection_keys,
)
from shared.records import Completion, GroupUid, Outcome, ScoredGroup, VersionRun
from tests.forked import FORKED
from tests.learner.fakes import run_config, scored_group

CONFIGS = {
    cuts: run_config(learner={"groups_per_batch": 12, "optimizer_steps_per_batch": cuts})
    for cuts in (1, 2, 3, 4)
}


def build(groups: list[ScoredGroup], *, minibatches: int = 1, version: int = 0) -> Batch:
    return build_batch(groups, CONFIGS[minibatches], policy_version=version)


outcomes = st.lists(st.sampled_from(list(Outcome)), min_size=2, max_size=5)
batches = st.lists(outcomes, min_size=1, max_size=7)


@given(batches, st.integers(1, 4))
def test_every_usable_completion_is_in_exactly_one_minibatch(
    groups: list[list[Outcome]], minibatches: int
) -> None:
    batch = build([scored_group(i, each) for i, each in enumerate(groups)], minibatches=minibatches)
    expected = sum(outcome.is_verdict for each in groups for outcome in each)
    assert len(batch.rows) == expected
    assert list(chain.from_iterable(batch.minibatches)) == list(range(expected))
    assert all(len(rows) > 0 for rows in batch.minibatches)


@given(batches, st.integers(1, 4))
def test_a_group_is_never_cut_in_two_by_minibatches(
    groups: list[list[Outcome]], minibatches: int
) -> None:
    batch = build([scored_group(i, each) for i, each in enumerate(groups)], minibatches=minibatches)
    owners = [{batch.rows[row].group for row in rows} for rows in batch.minibatches]
    assert sum(len(each) for each in owners) == len(set().union(*owners))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(8, 200),
)
def test_plans_keep_every_row_and_the_bound_with_as_many_micro_batches_on_each_rank(
    lengths: list[int], ranks: int, bound: int
) -> None:
    batch = build([scored_group(0, [Outcome.FAIL] * len(lengths), lengths=lengths)])
    rows = batch.minibatches[0]
    plan = plan_micro_batches(
        batch, rows, num_ranks=ranks, micro_batch_tokens=bound, cost=PassCost(per_token=1)
    )
    assert len(plan) == ranks
    assert len({len(mine) for mine in plan}) == 1
    micro_batches = [each for mine in plan for each in mine if each]
    assert sorted(chain.from_iterable(micro_batches)) == list(rows)
    for each in micro_batches:
        assert len(each) == 1 or sum(batch.rows[row].num_tokens for row in each) <= bound


@given(st.integers(1, 4), st.integers(4, 12))
def test_no_rank_is_idle_when_there_are_enough_rows(ranks: int, rows: int) -> None:
    batch = build([scored_group(0, [Outcome.FAIL] * rows)])
    plan = plan_micro_batches(
        batch,
        batch.minibatches[0],
        num_ranks=ranks,
        micro_batch_tokens=10**6,
        cost=PassCost(per_token=1),
    )
    assert all(any(mine) for mine in plan)


def test_errors_and_timeouts_do_not_move_the_advantages_of_the_others() -> None:
    judged = [Outcome.PASS, Outcome.FAIL, Outcome.FAIL]
    alone = build([scored_group(0, judged)])
    mixed = build([scored_group(0, [Outcome.ERROR, *judged, Outcome.TIMEOUT])])
    assert [row.advantage for row in mixed.rows] == [row.advantage for row in alone.rows]


def test_a_reward_that_is_not_finite_is_not_trained_on() -> None:
    group = scored_group(
        0, [Outcome.PASS, Outcome.PASS, Outcome.FAIL], rewards=[1.0, float("nan"), 0.0]
    )
    batch = build([group])
    assert len(batch.rows) == 2
    assert bool(batch.advantages.isfinite().all())


def test_values_per_token_stand_where_the_mask_is_and_nowhere_else() -> None:
    batch = build([scored_group(0, [Outcome.PASS, Outcome.FAIL], lengths=[1, 3])])
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.behaviour_logprobs.tolist() == [[-0.5, 0, 0], [-0.5, -1.0, -1.5]]
    assert batch.advantages[0, 1:].tolist() == [0, 0]


def test_a_micro_batch_predicts_each_completion_token_from_the_one_before_it() -> None:
    batch = build([scored_group(3, [Outcome.PASS, Outcome.FAIL], lengths=[1, 3])])
    micro_batch = collate(batch, [1, 0])
    assert micro_batch.input_ids.tolist() == [7, 8, 30, 31, 32, 7, 8, 30]
    assert micro_batch.packing.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert micro_batch.predictors.tolist() == [1, 2, 3, 6]
    assert micro_batch.targets.tolist() == [30, 31, 32, 30]
    assert micro_batch.mask.tolist() == [[True] * 3, [True, False, False]]


@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=2, max_size=5),
    st.integers(0, 2**32),
)
def test_tensors_hold_what_a_loop_over_the_tokens_would_put_there(
    counts: list[list[int]], seed: int
) -> None:
    """Bit for bit, ids up to the largest, from runs of any number and length."""
    draw = random.Random(seed)
    sampled = []
    for of_runs in counts:
        num_tokens = sum(of_runs)
        ids = array("I", [draw.choice([0, 151_935, 2**31 - 1]) for _ in range(num_tokens)])
        logprobs = array("f", [-draw.expovariate(1) for _ in range(num_tokens)])
        version_runs = tuple(VersionRun(draw.randrange(9), count) for count in of_runs)
        sampled.append(Completion(ids, logprobs, version_runs, False))
    template = scored_group(0, [Outcome.PASS, Outcome.FAIL] * len(counts), prompt=(7, 2**31 - 1))
    rollout = replace(template.rollout, completions=tuple(sampled))
    group = replace(template, rollout=rollout, scores=template.scores[: len(sampled)])
    batch = build([group], version=5)
    micro_batch = collate(batch, range(len(sampled)))
    width = batch.mask.shape[1]
    sequences = torch.split(micro_batch.input_ids, [row.num_tokens for row in batch.rows])
    for row, completion in enumerate(sampled):
        num_tokens = len(completion.token_ids)
        padding = [0] * (width - num_tokens)
        versions = chain.from_iterable(
            [run.policy_version] * run.num_tokens for run in completion.version_runs
        )
        expected_ages = [abs(5 - version) for version in versions]
        assert batch.staleness[row].tolist() == expected_ages + padding
        assert batch.behaviour_logprobs[row].tolist() == [*completion.behaviour_logprobs, *padding]
        assert batch.mask[row].tolist() == [True] * num_tokens + [False] * len(padding)
        advantage = array("f", [batch.rows[row].advantage] * num_tokens)
        assert batch.advantages[row].tolist() == [*advantage, *padding]
        tokens = [7, 2**31 - 1, *completion.token_ids]
        assert sequences[row].tolist() == tokens
    targets = [list(completion.token_ids) for completion in sampled]
    assert micro_batch.targets.tolist() == list(chain.from_iterable(targets))
    predicted = micro_batch.input_ids[micro_batch.predictors + 1]
    assert torch.equal(predicted, micro_batch.targets)


def test_tensors_do_not_share_the_memory_of_records() -> None:
    group = scored_group(3, [Outcome.PASS, Outcome.FAIL])
    batch = build([group])
    micro_batch = collate(batch, [0, 1])
    for tensor in (micro_batch.input_ids, micro_batch.targets, batch.behaviour_logprobs):
        tensor.zero_()
    assert group == replace(group, rollout=scored_group(3, [Outcome.PASS, Outcome.FAIL]).rollout)


def test_spreading_puts_values_in_rows_and_their_gradient_back() -> None:
    batch = build([scored_group(0, [Outcome.PASS, Outcome.FAIL], lengths=[1, 2])])
    micro_batch = collate(batch, [0, 1])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    spread = micro_batch.spread(values)
    assert spread.tolist() == [[1, 0], [2, 3]]
    weighted = (spread * torch.tensor([[10.0, 99.0], [20.0, 30.0]])).sum()
    assert torch.autograd.grad(weighted, values)[0].tolist() == [10, 20, 30]


def test_an_empty_micro_batch_has_one_prediction_and_an_empty_mask() -> None:
    micro_batch = collate(build([scored_group(0, [Outcome.PASS, Outcome.FAIL])]), [])
    assert micro_batch.rows == ()
    assert len(micro_batch.predictors) == 1
    assert not micro_batch.mask.any()


def test_staleness_counts_from_the_oldest_token() -> None:
    versions = ((3, 1), (5, 2))
    batch = build([scored_group(0, [Outcome.PASS, Outcome.FAIL], versions=versions)], version=6)
    assert {row.staleness for row in batch.rows} == {3}
    assert {row.num_versions for row in batch.rows} == {2}


def test_every_token_is_as_old_as_the_version_that_sampled_it() -> None:
    batch = build([scored_group(0, [Outcome.PASS], versions=((3, 1), (5, 2)))], version=6)
    assert batch.staleness.tolist() == [[3, 1, 1]]
    longer = scored_group(1, [Outcome.FAIL, Outcome.FAIL], lengths=[1, 4])
    assert build([longer], version=2).staleness.tolist() == [[2, 0, 0, 0], [2, 2, 2, 2]]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt without tokens"):
        build([scored_group(0, [Outcome.PASS, Outcome.FAIL], prompt=())])


def test_a_batch_without_a_verdict_has_no_rows() -> None:
    batch = build([scored_group(0, [Outcome.ERROR, Outcome.TIMEOUT])])
    assert batch.rows == ()
    assert batch.minibatches == ()
    assert batch.mask.shape == (0, 0)
    assert batch.staleness.shape == (0, 0)
    assert selection_keys(batch, seed=1, step=1).shape == (0, 0)


def test_hashes_tell_completions_apart_and_ignore_the_attempt() -> None:
    hashes = {
        hash_completion(GroupUid("run", epoch, index, 0), number)
        for epoch in range(3)
        for index in range(12)
        for number in range(12)
    }
    assert len(hashes) == 3 * 12 * 12
    again = hash_completion(GroupUid("run", 0, 5, 2), 1)
    assert again == hash_completion(GroupUid("run", 0, 5, 0), 1)


def test_hashes_do_not_depend_on_the_process() -> None:
    uid = GroupUid("run", 1, 2, 0)
    with FORKED.Pool(1) as other:  # its server was given a seed for Python's own hashes, too
        there = other.apply_async(hash_completion, (uid, 3)).get(timeout=60.0)
    assert there == hash_completion(uid, 3)


def test_keys_change_with_step_and_minibatch_and_not_with_the_order_of_groups() -> None:
    groups = [scored_group(i, [Outcome.PASS, Outcome.FAIL]) for i in range(2)]
    keys = selection_keys(build(groups), seed=1, step=1)
    assert not torch.equal(keys, selection_keys(build(groups), seed=1, step=2))
    turned = selection_keys(build(groups[::-1]), seed=1, step=1)
    assert torch.equal(turned[[2, 3, 0, 1]], keys)
    cut = selection_keys(build(groups, minibatches=2), seed=1, step=1)
    assert torch.equal(cut[:2], keys[:2])
    assert not torch.equal(cut[2:], keys[2:])
