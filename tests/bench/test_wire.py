from __future__ import annotations

import io
import pickle

import pytest
import torch
from rich.console import Console

from shared.records import ScoredGroup
from tests.bench.wire import (
    OURS,
    Row,
    formats,
    list_tensors,
    make_groups,
    num_completion_tokens,
    plain,
    record_tensors,
    run,
    table,
)


@pytest.fixture(scope="module")
def groups() -> list[ScoredGroup]:
    return make_groups(2, prompt_tokens=(3, 9), completion_tokens=(4, 12))


def printed(rows: list[Row]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(rows, "caption"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_format_gives_the_same_tensors_bit_for_bit(groups: list[ScoredGroup]) -> None:
    for form in formats(groups).values():
        for source, group in zip(form.sources, groups, strict=True):
            decoded = form.tensors(form.decode(form.encode(source)))
            for (ids, logprobs), completion in zip(decoded, group.rollout.completions, strict=True):
                assert ids.tolist() == list(completion.token_ids)
                assert logprobs.tolist() == list(completion.behaviour_logprobs)
                assert (ids.dtype, logprobs.dtype) == (torch.int32, torch.float32)


def test_lists_hold_every_field_of_the_records(groups: list[ScoredGroup]) -> None:
    document = plain(groups[0])
    assert set(document) == {"rollout", "scores", "verifier", "scored_at"}
    prompt = document["rollout"]["prompt"]
    assert prompt["uid"] == {"run_id": "qwen-math-7", "epoch": 1, "index": 0, "attempt": 0}
    assert prompt["purpose"] == "train"
    run_of_tokens = document["rollout"]["completions"][0]["version_runs"][0]
    assert set(run_of_tokens) == {"policy_version", "num_tokens"}
    assert pickle.loads(pickle.dumps(document)) == document
    for (ids, _), (same, _) in zip(list_tensors(document), record_tensors(groups[0]), strict=True):
        assert torch.equal(ids, same)


def test_groups_are_as_they_are_said_to_be() -> None:
    made = make_groups(8, prompt_tokens=(100, 200), completion_tokens=(256, 400))
    assert all(8 <= len(group.scores) <= 16 for group in made)
    completions = [each for group in made for each in group.rollout.completions]
    assert all(256 <= len(each.token_ids) <= 400 for each in completions)
    assert {len(each.version_runs) for each in completions} == {1, 2, 3}
    assert max(max(each.token_ids) for each in completions) < 151_936
    assert num_completion_tokens(made) == sum(len(each.token_ids) for each in completions)


def test_a_run_measures_every_line_and_the_table_shows_it(groups: list[ScoredGroup]) -> None:
    rows = run(groups, groups, 1, Console(file=io.StringIO()))
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) == 10
    by_name = {row.name: row for row in rows}
    assert all(value is not None and value > 0 for value in by_name[OURS][1:])
    assert all(value is not None and value > 0 for value in by_name["scored: JSON"][1:])
    assert all((row.into_tensors or 0) > 0 for row in rows if row.name.startswith("learner"))
    assert all(name in printed(rows) for name in names)


def test_another_format_stands_beside_ours() -> None:
    text = printed([Row(OURS, 8.0, 100.0, 200.0, 150.0), Row("scored: JSON", 24.0, 5.0, 10.0, 3.0)])
    for cell in ("24 (3x)", "5 (0.05x)", "10 (0.05x)", "3 (0.02x)"):
        assert cell in text
