"""The fleet that plans are held against: a small one, quickly."""

from __future__ import annotations

from pathlib import Path

from services.cli.audit import print_audit
from services.cli.plan.measured import measured
from services.cli.run_folder import RunFolder
from tests.bench.plan_fleet import Case, run_fleet
from tests.bench.plan_validation import QUANTITIES, cell, observed, predict


def test_a_fleet_makes_a_run_that_a_plan_can_be_made_from(tmp_path: Path) -> None:
    case = Case(num_replicas=2, max_staleness=1, num_steps=9, speed=20.0)
    idle = run_fleet(case, tmp_path / "run")
    assert print_audit(RunFolder(tmp_path / "run")) == 0
    run = measured(RunFolder(tmp_path / "run"))
    assert (run.num_steps, run.shape.num_replicas, run.shape.max_staleness) == (6, 2, 1)
    seen = observed(tmp_path / "run", run, idle)
    assert 0 <= seen["staleness_mean"] <= 1
    assert 0 <= seen["replica_idle"] < 1
    predicted = predict(run.rates, run)
    assert seen.keys() == predicted.keys() == QUANTITIES.keys()
    assert "against" in cell("seconds_per_step", seen, predicted["seconds_per_step"])
