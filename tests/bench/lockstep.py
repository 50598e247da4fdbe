"""One training run in one process and lockstep: sample with vLLM, train with DeepSpeed, in turn.

    python -m tests.bench.lockstep --config run.toml --rows rows.jsonl

What `isentrope up` runs at the same time on services, this runs one after the other on the same
engine classes, so that a run depends on its run file and nothing else: neither on the load of the
machine nor on who was faster. Every batch is exactly `--lag` versions stale, but for the first
ones, which the weights of the start sampled. The rows are those of metrics.jsonl, the last one with
`final`: more samples of every held-out problem.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from services.learner.engine import LearnerEngine
from services.learner.feeder import make_group
from services.learner.ledger import Ledger
from services.rollout.engine import VllmEngine
from services.rollout.vllm_launch import EngineSettings
from shared.broadcast import GroupSpec, open_group, open_store
from shared.config import Environment, RunConfig, load_run
from shared.records import (
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
)
from shared.tasks.registry import load_task
from shared.tasks.task import Problem, Split, Task
from shared.tokenizer import Tokenizer
from shared.weight_transfer import send_weights

RUN_ID = "lockstep"
MAX_SEQUENCES = 256
KV_CACHE_BYTES = 256 << 20
CONTROL_SECONDS = 120.0


class Sampler:
    """vLLM, and the task's scorer in this process: the task is ours and trusted."""

    def __init__(self, engine: VllmEngine, task: Task, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._task = task
        self._tokenizer = tokenizer

    async def sample(self, groups: Sequence[PromptGroup]) -> list[ScoredGroup]:
        """Every group, completed and scored."""
        return list(await asyncio.gather(*(self._sample_group(group) for group in groups)))

    async def _sample_group(self, group: PromptGroup) -> ScoredGroup:
        completions = await asyncio.gather(
            *(
                self._engine.generate(
                    group.prompt_token_ids,
                    temperature=group.temperature,
                    max_completion_tokens=group.max_completion_tokens,
                    stop_token_ids=self._tokenizer.stop_token_ids,
                    request_id=f"{group.uid}/{group.purpose.value}/{number}",
                )
                for number in range(group.group_size)
            )
        )
        scores = []
        for completion in completions:
            verdict = self._task.score(
                self._tokenizer.decode(completion.token_ids), answer=group.answer
            )
            outcome = Outcome.PASS if verdict.is_pass else Outcome.FAIL
            scores.append(Score(outcome, verdict.reward, ""))
        rollout = RolloutGroup(group, tuple(completions), "rollout-0", time.time())
        return ScoredGroup(rollout, tuple(scores), "verifier-0", time.time())


class Run:
    """A run under way."""

    def __init__(
        self, config: RunConfig, learner: LearnerEngine, engine: VllmEngine, rows: IO[str]
    ) -> None:
        self._config = config
        self._learner = learner
        self._engine = engine
        self._rows = rows
        self._task = load_task(config.task.name, config.task.params)
        self._tokenizer = Tokenizer(config.model_path)
        self._sampler = Sampler(engine, self._task, self._tokenizer)
        self._problems = self._task.problems("train")
        self._ledger = Ledger(RUN_ID, len(self._problems), config.run.seed)
        self._store = open_store("127.0.0.1")

    async def train(self, *, lag: int, final_samples: int) -> None:
        """All steps, each on a batch that was sampled `lag` versions ago."""
        await self._connect()
        every = self._config.evaluation.every_steps
        if every:
            await self._evaluate(0)
        batches = deque([await self._sample_batch() for _ in range(lag)])
        for step in range(1, self._config.run.num_steps + 1):
            batches.append(await self._sample_batch())
            report = self._learner.train(batches.popleft(), step=step, policy_version=step - 1)
            await self._publish(step)
            self._write({"step": step, "policy_version": step, **report.metrics})
            if every and step % every == 0:
                await self._evaluate(step)
        await self._evaluate_finally(final_samples)

    async def _connect(self) -> None:
        await self._engine.adopt_version(0)
        spec = GroupSpec(
            1, "gloo", "127.0.0.1", self._store.port, "1/rollout-0", 1, 2, CONTROL_SECONDS
        )
        mine = replace(spec, rank=0).for_worker(0)
        self._group, _ = await asyncio.gather(
            asyncio.to_thread(open_group, mine, self._store), self._engine.join_group(spec)
        )

    async def _publish(self, version: int) -> None:
        manifest = self._learner.manifest()
        size = self._config.weights.bucket_mib << 20
        await self._engine.begin_update(version, manifest, bucket_bytes=size)
        sent = await asyncio.to_thread(
            send_weights, [self._group], self._learner.weights(), manifest, bucket_bytes=size
        )
        for error in sent.failed.values():
            raise error
        await self._engine.commit_update(
            version, expected_checksum=sent.checksum, timeout_seconds=CONTROL_SECONDS
        )

    async def _sample_batch(self) -> list[ScoredGroup]:
        uids = [self._ledger.issue_next() for _ in range(self._config.learner.groups_per_batch)]
        for uid in uids:
            self._ledger.finish(self._ledger.position(uid))
        problems = [self._problems[self._ledger.problem_index(uid)] for uid in uids]
        return await self._sampler.sample(
            [self._group_of(uid, problem) for uid, problem in zip(uids, problems, strict=True)]
        )

    async def _evaluate(self, step: int) -> None:
        evaluation = self._config.evaluation
        problems = self._task.problems("eval")[: evaluation.num_problems]
        shares = await self._solved_shares(problems, step=step, samples=evaluation.group_size)
        self._write(
            {
                "step": step,
                "eval_step": step,
                "eval_policy_version": step,
                "eval_score": statistics.fmean(shares),
                "eval_pass_at_k": statistics.fmean(share > 0 for share in shares),
            }
        )

    async def _evaluate_finally(self, samples: int) -> None:
        """Shares of solved samples by problem, of both held-out splits."""
        step = self._config.run.num_steps
        final: dict[str, Any] = {"samples": samples}
        splits: tuple[Split, ...] = ("eval", "hard")
        for split in splits:
            problems = self._task.problems(split)
            final[split] = await self._solved_shares(problems, step=step, samples=samples)
        self._write({"step": step, "final": final})

    async def _solved_shares(
        self, problems: Sequence[Problem], *, step: int, samples: int
    ) -> list[float]:
        groups = [
            replace(
                self._group_of(GroupUid(RUN_ID, step, index, 0), problem, Purpose.EVAL),
                group_size=samples,
            )
            for index, problem in enumerate(problems)
        ]
        scored = await self._sampler.sample(groups)
        return [statistics.fmean(score.reward for score in group.scores) for group in scored]

    def _group_of(
        self, uid: GroupUid, problem: Problem, purpose: Purpose = Purpose.TRAIN
    ) -> PromptGroup:
        return make_group(
            self._config,
            self._tokenizer,
            uid=uid,
            purpose=purpose,
            problem=problem,
            problem_index=0,
            policy_version=0,
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()


async def run(config: RunConfig, rows: Path, *, lag: int, final_samples: int) -> None:
    """Train as `config` says; `rows` appears under its name once the run is complete."""
    engine = await VllmEngine.start(
        EngineSettings(
            model_path=config.model_path,
            dtype=config.model.dtype,
            max_model_len=config.model.max_length,
            max_num_seqs=MAX_SEQUENCES,
            seed=config.run.seed,
            device="cpu",
            kv_cache_bytes=KV_CACHE_BYTES,
        )
    )
    unfinished = rows.with_suffix(".part")
    try:
        learner = LearnerEngine.start(config, config.model_path, Environment.read({}))
        with contextlib.closing(learner), unfinished.open("w", encoding="utf8") as file:
            await Run(config, learner, engine, file).train(lag=lag, final_samples=final_samples)
    finally:
        await engine.shutdown()
    os.replace(unfinished, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="One training run, in lockstep.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--lag", type=int, default=0)
    parser.add_argument("--final-samples", type=int, default=32)
    given = parser.parse_args()
    asyncio.run(
        run(load_run(given.config), given.rows, lag=given.lag, final_samples=given.final_samples)
    )


if __name__ == "__main__":
    main()
