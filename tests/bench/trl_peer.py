"""TRL's GRPO trainer on the built-in task, timed; run by `tests.bench.trl_paired`, with TRL there.

    python -m tests.bench.trl_peer ORDER.json > REPORT.json

The model generates in the same process, as TRL does without vLLM. Of each batch the report has
what generating, measuring (the log-probs before the first of several optimiser steps) and training
took, and all of it by the clock, and of the last one the tokens and rewards.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shared.tasks.registry import load_task
from shared.tokenizer import Tokenizer


class Order(NamedTuple):
    """What TRL is to do; `learning_rate` and so on as in a run file."""

    model: str
    threads: int
    batches: int
    groups: int
    group_size: int
    optimizer_steps: int
    max_completion_tokens: int
    learning_rate: float
    seed: int


def settings(order: Order, folder: str) -> Any:
    """TRL's configuration: PPO's clip, no reference model, no extras that cost time."""
    rows = order.groups * order.group_size // order.optimizer_steps
    return importlib.import_module("trl").GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        steps_per_generation=order.optimizer_steps,
        num_generations=order.group_size,
        max_completion_length=order.max_completion_tokens,
        max_steps=order.batches * order.optimizer_steps,
        learning_rate=order.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        seed=order.seed,
        beta=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Timer:
    """Seconds by part: CPU seconds of one thread, which a busy machine moves little."""

    def __init__(self, threads: int) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def time(self, part: str, method: Any, *arguments: Any, **named: Any) -> Any:
        started = self.now()
        result = method(*arguments, **named)
        self.seconds[part] += self.now() - started
        return result


def timed_trainer(timer: Timer) -> Any:
    """The trainer's class, whose parts are timed."""
    trainer: Any = importlib.import_module("trl").GRPOTrainer

    class Timed(trainer):  # type: ignore[misc]
        def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
            method = super()._generate_single_turn
            return timer.time("generate", method, *arguments, **named)

        def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
            method = super()._get_per_token_logps_and_entropies
            if torch.is_grad_enabled():
                return method(*arguments, **named)
            return timer.time("measure", method, *arguments, **named)

        def _prepare_inputs(self, batch: Any) -> Any:
            return timer.time("prepare", super()._prepare_inputs, batch)

    return Timed


def watcher(order: Order, timer: Timer, batches: list[dict[str, float]]) -> Any:
    """A callback that adds what each batch took; training is a step less what prepares it."""
    base: Any = importlib.import_module("transformers").TrainerCallback

    class Watcher(base):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._batch_started = time.perf_counter()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._step_started, self._prepared = timer.now(), timer.seconds["prepare"]

        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            prepared = timer.seconds["prepare"] - self._prepared
            timer.seconds["train"] += timer.now() - self._step_started - prepared
            if state.global_step % order.optimizer_steps:
                return
            now = time.perf_counter()
            batches.append({"clock": now - self._batch_started, **timer.seconds})
            self._batch_started = now
            timer.seconds.clear()

    return Watcher()


def train(order: Order) -> dict[str, Any]:
    """The report."""
    torch.set_num_threads(order.threads)
    task = load_task("countdown", {})
    tokenizer = Tokenizer(order.model)
    kept: list[dict[str, Any]] = []

    def reward(
        prompts: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        rewards = [
            task.score(tokenizer.decode(ids), answer=right).reward
            for ids, right in zip(completion_ids, answer, strict=True)
        ]
        kept[:] = [
            {"prompt": list(tokenizer.encode_prompt(prompt)), "completion": ids, "reward": each}
            for prompt, ids, each in zip(prompts, completion_ids, rewards, strict=True)
        ]
        return rewards

    problems = task.problems("train")[: order.batches * order.groups]
    rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    timer, batches = Timer(order.threads), list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = timed_trainer(timer)(
            model=order.model,
            reward_funcs=reward,
            args=settings(order, folder),
            train_dataset=_dataset(rows),
            callbacks=[watcher(order, timer, batches)],
        )
        trainer.train()
    return {"batches": batches, "last": kept}


def _dataset(rows: list[dict[str, str]]) -> Any:
    """With a fingerprint, because datasets 5.2 cannot take that of a table of pyarrow 26."""
    table = importlib.import_module("datasets.table").InMemoryTable.from_pylist(rows)
    return importlib.import_module("datasets").Dataset(table, fingerprint="bench")


def main() -> None:
    order = Order(**json.loads(Path(sys.argv[1]).read_text("utf8")))
    with contextlib.redirect_stdout(sys.stderr):
        report = train(order)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
