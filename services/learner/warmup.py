"""Train the small model that a run without `model.path` starts from: a minute or two, once.

    python -m services.learner.warmup --config run.toml --folder runs/warmup-0123456789

A Qwen2 of a few hundred thousand parameters learns from scratch to imitate the task's
demonstrations, which are right but random: it comes out fluent and right now and then, which is
what RL needs to start from. The folder is in Hugging Face form and appears whole or not at all.
torch is imported once training starts, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import RunConfig, load_run
from shared.config.services import WarmupConfig
from shared.errors import ConfigError, IsentropeError
from shared.new_folder import sync
from shared.tasks.registry import load_task
from shared.tasks.task import DemonstratedTask, Problem
from shared.tokenizer import character_ids, save_characters

if TYPE_CHECKING:
    import torch

ADAM_BETAS = (0.9, 0.98)
LR_WARMUP_STEPS = 50
ROPE_THETA = 1e4
REPORT_EVERY_STEPS = 10


@dataclass(frozen=True, slots=True)
class WarmupProgress:
    """How far the training is; `loss` is in nats per completion token."""

    step: int
    num_steps: int
    loss: float
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"warm-up {self.step}/{self.num_steps} loss {self.loss:.3f}"
            f" {self.seconds_left:.0f} s left"
        )


def warm_up(config: RunConfig, folder: Path, *, report: Callable[[WarmupProgress], None]) -> None:
    """Train the model that `config.warmup` describes and write it to `folder`.

    The same config gives the same weights on the same kind of machine.

    Raises:
        ConfigError: no [warmup], sizes that do not fit, or a task without demonstrations.
    """
    warmup, task = _checked(config)
    with _numerics(config.run.seed):
        model = _build(config, warmup, task)
        demonstrations = task.demonstrations(config.run.seed)
        _train(model, warmup, _batches(task, demonstrations, warmup.batch_size), report)
        _save(model, config, task, folder)


def _checked(config: RunConfig) -> tuple[WarmupConfig, DemonstratedTask]:
    """The section and the task of a warm-up that can be."""
    warmup = config.warmup
    if warmup is None:
        raise ConfigError("there is no [warmup] in the run file; add it")
    task = load_task(config.task.name, config.task.params)
    if not isinstance(task, DemonstratedTask):
        raise ConfigError(
            f"task.name = {config.task.name!r}: has no demonstrations for a [warmup] to imitate;"
            " remove [warmup] and set model.path"
        )
    alphabet = task.alphabet + task.end
    if not alphabet.isascii():
        raise ConfigError(
            f"task.name = {config.task.name!r}: its alphabet {alphabet!r} must be ASCII"
        )
    return warmup, task


def _build(config: RunConfig, warmup: WarmupConfig, task: DemonstratedTask) -> Any:
    """An untrained model with one token a character, and one for padding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = character_ids(task.alphabet, end=task.end)
    shape = Qwen2Config(
        vocab_size=len(ids) + 1,
        hidden_size=warmup.hidden_size,
        num_hidden_layers=warmup.num_layers,
        num_attention_heads=warmup.num_heads,
        num_key_value_heads=warmup.num_heads,
        intermediate_size=warmup.intermediate_size,
        max_position_embeddings=config.model.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[task.end],
        pad_token_id=len(ids),
    )
    # At a few dozen tokens plain matrix products beat the fused attention kernel.
    return Qwen2ForCausalLM._from_config(shape, attn_implementation="eager")


def _batches(
    task: DemonstratedTask, demonstrations: Iterator[tuple[Problem, str]], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(token_ids, is_completion)`, both [B, T], padded on the right."""
    import torch

    ids = character_ids(task.alphabet, end=task.end)
    while True:
        rows = [
            (problem.prompt, completion)
            for problem, completion in islice(demonstrations, batch_size)
        ]
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        token_ids = torch.full((batch_size, length), len(ids))
        is_completion = torch.zeros(batch_size, length, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(rows):
            text = prompt + completion
            token_ids[row, : len(text)] = torch.tensor([ids[character] for character in text])
            is_completion[row, len(prompt) : len(text)] = True
        yield token_ids, is_completion


def _train(
    model: Any,
    warmup: WarmupConfig,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[WarmupProgress], None],
) -> None:
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=warmup.learning_rate,
        betas=ADAM_BETAS,
        weight_decay=0.0,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _lr_factor(step, num_steps=warmup.num_steps)
    )
    started = time.monotonic()
    for step, batch in enumerate(islice(batches, warmup.num_steps), start=1):
        loss = _completion_loss(model, *batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if step % REPORT_EVERY_STEPS == 0 or step == warmup.num_steps:
            seconds_left = (time.monotonic() - started) / step * (warmup.num_steps - step)
            report(WarmupProgress(step, warmup.num_steps, loss.item(), seconds_left))


def _lr_factor(step: int, *, num_steps: int) -> float:
    """Share of the peak learning rate at `step`, from 0: up for some steps, then down to zero."""
    decay = (num_steps - step) / max(1, num_steps - LR_WARMUP_STEPS)
    return min((step + 1) / LR_WARMUP_STEPS, decay)


def _completion_loss(
    model: Any, token_ids: torch.Tensor, is_completion: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens; prompts and padding teach nothing."""
    import torch

    # Padding is on the right, where causal attention cannot see it: no mask is needed.
    hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
    is_target = is_completion[:, 1:]
    logits = model.lm_head(hidden[is_target])
    return torch.nn.functional.cross_entropy(logits, token_ids[:, 1:][is_target])


@contextmanager
def _numerics(seed: int) -> Iterator[None]:
    """A seeded generator, and the fastest products this processor has; both put back after.

    bfloat16 products take a third off the time where the processor has them, and change nothing
    that was measured of the trained model.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    precision = torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("medium" if has_bfloat16 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def _save(model: Any, config: RunConfig, task: DemonstratedTask, folder: Path) -> None:
    """Write model and tokenizer to a neighbour of `folder`, then rename it in one step."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.to(getattr(torch, config.model.dtype)).save_pretrained(unfinished)
        save_characters(task.alphabet, end=task.end, folder=unfinished)
        for path in unfinished.iterdir():
            path.chmod(0o644)
            sync(path)
        unfinished.chmod(0o755)
        sync(unfinished)
        _rename(unfinished, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _rename(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError as error:
        # Another process was first with the same model; that one stays.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m services.learner.warmup",
        description="Train the small model of [warmup] and write it in Hugging Face form.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run file (TOML)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="written whole or not at all; default: the run's own, kept if it is there",
    )
    given = parser.parse_args(arguments)
    try:
        config = load_run(given.config)
        if given.folder is None and Path(config.model_path).exists():
            print(f"{config.model_path} is there already", flush=True)
            return 0
        folder = given.folder or Path(config.model_path)
        warm_up(config, folder, report=lambda each: print(each, flush=True))
    except IsentropeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
