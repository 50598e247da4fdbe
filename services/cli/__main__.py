"""`isentrope`: the command line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services.cli.launch import Plan
from services.cli.plan.arguments import add_plan_arguments
from shared.errors import IsentropeError

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, *, plan: Plan | None = None) -> int:
    """Do what the arguments say; the exit status: 0, 2 for bad input, 130 interrupted, else 1.

    Args:
        plan: what `up` starts instead of the services, for tests of the launcher itself.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end a run of hours.
            stream.reconfigure(errors="replace")
    given = _parser().parse_args(arguments, argparse.Namespace(plan=plan))
    command: Callable[[argparse.Namespace], int] = given.command
    try:
        return command(given)
    except IsentropeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="isentrope",
        description="Asynchronous RL of reasoning language models that keeps their entropy.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="run all services of a run on this machine")
    up.add_argument("file", type=Path, help="the run file (TOML)")
    up.add_argument("--run-id", help="default: the run's name and the time")
    up.add_argument("--resume", action="store_true", help="go on with the newest run of this name")
    up.add_argument("--plain", action="store_true", help="plain lines, also in a terminal")
    up.set_defaults(command=_up)
    for name, command, text in (
        ("report", _report, "draw the figures of a run, finished or not"),
        ("status", _status, "what a running run does now"),
        ("audit", _audit, "check that no prompt was lost, trained twice, or trained too stale"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("folder", type=Path, help="the run's folder")
        one.set_defaults(command=command)
    dead = commands.add_parser(
        "dead-letters", help="list what a running run gave up, put it back, or drop it"
    )
    dead.add_argument("folder", type=Path, help="the run's folder")
    deed = dead.add_mutually_exclusive_group()
    deed.add_argument(
        "--requeue",
        metavar="ID|all",
        help="back to the stream it came from; trained on if no other attempt was",
    )
    deed.add_argument("--drop", metavar="ID|all", help="forget it; the run goes on either way")
    dead.set_defaults(command=_dead_letters)
    users = commands.add_parser(
        "redis-users", help="make passwords and the access list for a Redis of one's own"
    )
    users.add_argument("folder", type=Path, help="where they are, or are to be")
    users.add_argument("--run-id", help="the only run they are for; default: every run")
    users.set_defaults(command=_redis_users)
    check = commands.add_parser("check", help="say whether a run file is right, and what it means")
    check.add_argument("file", type=Path, help="the run file (TOML)")
    check.set_defaults(command=_check)
    planning = commands.add_parser(
        "plan", help="how many replicas, how stale, how idle: by simulation of the run"
    )
    add_plan_arguments(planning)
    planning.set_defaults(command=_plan)
    _add_export(commands)
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="copy the trained model of a run, or make that of a checkpoint"
    )
    export.add_argument("folder", type=Path, help="the run's folder")
    export.add_argument("destination", type=Path, help="a folder that does not exist yet")
    export.add_argument(
        "--checkpoint",
        metavar="best|last|NAME",
        help="best by evaluation score, or as `isentrope status` names it, step-000140 say;"
        " default: what the finished run left",
    )
    export.set_defaults(command=_export)


def _up(given: argparse.Namespace) -> int:
    from services.cli.launch import plan_services
    from services.cli.up import Order, up

    return up(
        Order(given.file, run_id=given.run_id, is_resumed=given.resume, is_plain=given.plain),
        plan=given.plan or plan_services,
    )


def _report(given: argparse.Namespace) -> int:
    from services.cli.report import make_report
    from services.cli.run_folder import existing_run

    print(make_report(existing_run(given.folder)))
    return 0


def _status(given: argparse.Namespace) -> int:
    from services.cli.run_folder import existing_run
    from services.cli.status import print_status

    print_status(existing_run(given.folder))
    return 0


def _audit(given: argparse.Namespace) -> int:
    from services.cli.audit import print_audit
    from services.cli.run_folder import existing_run

    return print_audit(existing_run(given.folder))


def _dead_letters(given: argparse.Namespace) -> int:
    from services.cli.dead_letters import drop, requeue, show
    from services.cli.run_folder import existing_run

    folder = existing_run(given.folder)
    if given.requeue is not None:
        requeue(folder, given.requeue)
    elif given.drop is not None:
        drop(folder, given.drop)
    else:
        show(folder)
    return 0


def _redis_users(given: argparse.Namespace) -> int:
    from services.cli.redis_users import write_users

    write_users(given.folder, run_id=given.run_id)
    return 0


def _check(given: argparse.Namespace) -> int:
    from services.cli.check import describe, notice_lines
    from shared.config import load_run_with_notices

    config, notices = load_run_with_notices(given.file)
    print("\n".join([*describe(config), *notice_lines(notices)]))
    return 0


def _plan(given: argparse.Namespace) -> int:
    from services.cli.plan.command import plan

    return plan(given)


def _export(given: argparse.Namespace) -> int:
    from services.cli.export import export_checkpoint, export_model
    from services.cli.run_folder import existing_run

    folder, destination = existing_run(given.folder), given.destination
    if given.checkpoint is None:
        export_model(folder, destination)
    elif (status := export_checkpoint(folder, destination, given.checkpoint)) != 0:
        return status
    print(destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
