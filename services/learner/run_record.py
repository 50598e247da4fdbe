"""What a run writes down as it goes: rows of metrics.jsonl and ledger.jsonl, and /metrics.

    metrics.jsonl   a row per step, one per evaluation; /metrics shows the newest value of each key
    ledger.jsonl    a row per step: which prompts it trained on, and the account of all others

A resumed run cuts both files back to its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.learner.evaluation import LawFit
from services.learner.inbox import Inbox, group_staleness
from services.learner.journal import Journal
from services.learner.ledger import Ledger
from services.learner.measures import StepReport
from services.learner.progress import Progress
from services.learner.publisher import Publication
from services.learner.telemetry import count_step, numbers, step_row, without_nan
from shared.config import RunConfig
from shared.metrics.quantities import LearnerGauges
from shared.records import ScoredGroup


class RunRecord:
    """The two files of one run, and the newest value of each quantity.

    Args:
        folder: of the run.
        ledger, inbox, law, progress: are read for the rows; `progress.metrics` is kept.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        folder: Path,
        ledger: Ledger,
        inbox: Inbox,
        law: LawFit,
        gauges: LearnerGauges,
        progress: Progress,
    ) -> None:
        self._loss_mode = config.policy_loss.loss_mode
        self._max_staleness = config.learner.max_staleness
        self._ledger = ledger
        self._inbox = inbox
        self._law = law
        self._gauges = gauges
        self._progress = progress
        self._metrics = Journal(folder / "metrics.jsonl")
        self._trained = Journal(folder / "ledger.jsonl")
        self._journals = {"metrics": self._metrics, "ledger": self._trained}

    @property
    def lengths(self) -> dict[str, int]:
        """Bytes of each file that the disk holds; a checkpoint keeps them, and `kept`."""
        return {name: journal.num_bytes for name, journal in self._journals.items()}

    @property
    def kept(self) -> dict[str, list[str]]:
        """The rows of each file after those bytes."""
        return {name: journal.kept for name, journal in self._journals.items()}

    def sync(self) -> None:
        """Have the disk hold both files; blocks, and nothing is written meanwhile."""
        for journal in self._journals.values():
            journal.sync()

    def cut_to(
        self, lengths: Mapping[str, int], kept: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Forget what was written after the files had these lengths; then come the rows `kept`.

        A file without a length is new.
        """
        for name, journal in self._journals.items():
            journal.cut_to(lengths.get(name, 0), (kept or {}).get(name, ()))

    def show(self, metrics: dict[str, float]) -> None:
        """These are the newest values, a checkpoint's say."""
        self._progress.metrics = metrics
        self._gauges.show(metrics)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl, and the law as it is now."""
        row = {**row, **self._law.metrics()}
        self._metrics.write(row)
        self.show(without_nan({**self._progress.metrics, **numbers(row)}))

    def write_trained(
        self, step: int, batch: Sequence[ScoredGroup], *, policy_version: int
    ) -> None:
        """Add a row to ledger.jsonl.

        Args:
            batch: its prompts are finished.
            policy_version: that the batch was trained at.
        """
        prompts = [group.rollout.prompt for group in batch]
        uids = [prompt.uid for prompt in prompts]
        self._trained.write(
            {
                "step": step,
                "trained": [[uid.epoch, uid.index, uid.attempt] for uid in uids],
                "problems": [prompt.problem_index for prompt in prompts],
                "staleness": [group_staleness(group, policy_version) for group in batch],
                "max_staleness": self._max_staleness,
                **self._ledger.account(),
            }
        )

    def write_step(
        self,
        batch: Sequence[ScoredGroup],
        report: StepReport,
        *,
        phases: Mapping[str, float],
        seconds: float,
        publication: Publication | None,
    ) -> None:
        """Count the step that ended last, and add its row to metrics.jsonl.

        Args:
            phases: seconds by phase.
            publication: of the version that it made; None if there was none.
        """
        count_step(batch, report, loss_mode=self._loss_mode, seconds=seconds)
        row = step_row(
            batch,
            report,
            step=self._progress.step,
            policy_version=self._progress.policy_version,
            max_staleness=self._max_staleness,
            phases=phases,
            seconds=seconds,
            pause_seconds=publication.pause_seconds if publication else 0.0,
        )
        row |= publication.phases if publication else {}
        row["groups_replaced"] = self._inbox.num_replaced
        row |= {f"dropped_{reason}": n for reason, n in sorted(self._inbox.dropped.items())}
        row |= {f"queue_{name}": depth for name, depth in self._progress.queues.items()}
        self.write(row)

    def close(self) -> None:
        """No more rows."""
        for journal in self._journals.values():
            journal.close()
