"""How a batch gets to the learner's ranks: from rank 0, or by each rank's own reading of Redis.

    python -m tests.bench.data_path --rounds 9

Two ranks on gloo, as the learner joins them, and a real Redis that holds the batch. In turn:

- handed out, as it is: rank 0, which has read the groups and admitted them, sends each rank the
  tokens of its own rows;
- read by each: rank 0 says which rows and entries, and each rank, itself too, reads and decodes
  the groups that its rows are in. Beside this rank 0 has read all of them once to admit them.

The clock runs from a prepared batch to when both ranks have their tokens; the bytes are those that
Redis sends for it. The batch itself is prepared while the step before is computed: what that takes
is measured alone. Rows are balanced over ranks one by one, so a group of many completions has
rows on many of them, each of which reads it whole: the second table counts that for more ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import redis
import torch
from rich.table import Table

from services.learner.balance import PassCost, rows_by_rank
from services.learner.batch import Batch, build_batch, plan_micro_batches
from services.learner.prepared import Prepared
from services.learner.ranks import Command, Opcode, Ranks
from services.learner.shares import pack_rows, pack_tokens, take_share, unpack_rows
from shared.codec import decode_scored_group, encode_scored_group
from shared.config import Environment, RunConfig
from shared.records import ScoredGroup
from shared.redis_server import embedded_redis
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.wire import (
    COMPLETION_TOKENS,
    POLICY_VERSION,
    PROMPT_TOKENS,
    make_groups,
    num_completion_tokens,
)

RESULT = RESULTS / "data-path.json"
LIBRARIES = ("torch", "redis")
DEADLINE_SECONDS = 60.0
NUM_RANKS = 2
MANY_RANKS = (2, 8, 64)
MICRO_BATCH_TOKENS = 16_384

PREPARED, HANDED_OUT, READ_BY_EACH = "prepared", "handed out", "read by each"
KEY, FIELD = "scored", b"d"


class Reading(NamedTuple):
    """What ranks that read for themselves take from Redis.

    Attributes:
        groups: of the batch, that a rank reads; the mean.
        amplification: bytes that Redis sends, of the batch's bytes.
    """

    num_ranks: int
    groups: float
    amplification: float


def shares(batch: Batch, num_ranks: int) -> list[list[int]]:
    """The rows of each rank, as the trainer deals them."""
    plans = [
        plan_micro_batches(
            batch,
            rows,
            num_ranks=num_ranks,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            cost=PassCost(per_token=1),
        )
        for rows in batch.minibatches
    ]
    return rows_by_rank(plans, num_ranks)


def groups_of(batch: Batch, rows: Sequence[int]) -> list[int]:
    return sorted({batch.rows[row].group for row in rows})


def reading(batch: Batch, sizes: Sequence[int], num_ranks: int) -> Reading:
    """For `sizes`, bytes of each group's entry."""
    read = [groups_of(batch, rows) for rows in shares(batch, num_ranks)]
    num_bytes = sum(sizes[group] for groups in read for group in groups)
    mean = statistics.fmean(len(groups) for groups in read)
    return Reading(num_ranks, round(mean, 1), round(num_bytes / sum(sizes), 2))


def read_rows(
    client: Any, batch: Batch, rows: Sequence[int], ids: Sequence[bytes]
) -> list[array[int]]:
    """The rows' tokens, from the entries of the groups that they are in."""
    groups = groups_of(batch, rows)
    asked = client.pipeline(transaction=False)
    for group in groups:
        asked.xrange(KEY, min=ids[group], max=ids[group])
    found = {
        group: decode_scored_group(entries[0][1][FIELD]).rollout
        for group, entries in zip(groups, asked.execute(), strict=True)
    }
    first = {row.group: number for number, row in reversed(list(enumerate(batch.rows)))}
    token_ids = []
    for number in rows:
        rollout = found[batch.rows[number].group]
        completion = rollout.completions[number - first[batch.rows[number].group]]
        token_ids.append(rollout.prompt.prompt_token_ids + completion.token_ids)
    return token_ids


def join(rank: int, port: int) -> Ranks:
    return Ranks.join(Environment(None, None, rank, rank, NUM_RANKS, "127.0.0.1", port))


def follow(port: int, url: str, pipe: Connection) -> None:
    """The other rank's process: answers each command when it has its tokens."""
    torch.set_num_threads(1)
    client, ranks = redis.Redis.from_url(url), join(1, port)
    while (command := ranks.receive()).opcode is not Opcode.CLOSE:
        rows, ids = command.payload[: command.first], command.payload[command.first :]
        batch = unpack_rows(rows)
        mine = shares(batch, NUM_RANKS)[1]
        if ids:
            read_rows(client, batch, mine, ids.split(b" "))
        else:
            take_share(batch, mine, ranks)
        pipe.send(None)
    torch.distributed.destroy_process_group()


def prepare(groups: Sequence[ScoredGroup], config: RunConfig) -> Prepared:
    """As the engine does for two ranks, but for the plan, of which `shares` makes its own."""
    batch = build_batch(groups, config, policy_version=POLICY_VERSION)
    tokens = tuple(pack_tokens(batch, rows) for rows in shares(batch, NUM_RANKS)[1:])
    return Prepared(batch, (), pack_rows(batch), tokens)


class Leader:
    """Rank 0, and the other rank's process."""

    def __init__(self, url: str, prepared: Prepared, ids: Sequence[bytes]) -> None:
        self._client = redis.Redis.from_url(url)
        self._prepared, self._ids = prepared, ids
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        port = free_port()
        self._process = spawn.Process(target=follow, args=(port, url, theirs), daemon=True)
        self._process.start()
        self._ranks = join(0, port)

    def hand_out(self) -> None:
        packed = self._prepared.rows
        self._ranks.send(Command(Opcode.TRAIN, len(packed), payload=packed))
        self._ranks.hand_out(self._prepared.tokens)
        self._await()

    def let_read(self) -> None:
        batch, packed = self._prepared.batch, self._prepared.rows
        payload = packed + b" ".join(self._ids)
        self._ranks.send(Command(Opcode.TRAIN, len(packed), payload=payload))
        read_rows(self._client, batch, shares(batch, NUM_RANKS)[0], self._ids)
        self._await()

    def close(self) -> None:
        self._ranks.send(Command(Opcode.CLOSE))
        torch.distributed.destroy_process_group()
        self._process.join(DEADLINE_SECONDS)

    def _await(self) -> None:
        if not self._pipe.poll(DEADLINE_SECONDS):
            raise TimeoutError("the other rank is silent")
        self._pipe.recv()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    groups: Sequence[ScoredGroup], config: RunConfig, rounds: int, progress: Progressing
) -> dict[str, float]:
    """Median seconds of preparing and of either way, in turn; the first round is not counted."""
    prepared = prepare(groups, config)
    with tempfile.TemporaryDirectory() as folder, embedded_redis(Path(folder)) as url:
        client: Any = redis.Redis.from_url(url)
        ids = [client.xadd(KEY, {FIELD: encode_scored_group(group)}) for group in groups]
        leader = Leader(url, prepared, ids)
        ways: dict[str, Callable[[], object]] = {
            PREPARED: lambda: prepare(groups, config),
            HANDED_OUT: leader.hand_out,
            READ_BY_EACH: leader.let_read,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
                progress.advance(name)
        leader.close()
    return {name: round(statistics.median(each[1:]), 4) for name, each in seconds.items()}


def tables(
    seconds: dict[str, float], readings: Sequence[Reading], millions: float, caption: str
) -> list[Table]:
    ways = Table(title=f"{millions:.2f} million completion tokens to {NUM_RANKS} ranks")
    for name in ("way", "seconds", "over handing out"):
        ways.add_column(name, justify="left" if name == "way" else "right")
    for name, each in seconds.items():
        ways.add_row(name, f"{each:.3f}", f"{each / seconds[HANDED_OUT]:.2f}")
    amount = Table(title="Ranks that read for themselves", caption=caption)
    for name in ("ranks", "groups that one reads", "bytes from Redis over the batch's"):
        amount.add_column(name, justify="right")
    for each_reading in readings:
        amount.add_row(*(f"{each:g}" for each in each_reading))
    return [ways, amount]


def main() -> None:
    parser = argparse.ArgumentParser(description="How a batch gets to the learner's ranks.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.rounds < 1 or given.groups < 1:
        parser.error(f"--rounds {given.rounds} --groups {given.groups}: at least 1")
    torch.set_num_threads(1)
    groups = make_groups(
        given.groups, prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS
    )
    run = {"name": "bench", "num_steps": 1}
    config = RunConfig.model_validate(
        {"run": run, "model": {"path": "b"}, "learner": {"groups_per_batch": given.groups}}
    )
    batch = build_batch(groups, config, policy_version=POLICY_VERSION)
    sizes = [len(encode_scored_group(group)) for group in groups]
    readings = [reading(batch, sizes, num_ranks) for num_ranks in MANY_RANKS]
    command = f"tests.bench.data_path --rounds {given.rounds} --groups {given.groups}"
    setting = Setting.of(command, packages=LIBRARIES)
    screen = console()
    with Progressing(screen, 3 * (given.rounds + 1)) as progress:
        seconds = measure(groups, config, given.rounds, progress)
    millions = num_completion_tokens(groups) / 1e6
    for each in tables(seconds, readings, millions, str(setting)):
        screen.print(each)
    write_result(
        given.result,
        setting,
        completion_tokens=num_completion_tokens(groups),
        rows=len(batch.rows),
        batch_bytes=sum(sizes),
        seconds=seconds,
        reading=[each._asdict() for each in readings],
    )


if __name__ == "__main__":
    main()
