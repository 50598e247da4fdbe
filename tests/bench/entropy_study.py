"""The entropy study: every arm, seed by seed, then one table and four plots.

    make bench-entropy                       the base regime: 10 arms x 5 seeds
    .venv/bin/python -m tests.bench.entropy_study --regimes stale --seeds 3

A run that is complete is not run again, so the study goes on where it was interrupted. Results go
to tests/bench/results; rows, logs and models stay in the study's folder. With --extend the runs
whose results are there already, perhaps from another machine, are neither run nor forgotten.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from tests.bench.benchmark import RESULTS
from tests.bench.study_arms import ARMS, REGIMES, Document, run_document
from tests.bench.study_report import write_report

RUN_TIMEOUT_SECONDS = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the study."""

    folder: Path
    regime: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.regime}/{self.arm}-{self.seed}"

    @property
    def rows(self) -> Path:
        """There once the run is complete."""
        return self.folder / self.regime / f"{self.arm}-{self.seed}.jsonl"

    @property
    def result(self) -> Path:
        """What the report keeps of it."""
        return RESULTS / "entropy-study" / self.regime / f"{self.arm}-{self.seed}.json"

    @property
    def document(self) -> Document:
        document = run_document(REGIMES[self.regime], self.arm, self.seed)
        document["run"]["directory"] = str(self.folder / "models")
        return document

    @property
    def model(self) -> Path:
        """Shared by all arms of a seed."""
        return Path(RunConfig.model_validate(self.document).model_path)

    def warm_up(self) -> None:
        """Train the model that the run starts from."""
        self._run("services.learner.warmup", "--folder", str(self.model))

    def run(self) -> None:
        """The run itself."""
        lag = str(REGIMES[self.regime].lag)
        self._run("tests.bench.lockstep", "--rows", str(self.rows), "--lag", lag)

    def _run(self, module: str, *arguments: str) -> None:
        run_file, log = self.rows.with_suffix(".toml"), self.rows.with_suffix(".log")
        run_file.parent.mkdir(parents=True, exist_ok=True)
        run_file.write_text(to_toml(self.document), "utf8")
        command = [sys.executable, "-m", module, "--config", str(run_file), *arguments]
        with log.open("a", encoding="utf8") as file:
            subprocess.run(
                command,
                # Threads of a model this small wait for each other.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                check=True,
                timeout=RUN_TIMEOUT_SECONDS,
            )


def to_toml(document: Document) -> str:
    """A run file; strings, numbers, booleans and one level of inline tables."""
    lines = []
    for section, values in document.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


def run_all(jobs: Sequence[Job], *, parallel: int) -> list[Job]:
    """Run what is not complete, `parallel` at a time; returns the jobs that failed."""
    missing = [job for job in jobs if not job.rows.exists()]
    models = {job.model: job for job in missing if not job.model.exists()}
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already", flush=True)
    cold = _each(list(models.values()), Job.warm_up, what="warm-up models", parallel=parallel)
    unready = {job.model for job in cold}
    ready = [job for job in missing if job.model not in unready]
    failed = _each(ready, Job.run, what="runs", parallel=parallel)
    return failed + [job for job in missing if job.model in unready]


def _each(jobs: Sequence[Job], do: Callable[[Job], None], *, what: str, parallel: int) -> list[Job]:
    """Do it to each job, with progress; returns those that failed."""
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(parallel) as pool:
        under_way = {pool.submit(do, job): job for job in jobs}
        for number, done in enumerate(as_completed(under_way), start=1):
            job, spent = under_way[done], time.monotonic() - started
            error = done.exception()
            if error is not None:
                failed.append(job)
            left = spent / number * (len(jobs) - number)
            print(
                f"{what}: {number}/{len(jobs)} {job}"
                + (f" FAILED ({error}); see {job.rows.with_suffix('.log')}" if error else "")
                + f", {left / 60:.0f} min left",
                flush=True,
            )
    return failed


def main() -> int:
    """The command line; 1 if a run failed."""
    parser = argparse.ArgumentParser(description="The entropy study.")
    parser.add_argument("--folder", type=Path, default=Path("runs/entropy-study"))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=["base"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm")
    parser.add_argument("--extend", action="store_true", help="add to the results that are there")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time")
    given = parser.parse_args()
    # Seeds before arms: what is interrupted leaves whole pairs.
    jobs = [
        Job(given.folder, regime, arm, seed)
        for regime, seed, arm in product(given.regimes, range(1, given.seeds + 1), given.arms)
    ]
    if given.extend:
        jobs = [job for job in jobs if not job.result.exists()]
    failed = run_all(jobs, parallel=given.parallel)
    for table in write_report(given.folder, RESULTS, given.regimes, extend=given.extend):
        print(f"wrote {table}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
