"""The options of `isentrope plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

RUN_ONLY = ("batch_cost",)
MODEL_ONLY = (
    "gpu", "learner_gpus", "replica_gpus", "response_mean", "response_max", "prompt_tokens",
    "verify_seconds", "mfu", "bandwidth_share", "compute_share", "engine_seconds",
    "network_gb_per_second",
)  # fmt: skip


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Where rates come from, what is asked, how it is shown; None is what was not given."""
    source = parser.add_argument_group("where the rates come from").add_mutually_exclusive_group(
        required=True
    )
    source.add_argument("--from", dest="run", type=Path, metavar="RUN", help="a run's folder")
    source.add_argument("--parameters", type=float, metavar="N", help="of the model, as 7e9")
    source.add_argument("--model", type=Path, metavar="FOLDER", help="its config.json is read")
    _add_hardware(parser.add_argument_group("without a run: reckoned, not measured"))
    measured = parser.add_argument_group("with a run")
    measured.add_argument(
        "--batch-cost",
        type=float,
        metavar="SHARE",
        help="of a token's time that grows with the number of sequences (default 0)",
    )
    _add_shape(parser.add_argument_group("the fleets to compare (with --from: else as the run)"))
    parser.add_argument("--steps", type=int, default=40, help="simulated steps (40)")
    parser.add_argument("--seeds", type=int, default=3, help="simulations of each fleet (3)")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture (.png, .svg, .pdf)")


def _add_hardware(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpu", help="type, such as h100; a wrong one lists all")
    group.add_argument("--learner-gpus", type=int, metavar="N", help="of the learner (8)")
    group.add_argument("--replica-gpus", type=int, metavar="N", help="of one replica (1)")
    group.add_argument("--response-mean", type=float, metavar="TOKENS", help="before the cut")
    group.add_argument("--response-max", type=int, metavar="TOKENS", help="cut there (2 p99)")
    group.add_argument("--prompt-tokens", type=float, metavar="TOKENS", help="(512)")
    group.add_argument(
        "--verify-seconds", type=float, metavar="S", help="one completion, one process (0.05)"
    )
    group.add_argument("--mfu", type=float, help="share of bf16 peak in training (0.35)")
    group.add_argument("--bandwidth-share", type=float, help="of peak, in decoding (0.7)")
    group.add_argument("--compute-share", type=float, help="of peak, in decoding (0.5)")
    group.add_argument("--engine-seconds", type=float, help="overhead of a token (0.002)")
    group.add_argument("--network-gb-per-second", type=float, help="to each replica (12.5)")


def _add_shape(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--replicas", type=int, nargs="+", help="(around the balance)")
    group.add_argument("--max-staleness", type=int, nargs="+", help="(2)")
    group.add_argument("--batch-groups", type=int, metavar="N", help="groups of a batch (64)")
    group.add_argument("--group-size", type=int, metavar="N", help="completions of a prompt (8)")
    group.add_argument(
        "--max-concurrent-groups",
        type=int,
        metavar="N",
        help="held by one replica (32, or what fits)",
    )
    group.add_argument("--verifiers", type=int, metavar="N", help="scoring processes (16)")
    group.add_argument(
        "--response-p99", type=float, metavar="TOKENS", help="of completion lengths (4 means)"
    )
