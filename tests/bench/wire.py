"""What a token costs on the wire, and to read from it: our format beside pickle and JSON.

    python -m tests.bench.wire --rounds 15

The same groups in each format, with every field. Rates are millions of completion tokens a CPU
second of this process, which has one thread, so that what else runs on the machine moves them
little. A round times everything once, in turn; reported are the medians over the rounds.

The comparison leans to the others: their lists are made before the clock starts and they decode
to whatever comes, while ours goes from records to checked records. "Into tensors" is from bytes to
a tensor of int32 ids and one of float32 log-probs for each completion, in every format.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import random
import statistics
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from services.learner.balance import PassCost
from services.learner.batch import Batch, MicroBatch, build_batch, collate, plan_micro_batches
from shared.codec import (
    decode_rollout_group,
    decode_scored_group,
    encode_prompt_group,
    encode_rollout_group,
    encode_scored_group,
)
from shared.config import RunConfig
from shared.records import (
    Completion,
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result

RESULT = RESULTS / "wire.json"
LIBRARIES = ("protobuf", "torch")
VOCABULARY = 151_936
POLICY_VERSION = 103
MAX_VERSION_RUNS = 3
NUM_GROUPS = 16
GROUP_SIZES = (8, 16)
PROMPT_TOKENS = (100, 1000)
COMPLETION_TOKENS = (256, 4096)
SHORT_TOKENS = (12, 32)
"""Of the demo's completions, to show what a group's other fields weigh there."""

OURS = "scored: protobuf"


class Format(NamedTuple):
    """A way to write a group; `tensors` takes what `decode` gives."""

    sources: Sequence[Any]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    tensors: Callable[[Any], list[tuple[Tensor, Tensor]]]


class Row(NamedTuple):
    """A line of the table; rates in millions of completion tokens a CPU second."""

    name: str
    bytes_per_token: float | None = None
    encode: float | None = None
    decode: float | None = None
    into_tensors: float | None = None


def make_groups(
    num_groups: int, *, prompt_tokens: tuple[int, int], completion_tokens: tuple[int, int]
) -> list[ScoredGroup]:
    """Groups as a run has them; common tokens have small ids and more than their share."""
    draw = random.Random(0)

    def token_ids(count: int) -> array[int]:
        rarest = math.log(VOCABULARY)
        return array("I", [int(math.exp(draw.uniform(0, rarest))) - 1 for _ in range(count)])

    def completion() -> Completion:
        count = draw.randint(*completion_tokens)
        cuts = sorted(draw.sample(range(1, count), draw.randrange(MAX_VERSION_RUNS)))
        runs = [end - start for start, end in zip([0, *cuts], [*cuts, count], strict=True)]
        return Completion(
            token_ids=token_ids(count),
            behaviour_logprobs=array("f", [-draw.expovariate(2) for _ in range(count)]),
            version_runs=tuple(VersionRun(100 + i, length) for i, length in enumerate(runs)),
            is_truncated=draw.random() < 0.1,
        )

    groups = []
    for index in range(num_groups):
        size = draw.randint(*GROUP_SIZES)
        prompt = PromptGroup(
            uid=GroupUid("qwen-math-7", 1, index, 0),
            purpose=Purpose.TRAIN,
            task="math",
            problem_index=draw.randrange(40_000),
            prompt_token_ids=token_ids(draw.randint(*prompt_tokens)),
            answer="\\frac{1 + \\sqrt{5}}{2}",
            group_size=size,
            temperature=1.0,
            max_completion_tokens=completion_tokens[1],
            min_policy_version=100,
            issued_at=time.time(),
        )
        completions = tuple(completion() for _ in range(size))
        rollout = RolloutGroup(prompt, completions, "rollout-3", time.time())
        scores = tuple(
            Score(Outcome.PASS, 1.0, "")
            if draw.random() < 0.5
            else Score(Outcome.FAIL, 0.0, "\\frac{1}{2} is not \\frac{1 + \\sqrt{5}}{2}")
            for _ in completions
        )
        groups.append(ScoredGroup(rollout, scores, "verifier-1", time.time()))
    return groups


def plain(value: Any) -> Any:
    """A record as dictionaries, lists and numbers, with every field."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | array):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def formats(groups: Sequence[ScoredGroup]) -> dict[str, Format]:
    """Ours, and the two others with arrays or with the lists that most systems send."""
    lists = [plain(group) for group in groups]
    return {
        OURS: Format(groups, encode_scored_group, decode_scored_group, record_tensors),
        "scored: pickle of our records": Format(groups, pickle.dumps, pickle.loads, record_tensors),
        "scored: pickle of lists": Format(lists, pickle.dumps, pickle.loads, list_tensors),
        "scored: JSON": Format(lists, _json, json.loads, list_tensors),
    }


def record_tensors(group: ScoredGroup) -> list[tuple[Tensor, Tensor]]:
    """Ids and log-probs of each completion, which are the memory of its arrays."""
    return [
        (
            torch.frombuffer(each.token_ids, dtype=torch.int32),
            torch.frombuffer(each.behaviour_logprobs, dtype=torch.float32),
        )
        for each in group.rollout.completions
    ]


def list_tensors(group: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """As `record_tensors`, from lists."""
    return [
        (
            torch.tensor(each["token_ids"], dtype=torch.int32),
            torch.tensor(each["behaviour_logprobs"], dtype=torch.float32),
        )
        for each in group["rollout"]["completions"]
    ]


def num_completion_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(each.token_ids) for group in groups for each in group.rollout.completions)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of one call; what it returns is freed after the clock stopped."""
    start = time.process_time()
    result = work()
    spent = time.process_time() - start
    del result
    return spent


def medians(
    works: Mapping[str, Callable[[], object]], rounds: int, console: Console
) -> dict[str, float]:
    """CPU seconds of each, after a call of each that allocates."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with Progressing(console, rounds * len(works)) as progress:
        for work in works.values():
            work()
        for _ in range(rounds):
            for name, work in works.items():
                seconds[name].append(cpu_seconds(work))
                progress.advance(name)
    return {name: statistics.median(each) for name, each in seconds.items()}


def format_works(name: str, form: Format) -> dict[str, Callable[[], object]]:
    payloads = [form.encode(source) for source in form.sources]
    return {
        f"{name}, encode": lambda: [form.encode(source) for source in form.sources],
        f"{name}, decode": lambda: [form.decode(payload) for payload in payloads],
        f"{name}, tensors": lambda: [form.tensors(form.decode(payload)) for payload in payloads],
    }


def micro_batches(batch: Batch, config: RunConfig) -> list[MicroBatch]:
    """All of the batch, as one rank makes them."""
    plan = plan_micro_batches(
        batch,
        range(len(batch.rows)),
        num_ranks=1,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        cost=PassCost(per_token=1),
    )
    return [collate(batch, rows) for rows in plan[0]]


def learner_works(groups: Sequence[ScoredGroup]) -> dict[str, Callable[[], object]]:
    """What the learner does with the records before its first forward pass."""
    run = {"name": "bench", "num_steps": 1}
    learner = {"groups_per_batch": len(groups)}
    config = RunConfig.model_validate({"run": run, "model": {"path": "bench"}, "learner": learner})
    payloads = [encode_scored_group(group) for group in groups]

    def build(records: Sequence[ScoredGroup]) -> Batch:
        return build_batch(records, config, policy_version=POLICY_VERSION)

    built = build(groups)
    return {
        "learner: build_batch": lambda: build(groups),
        "learner: collate": lambda: micro_batches(built, config),
        "learner: bytes to micro-batches": lambda: micro_batches(
            build([decode_scored_group(payload) for payload in payloads]), config
        ),
    }


def bytes_per_token(payloads: Sequence[bytes], groups: Sequence[ScoredGroup]) -> float:
    return round(sum(map(len, payloads)) / num_completion_tokens(groups), 3)


def run(
    groups: Sequence[ScoredGroup], short: Sequence[ScoredGroup], rounds: int, console: Console
) -> list[Row]:
    """All lines: the streams, the formats, the learner."""
    rollouts = Format(
        [group.rollout for group in groups], encode_rollout_group, decode_rollout_group, list
    )
    forms = {"rollouts: protobuf": rollouts, **formats(groups)}
    works = learner_works(groups)
    for name, form in forms.items():
        works.update(format_works(name, form))
    del works["rollouts: protobuf, tensors"]
    millions = num_completion_tokens(groups) / 1e6
    rates = {
        name: round(millions / spent, 2) for name, spent in medians(works, rounds, console).items()
    }
    prompts = [encode_prompt_group(group.rollout.prompt) for group in groups]
    rows = [Row("prompts: protobuf", bytes_per_token(prompts, groups))]
    for name, form in forms.items():
        payloads = [form.encode(source) for source in form.sources]
        size = bytes_per_token(payloads, groups)
        speeds = [rates.get(f"{name}, {what}") for what in ("encode", "decode", "tensors")]
        rows.append(Row(name, size, *speeds))
    size = bytes_per_token([encode_scored_group(group) for group in short], short)
    rows.append(Row(f"{OURS}, {SHORT_TOKENS[0]} to {SHORT_TOKENS[1]} tokens", size))
    return rows + [
        Row(name, into_tensors=rate) for name, rate in rates.items() if name.startswith("learner")
    ]


def table(rows: Sequence[Row], caption: str) -> Table:
    """Sizes and rates, those of another format of `scored` with how it stands to ours."""
    made = Table(
        title="A completion token on the wire; rates in Mtok a CPU second", caption=caption
    )
    made.add_column("stream: format")
    for name in ("bytes", "encode", "decode", "into tensors"):
        made.add_column(name, justify="right")
    ours = next(row for row in rows if row.name == OURS)
    for row in rows:
        is_other = row.name.startswith("scored") and row.encode is not None and row is not ours
        cells = [
            _cell(value, base if is_other else None)
            for value, base in zip(row[1:], ours[1:], strict=True)
        ]
        made.add_row(row.name, *cells)
    return made


def _cell(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if base is None else f"{value:.3g} ({value / base:.2g}x)"


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), default=bytes.decode).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description="What a token costs on the wire.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: at least 1")
    torch.set_num_threads(1)
    groups = make_groups(
        NUM_GROUPS, prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS
    )
    short = make_groups(NUM_GROUPS, prompt_tokens=SHORT_TOKENS, completion_tokens=SHORT_TOKENS)
    setting = Setting.of(f"tests.bench.wire --rounds {given.rounds}", packages=LIBRARIES)
    screen = console()
    rows = run(groups, short, given.rounds, screen)
    screen.print(table(rows, str(setting)))
    write_result(
        given.result,
        setting,
        completion_tokens=num_completion_tokens(groups),
        rows=[row._asdict() for row in rows],
    )


if __name__ == "__main__":
    main()
