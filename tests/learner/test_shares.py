"""A batch as rank 0 has it against what another rank is told and given of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.learner.balance import rows_by_rank
from services.learner.batch import Batch, build_batch, collate
from services.learner.shares import pack_rows, pack_tokens, unpack_rows, with_tokens
from shared.records import VersionRun
from tests.learner.fakes import make_trainer, run_config, sampled_groups


def mixed_batch() -> Batch:
    """Completions that two versions sampled, one of whose groups has nothing to train on."""
    groups = sampled_groups(0)
    group = groups[0]
    first, *others = group.rollout.completions
    runs = (VersionRun(2, 1), VersionRun(5, len(first.token_ids) - 1))
    completions = (replace(first, version_runs=runs), *others)
    groups[0] = replace(group, rollout=replace(group.rollout, completions=completions))
    return build_batch(groups, run_config(), policy_version=7)


def test_what_all_ranks_are_told_of_a_batch_plans_and_weighs_it_alike() -> None:
    batch = mixed_batch()
    told = unpack_rows(pack_rows(batch))
    trainer = make_trainer(run_config())
    assert told.groups == ()
    assert told.rows == tuple(replace(row, token_ids=None) for row in batch.rows)
    assert told.minibatches == batch.minibatches
    for name in ("mask", "advantages", "uid_hashes"):
        assert torch.equal(getattr(told, name), getattr(batch, name)), name
    assert trainer.plan(told) == trainer.plan(batch)
    assert rows_by_rank(trainer.plan(told), 1) == [list(range(len(batch.rows)))]
    assert not bool(told.behaviour_logprobs.any() or told.staleness.any())


@pytest.mark.parametrize("rows", [[], [0], [1, 3, 4]])
def test_a_rank_gets_the_tokens_of_its_rows_and_no_others(rows: list[int]) -> None:
    batch = mixed_batch()
    packed = pack_tokens(batch, rows)
    num_completion_tokens = int(batch.mask[rows].sum())
    assert len(packed) == 4 * sum(batch.rows[row].num_tokens for row in rows) + (
        8 * num_completion_tokens
    )
    mine = with_tokens(unpack_rows(pack_rows(batch)), rows, packed)
    assert [row for row, each in enumerate(mine.rows) if each.token_ids is not None] == rows
    mask = torch.zeros_like(batch.mask)
    mask[rows] = batch.mask[rows]
    assert torch.equal(mine.behaviour_logprobs, torch.where(mask, batch.behaviour_logprobs, 0.0))
    assert torch.equal(mine.staleness, torch.where(mask, batch.staleness, 0))
    whole, own = collate(batch, rows), collate(mine, rows)
    assert torch.equal(whole.input_ids, own.input_ids)
    assert torch.equal(whole.targets, own.targets)


def test_a_batch_without_a_usable_completion_is_told_as_well() -> None:
    batch = build_batch([], run_config(), policy_version=0)
    told = unpack_rows(pack_rows(batch))
    assert (told.rows, told.minibatches) == ((), ())
    assert make_trainer(run_config()).plan(told) == ()
