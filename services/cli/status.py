"""`isentrope status`: one look at a running run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.cli.checkpoints import checkpoints_text
from services.cli.law import law_lines
from services.cli.measurements import read_rows
from services.cli.observer import LearnerView, Observer, ServiceView, View, own_credentials
from services.cli.progress import services_table
from services.cli.run_folder import RunFolder
from services.cli.words import duration
from shared.config import Environment, load_run
from shared.errors import StartError


def print_status(folder: RunFolder) -> None:
    """The learner's account of itself, then everyone who holds a lease and what each is at.

    Raises:
        StartError: nothing of this run runs.
    """
    view = asyncio.run(_look(folder, redis_url_of(folder)))
    if not view.services:
        reason = view.trouble or "no service holds a lease"
        raise StartError(f"{folder.path}: nothing runs ({reason}); {_remedy(folder)}")
    _print(view, checkpoints_text(folder, read_rows(folder.metrics)))


async def _look(folder: RunFolder, redis_url: str) -> View:
    observer = Observer(
        redis_url=redis_url,
        run_id=folder.run_id,
        metrics=folder.metrics,
        tls=own_credentials(),
    )
    try:
        return await observer.look()
    finally:
        await observer.close()


def redis_url_of(folder: RunFolder) -> str:
    """Where the Redis of a run that runs is: as `isentrope up` wrote down, or as a cluster says.

    Raises:
        StartError: the run does not run.
    """
    try:
        return folder.redis_url_file.read_text("utf8").strip()
    except FileNotFoundError:
        if (given := Environment.read().redis_url) is not None:
            return given
        raise StartError(
            f"{folder.path}: nothing runs (no {folder.redis_url_file.name} file); {_remedy(folder)}"
        ) from None


def _remedy(folder: RunFolder) -> str:
    if not folder.run_file.is_file():
        return "the learner makes run.toml there when it starts; in a pod look at its log"
    directory = load_run(folder.run_file).run.directory
    return (
        f"start it with: isentrope up {folder.run_file} --resume --run-id {folder.run_id}"
        f" (in the folder that has {directory}/)"
    )


def _print(view: View, checkpoints: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    facts = _learner_facts(view.learner) if view.learner else [("learner", "does not answer")]
    facts += [("checkpoints", checkpoints)] if checkpoints else []
    for name, text in facts:
        console.print(f"{name:<20}{text}", markup=False, soft_wrap=True)
    console.print(services_table(view))
    for name, text in _accounts(view.services):
        console.print(f"{name:<20}{text}", markup=False, soft_wrap=True)


def _learner_facts(learner: LearnerView) -> list[tuple[str, str]]:
    depths = ", ".join(f"{name} {depth}" for name, depth in sorted(learner.queue_depths.items()))
    facts = [
        ("step", f"{learner.step} of {learner.num_steps}"),
        ("policy version", str(learner.policy_version)),
        ("doing", ("paused: " if learner.is_paused else "") + learner.activity),
        ("waiting on streams", depths),
        *[
            (name.replace("_", " "), f"{learner.metrics[name]:.4g}")
            for name in ("reward_mean", "eval_score", "entropy", "entropy_coefficient")
            if name in learner.metrics
        ],
    ]
    if learner.is_stalled:
        facts.insert(3, ("stalled", f"no step for {duration(learner.seconds_without_step)}"))
    if "law_identifiable" in learner.metrics:
        facts += [
            (name, f"{figure}  {qualifier}".rstrip())
            for name, figure, qualifier in law_lines(learner.metrics)
        ]
    return facts


def _accounts(services: Sequence[ServiceView]) -> list[tuple[str, str]]:
    """What each service says that it does, the worst first."""

    def rank(each: ServiceView) -> tuple[bool, bool, float]:
        return (each.answers, not each.is_stalled, -each.progress_age_seconds)

    accounts = []
    for each in sorted(services, key=rank):
        text = each.activity if each.answers else "does not answer"
        if text:
            accounts.append((each.member.name, ("stalled: " if each.is_stalled else "") + text))
    return accounts
