"""`isentrope audit`: right files pass, and each way of being wrong is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.cli.__main__ import main
from services.cli.audit import audit
from services.learner.ledger import Ledger
from shared.prompt_order import problem_at

Rows = list[dict[str, Any]]

NUM_PROBLEMS = 5
SEED = 3
NUM_STEPS = 4
RUN_FILE = f"""
[run]
name = "demo"
num_steps = {NUM_STEPS}
seed = {SEED}
[model]
path = "none"
"""


def a_run() -> tuple[Rows, Rows]:
    """Both files of a run of two groups a step that skipped one position and gave one up."""
    ledger = Ledger(run_id="run", num_problems=NUM_PROBLEMS, seed=SEED)
    told: Rows = []
    for step in range(1, NUM_STEPS + 1):
        uids = [ledger.issue_next() for _ in range(3 if step in (2, 3) else 2)]
        ending = {2: ledger.skip, 3: ledger.abandon}.get(step)
        if ending is not None:
            ending(ledger.position(uids.pop(0)))
        if step == 4:
            uids[1] = ledger.reissue(ledger.position(uids[1]))
        for uid in uids:
            ledger.finish(ledger.position(uid))
        told.append(
            {
                "step": step,
                "trained": [[uid.epoch, uid.index, uid.attempt] for uid in uids],
                "problems": [ledger.problem_index(uid) for uid in uids],
                "staleness": [0, 1],
                "max_staleness": 1,
                **ledger.account(),
            }
        )
    measured: Rows = [
        {"step": row["step"], "seconds": 1.0, "staleness_counts": {"0": 8, "1": 8}} for row in told
    ]
    return told, [{"step": 0, "eval_score": 0.5}, *measured]


def faults_of(ledger: Rows, metrics: Rows) -> dict[str, Any]:
    found = audit(ledger, metrics, seed=SEED, num_steps=NUM_STEPS)
    assert found.is_right == (not any(found.faults.values()))
    return {fault: places for fault, places in found.faults.items() if places}


def test_a_run_in_order_is_right_and_its_positions_are_counted() -> None:
    ledger, metrics = a_run()
    found = audit(ledger, metrics, seed=SEED, num_steps=NUM_STEPS)
    assert found.is_right
    assert found.ended == {"trained": 8, "skipped": 1, "abandoned": 1}
    assert (found.reissued, found.max_staleness, found.under_way) == (1, 1, 0)


def test_a_run_that_goes_on_is_right_with_positions_under_way() -> None:
    ledger, metrics = a_run()
    ledger[1]["outstanding"] = [5, 6]
    found = audit(ledger[:2], metrics[:3], seed=SEED, num_steps=NUM_STEPS)
    assert found.is_right
    assert found.under_way == 2


def trained_twice(ledger: Rows, metrics: Rows) -> None:
    ledger[2]["trained"][0], ledger[2]["problems"][0] = [0, 1, 1], ledger[0]["problems"][1]


def skipped_after_training(ledger: Rows, metrics: Rows) -> None:
    ledger[3]["skipped"] = [[0, 0, 0]]


def lost_below_the_frontier(ledger: Rows, metrics: Rows) -> None:
    ledger[1]["skipped"] = []


def forgotten_while_under_way(ledger: Rows, metrics: Rows) -> None:
    ledger[0]["outstanding"] = [17]


def left_over_at_the_end(ledger: Rows, metrics: Rows) -> None:
    ledger[3]["outstanding"] = [10]


def too_stale(ledger: Rows, metrics: Rows) -> None:
    ledger[1]["staleness"] = [2, 0]


def too_stale_as_measured(ledger: Rows, metrics: Rows) -> None:
    metrics[2]["staleness_counts"] = {"2": 1}


def another_problem(ledger: Rows, metrics: Rows) -> None:
    ledger[0]["problems"].reverse()


def a_row_twice(ledger: Rows, metrics: Rows) -> None:
    metrics.append(metrics[1])


def a_row_less(ledger: Rows, metrics: Rows) -> None:
    del metrics[2]


@pytest.mark.parametrize(
    ("spoil", "fault", "places"),
    [
        (trained_twice, "twice", [1]),
        (skipped_after_training, "twice", [0]),
        (lost_below_the_frontier, "lost", [2]),
        (forgotten_while_under_way, "lost", [17]),
        (left_over_at_the_end, "lost", [10]),
        (too_stale, "over the staleness bound", [2]),
        (too_stale_as_measured, "over the staleness bound", [2]),
        (another_problem, "of another problem", [(1, 0), (1, 1)]),
        (a_row_twice, "steps missing or repeated", [1]),
        (a_row_less, "steps missing or repeated", [2]),
    ],
)
def test_each_fault_is_found_where_it_is(
    spoil: Callable[[Rows, Rows], None], fault: str, places: list[Any]
) -> None:
    ledger, metrics = copy.deepcopy(a_run())
    spoil(ledger, metrics)
    assert faults_of(ledger, metrics)[fault] == places


def test_a_learner_killed_between_its_two_files_is_no_fault() -> None:
    ledger, metrics = a_run()
    assert faults_of(ledger[:3], metrics[:3]) == {}


def test_the_order_is_that_of_the_seed() -> None:
    ledger, metrics = a_run()
    assert not audit(ledger, metrics, seed=SEED + 1, num_steps=NUM_STEPS).is_right
    assert sorted(
        problem_at(2, index, num_problems=NUM_PROBLEMS, seed=SEED) for index in range(NUM_PROBLEMS)
    ) == list(range(NUM_PROBLEMS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ledger, metrics = a_run()
    (tmp_path / "run.toml").write_text(RUN_FILE)
    for name, rows in (("ledger", ledger), ("metrics", metrics)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_command_says_right_and_succeeds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder.name}: 4 of 4 steps"
    assert lines[1] == "positions  10 issued: 8 trained, 1 skipped, 1 abandoned, 0 under way"
    assert lines[2] == "trained    1 by a later attempt; staleness at most 1"
    assert lines[3:6] == ["0 lost", "0 twice", "0 over the staleness bound"]
    assert lines[-1] == "right"


def test_the_command_names_what_is_wrong_and_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines + lines[:1]))
    assert main(["audit", str(folder)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "2 twice: 0, 1" in said
    assert "1 steps missing or repeated: 1" in said
    assert said[-1] == "WRONG"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "nothing to audit"), ('{"step": 1, "trained": [[0, 0, 0]]}\n', "an older release")],
)
def test_a_ledger_that_tells_nothing_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    (folder / "ledger.jsonl").write_text(text)
    assert main(["audit", str(folder)]) == 2
    assert reason in capsys.readouterr().err
