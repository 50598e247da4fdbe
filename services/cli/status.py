"""`isentrope status`: one look at a running run."""

from __future__ import annotations

import asyncio

from services.cli.law import law_lines
from services.cli.observer import Observer, View
from services.cli.progress import services_table
from services.cli.run_folder import RunFolder
from shared.config import load_run
from shared.errors import StartError


def print_status(folder: RunFolder) -> None:
    """The learner's account of itself, and everyone who holds a lease.

    Raises:
        StartError: nothing of this run runs.
    """
    view = asyncio.run(_look(folder, redis_url_of(folder)))
    if not view.services:
        reason = view.trouble or "no service holds a lease"
        raise StartError(f"{folder.path}: nothing runs ({reason}); {_remedy(folder)}")
    _print(view)


async def _look(folder: RunFolder, redis_url: str) -> View:
    observer = Observer(redis_url=redis_url, run_id=folder.run_id, metrics=folder.metrics)
    try:
        return await observer.look()
    finally:
        await observer.close()


def redis_url_of(folder: RunFolder) -> str:
    """Where the Redis of a run that runs is.

    Raises:
        StartError: the run does not run.
    """
    try:
        return folder.redis_url_file.read_text("utf8").strip()
    except FileNotFoundError:
        raise StartError(
            f"{folder.path}: nothing runs (no {folder.redis_url_file.name} file); {_remedy(folder)}"
        ) from None


def _remedy(folder: RunFolder) -> str:
    directory = load_run(folder.run_file).run.directory
    return (
        f"start it with: isentrope up {folder.run_file} --resume --run-id {folder.run_id}"
        f" (in the folder that has {directory}/)"
    )


def _print(view: View) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    learner = view.learner
    if learner is None:
        console.print("learner: does not answer")
    else:
        depths = ", ".join(
            f"{name} {depth}" for name, depth in sorted(learner.queue_depths.items())
        )
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
        if "law_identifiable" in learner.metrics:
            facts += [
                (name, f"{figure}  {qualifier}".rstrip())
                for name, figure, qualifier in law_lines(learner.metrics)
            ]
        for name, text in facts:
            console.print(f"{name:<20}{text}", markup=False)
    console.print(services_table(view))
