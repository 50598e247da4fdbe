"""What the benchmark of the data path counts."""

from __future__ import annotations

from services.learner.batch import build_batch
from tests.bench.data_path import groups_of, reading, shares
from tests.learner.fakes import run_config, sampled_groups


def test_a_group_is_read_once_by_each_rank_that_has_a_row_of_it() -> None:
    batch = build_batch(sampled_groups(0), run_config(), policy_version=0)
    num_groups = len({row.group for row in batch.rows})
    sizes = [100 * (number + 1) for number in range(num_groups)]
    alone = reading(batch, sizes, 1)
    assert (alone.groups, alone.amplification) == (num_groups, 1.0)
    dealt = shares(batch, 3)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(batch.rows)))
    read = [group for rows in dealt for group in groups_of(batch, rows)]
    assert num_groups < len(read) <= 3 * num_groups
    expected = sum(sizes[group] for group in read) / sum(sizes)
    assert reading(batch, sizes, 3).amplification == round(expected, 2)
