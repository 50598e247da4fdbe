"""A vLLM replica that decodes while versions arrive: how long it pauses, and what it loses."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from services.rollout.engine import VllmEngine
from services.rollout.vllm_launch import EngineSettings
from shared.broadcast import GroupSpec, open_group, open_store
from shared.buckets import ParameterSpec, StagedWeights
from shared.weight_transfer import send_weights
from tests.bench.benchmark import median_interval
from tests.bench.publish_wire import DEADLINE_SECONDS, PLAIN, Peers, broadcast_plainly

SEQUENCES = 16
COMPLETION_TOKENS = 200
BUCKET_BYTES = 16 << 20
QUIET_SECONDS = 1.0


class PauseRow(NamedTuple):
    """Medians of the updates; `tokens_lost` is what decoding would have made without an update.

    `plain_seconds` is a plain broadcast of the same bytes to an idle process, while the replica
    decodes as it does during an update; `total_seconds` is from the begin to the commit's answer.
    """

    megabytes: int
    sequences: int
    updates: int
    plain_seconds: float
    receive_seconds: float
    load_seconds: float
    pause_seconds: float
    total_seconds: float
    pause_share: float
    tokens_per_second: float
    tokens_lost: float
    tokens_lost_low: float
    tokens_lost_high: float


class Update(NamedTuple):
    """What one round measured; the rate is that of the quiet second before it."""

    plain_seconds: float
    receive_seconds: float
    load_seconds: float
    pause_seconds: float
    total_seconds: float
    rate: float
    tokens: int


class Decoding:
    """Requests that run all the time, and a count of their tokens."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._finished = 0
        self._running: dict[str, int] = {}
        self._tasks = [asyncio.create_task(self._repeat(first)) for first in range(SEQUENCES)]

    async def _repeat(self, first: int) -> None:
        # Started apart from each other, so that they do not all end, and prefill, at once.
        length = COMPLETION_TOKENS * (first + 1) // SEQUENCES
        while True:
            name = f"request {next(self._numbers)}"
            self._running[name] = 0
            await self._engine.generate(
                [1, 2, 3],
                temperature=1.0,
                max_completion_tokens=length,
                stop_token_ids=(),
                request_id=name,
            )
            del self._running[name]
            self._finished += length
            length = COMPLETION_TOKENS

    @property
    def tokens(self) -> int:
        """Sampled so far; a request that has ended keeps its count until it is asked for."""
        for name in self._running:
            arrived = self._engine.progress(name, start=0)
            if arrived is not None:
                self._running[name] = len(arrived.token_ids)
        return self._finished + sum(self._running.values())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Replica:
    """The engine, a learner's side of its group, and an idle process for plain broadcasts."""

    def __init__(self, engine: VllmEngine, model: Qwen2ForCausalLM) -> None:
        self._engine = engine
        self._tensors = [(name, weight.detach()) for name, weight in model.named_parameters()]
        self._manifest = tuple(
            ParameterSpec(name, "float32", tuple(weight.shape)) for name, weight in self._tensors
        )
        self._staged = StagedWeights(self._manifest, bucket_bytes=BUCKET_BYTES)
        self._sizes = [bucket.num_bytes for bucket in self._staged.buckets]
        self._memory = torch.ones(max(self._sizes), dtype=torch.uint8)
        self._peers = Peers(self._manifest, bucket_bytes=BUCKET_BYTES, receivers=1)
        self._store = open_store("127.0.0.1")
        self.num_bytes = self._staged.num_bytes

    async def connect(self) -> None:
        spec = GroupSpec(
            1, "gloo", "127.0.0.1", self._store.port, "replica", 1, 2, DEADLINE_SECONDS
        )
        mine = replace(spec, rank=0).for_worker(0)
        self._group, _ = await asyncio.gather(
            asyncio.to_thread(open_group, mine, self._store), self._engine.join_group(spec)
        )

    async def broadcast_plainly(self) -> float:
        """Seconds."""

        def send() -> None:
            broadcast_plainly(self._peers.groups, self._memory, self._sizes, under_way=1)

        return (await asyncio.to_thread(self._peers.time, PLAIN, send)).seconds

    async def update(self, version: int, decoding: Decoding | None) -> Update:
        """One round: decode undisturbed, beside a plain broadcast, and over an update."""
        first, started = decoding.tokens if decoding else 0, time.monotonic()
        await asyncio.sleep(QUIET_SECONDS if decoding else 0)
        quiet = (decoding.tokens if decoding else 0) - first
        rate = quiet / (time.monotonic() - started)
        plain_seconds = await self.broadcast_plainly()
        first, started = decoding.tokens if decoding else 0, time.monotonic()
        await self._engine.begin_update(version, self._manifest, bucket_bytes=BUCKET_BYTES)
        sent = await asyncio.to_thread(
            send_weights,
            [self._group],
            self._tensors,
            self._manifest,
            bucket_bytes=BUCKET_BYTES,
            staged=self._staged,
        )
        report = await self._engine.commit_update(
            version, expected_checksum=sent.checksum, timeout_seconds=DEADLINE_SECONDS
        )
        seconds = time.monotonic() - started
        tokens = (decoding.tokens if decoding else 0) - first
        return Update(
            plain_seconds,
            report.receive_seconds,
            report.load_seconds,
            report.pause_seconds,
            seconds,
            rate,
            tokens,
        )

    def close(self) -> None:
        self._group.close()
        self._peers.close()


async def measure_pause(updates: int) -> PauseRow:
    """Start vLLM on a random model, keep it busy, update it so many times."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        engine = await VllmEngine.start(settings_for(Path(folder)))
    try:
        replica = Replica(engine, model)
        await replica.connect()
        await replica.update(1, None)
        decoding = Decoding(engine)
        # The first allocates, and finds requests that have only just begun.
        measured = [await replica.update(2 + index, decoding) for index in range(updates + 1)][1:]
        await decoding.close()
        replica.close()
    finally:
        await engine.shutdown()
    return pause_row(measured, megabytes=round(replica.num_bytes / 1e6))


def settings_for(model_path: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(model_path),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=SEQUENCES,
        seed=1,
        device="cpu",
        kv_cache_bytes=128 << 20,
        load_format="dummy",
    )


def pause_row(measured: Sequence[Update], *, megabytes: int) -> PauseRow:
    lost = [each.rate * each.total_seconds - each.tokens for each in measured]
    low, high = median_interval(lost)

    def median(name: str) -> float:
        return round(float(statistics.median(getattr(each, name) for each in measured)), 4)

    return PauseRow(
        megabytes=megabytes,
        sequences=SEQUENCES,
        updates=len(measured),
        plain_seconds=median("plain_seconds"),
        receive_seconds=median("receive_seconds"),
        load_seconds=median("load_seconds"),
        pause_seconds=median("pause_seconds"),
        total_seconds=median("total_seconds"),
        pause_share=round(
            statistics.median(each.pause_seconds / each.total_seconds for each in measured), 3
        ),
        tokens_per_second=round(median("rate"), 1),
        tokens_lost=round(statistics.median(lost), 1),
        tokens_lost_low=round(low, 1),
        tokens_lost_high=round(high, 1),
    )
