from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from services.learner.evaluation import LawFit
from services.learner.measures import StepReport
from services.learner.progress import Progress
from services.learner.publisher import Publication
from services.learner.run_record import RunRecord
from shared.config import parse_run
from shared.metrics.learner import learner_gauges
from tests.factories import make_scored
from tests.learner.test_inbox import RUN, SOLVED, Scene

PUBLICATION = Publication(
    policy_version=2,
    served=("rollout-0",),
    failed=(),
    retries=1,
    seconds=2.0,
    gather_seconds=0.5,
    broadcast_seconds=0.75,
    load_seconds=1.0,
    pause_seconds=0.25,
)


class Kept:
    """A record over real parts, and what it has left so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scene = Scene()
        self.law = LawFit(parse_run(RUN).law)
        self.progress = Progress(step=1, policy_version=2, queues={"scored": 3})
        self.registry = CollectorRegistry()
        self.record = RunRecord(
            config=parse_run(RUN),
            folder=folder,
            ledger=self.scene.ledger,
            inbox=self.scene.inbox,
            law=self.law,
            gauges=learner_gauges(self.registry),
            progress=self.progress,
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def scrape(self) -> str:
        return generate_latest(self.registry).decode()


async def test_the_row_of_a_step_tells_of_its_batch_its_publication_and_its_surroundings(
    tmp_path: Path,
) -> None:
    kept = Kept(tmp_path)
    await kept.scene.feeder.fill(policy_version=0)
    await kept.scene.arrive(make_scored(7), make_scored(0), make_scored(1, outcomes=SOLVED))
    assert await kept.scene.take() == [0, 1]  # the seventh was never issued
    kept.law.add_entropy(1, 0.5)
    kept.record.write_step(
        [make_scored(0, versions=(1, 0))],
        StepReport({"entropy": 0.5}, {}, {}),
        phases={"wait_data": 1.0},
        seconds=4.0,
        publication=PUBLICATION,
    )
    (row,) = kept.rows("metrics")
    expected = {
        "step": 1,
        "policy_version": 2,
        "entropy": 0.5,
        "wait_data_share": 0.25,
        "pause_seconds": 0.25,
        "groups_over_max_staleness": 0,
        "groups_replaced": 0,
        "queue_scored": 3,
        "law_points": 0.0,
        **{f"dropped_{reason}": count for reason, count in kept.scene.inbox.dropped.items()},
        **PUBLICATION.phases,
    }
    assert kept.scene.inbox.dropped
    assert {key: row[key] for key in expected} == expected
    assert kept.progress.metrics["queue_scored"] == 3
    assert "isentrope_learner_policy_entropy_nats 0.5" in kept.scrape


def test_a_step_without_a_publication_paused_nobody(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.record.write_step([], StepReport({}, {}, {}), phases={}, seconds=1.0, publication=None)
    assert kept.rows("metrics")[0]["pause_seconds"] == 0.0


def test_an_evaluation_is_a_row_that_leaves_the_other_values_as_they_were(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.record.write({"step": 1, "entropy": 0.5, "loss": 0.1})
    kept.record.write({"step": 1, "eval_score": 0.25, "loss": math.nan})
    assert kept.progress.metrics == {"step": 1.0, "entropy": 0.5, "eval_score": 0.25}
    assert "isentrope_learner_eval_score 0.25" in kept.scrape
    assert kept.rows("metrics")[1] == {"step": 1, "eval_score": 0.25, "loss": None}


async def test_the_account_of_a_step_names_its_prompts_and_how_stale_they_were(
    tmp_path: Path,
) -> None:
    kept = Kept(tmp_path)
    await kept.scene.feeder.fill(policy_version=0)
    batch = [make_scored(1, versions=(1, 1)), make_scored(0)]
    kept.record.write_trained(1, batch, policy_version=1)
    (row,) = kept.rows("ledger")
    assert row["trained"] == [[0, 1, 0], [0, 0, 0]]
    assert (row["problems"], row["staleness"], row["max_staleness"]) == ([1, 0], [0, 1], 1)
    assert row.items() >= kept.scene.ledger.account().items()


def test_a_resumed_run_has_both_files_and_the_values_of_its_checkpoint(tmp_path: Path) -> None:
    first = Kept(tmp_path)
    first.record.write({"step": 1, "entropy": 0.5})
    first.record.write_trained(1, [], policy_version=0)
    first.record.sync()
    lengths, metrics = first.record.lengths, first.progress.metrics
    first.record.write({"step": 2, "entropy": 0.4})
    first.record.write_trained(2, [], policy_version=1)
    first.record.close()
    resumed = Kept(tmp_path)
    resumed.record.cut_to(lengths)
    resumed.record.show(metrics)
    assert [[row["step"] for row in resumed.rows(name)] for name in lengths] == [[1], [1]]
    assert resumed.progress.metrics["entropy"] == 0.5
    assert "isentrope_learner_policy_entropy_nats 0.5" in resumed.scrape
    resumed.record.cut_to({})
    assert resumed.rows("metrics") == resumed.rows("ledger") == []
