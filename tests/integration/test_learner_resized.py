"""A run that goes on with another number of ranks: what `services.learner.reshape` carries over.

One pair of processes serves all variants: two ranks train and save, the first of them alone loads
that and saves it, then both load that and save it once more. The float32 weights and the moments
are then the same, bit for bit; and each of the three moves alike in a further step.

Too long for `make test`: `make test-slow`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.learner.engine import LearnerEngine
from services.learner.reshape import UNIVERSAL_TAG, reshaped
from services.learner.zero import CHECKPOINT_TAG
from shared.config import Environment, RunConfig
from tests.integration.rank_processes import free_port, ranks_of
from tests.integration.test_learner_engine import (
    ALONE,
    run_config,
    save,
    save_model,
    scored_groups,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 600.0

BFLOAT16 = {"path": "x", "dtype": "bfloat16"}
LORA = {"rank": 4, "alpha": 16}


def config(stage: int, *, lora: bool = False, **sections: dict[str, Any]) -> RunConfig:
    learner = {"zero_stage": stage, "micro_batch_tokens": 60, "learning_rate": 3e-3}
    return run_config(learner={**learner, **({"lora": LORA} if lora else {})}, **sections)


VARIANTS = {
    "1": config(1),
    "1-bfloat16": config(1, model=BFLOAT16),
    "2-bfloat16": config(2, model=BFLOAT16),
    "3-bfloat16": config(3, model=BFLOAT16),
    "1-lora": config(1, lora=True),
    "1-lora-bfloat16": config(1, lora=True, model=BFLOAT16),
    "3-lora-bfloat16": config(3, lora=True, model=BFLOAT16),
}

MOVED_APART = 0.2
"""Of the length of a step; gradients in bfloat16 round otherwise on one rank than on two. Without
the moments or their age it would be 0.5 and more."""


def work(job: str, folder: Path, model: Path) -> None:
    """One of two ranks: each variant in turn."""
    given = Environment.read()

    def start(place: Environment, variant: RunConfig) -> LearnerEngine:
        # DeepSpeed compares it with the process group.
        os.environ["WORLD_SIZE"] = str(place.world_size)
        return LearnerEngine.start(variant, str(model), place)

    def together(variant: RunConfig, times: str) -> LearnerEngine:
        port = agreed_port(folder / f"port-{times}", is_first=given.rank == 0)
        return start(replace(given, master_port=port), variant)

    def load(name: str) -> Callable[[LearnerEngine], None]:
        return lambda engine: engine.load(folder / name)

    for name, variant in VARIANTS.items():
        lead(together(variant, f"{name}-two"), train, folder / f"{name}-two")
        alone = start(ALONE, variant)
        if given.rank == 0:
            lead(alone, load(f"{name}-two"), folder / f"{name}-one")
        else:
            # It was there for ZeRO-3's numbers of weights alone, which go on from engine to engine.
            alone.close()
        lead(together(variant, f"{name}-again"), load(f"{name}-one"), folder / f"{name}-again")


def agreed_port(path: Path, *, is_first: bool) -> int:
    """One that is free now, which the first rank tells the other."""
    if is_first:
        written = path.with_suffix(".tmp")
        written.write_text(str(free_port()))
        written.rename(path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, "the first rank says nothing"
        time.sleep(0.01)
    return int(path.read_text())


def lead(engine: LearnerEngine, act: Callable[[LearnerEngine], object], folder: Path) -> None:
    """Rank 0 acts, saves, takes a step more and saves that; another follows."""
    if engine.rank > 0:
        engine.follow()
        return
    act(engine)
    save(engine, folder)
    engine.train(scored_groups(2), step=2, policy_version=2)
    save(engine, folder / "later")
    engine.close()


def train(engine: LearnerEngine) -> None:
    for step in range(2):
        engine.train(scored_groups(step), step=step, policy_version=step)


def content(folder: Path) -> dict[str, Tensor]:
    """The float32 weight and the moments of each parameter, whole, by name and kind."""
    found = {}
    with reshaped(folder, CHECKPOINT_TAG):
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            for path in (folder / UNIVERSAL_TAG / "zero").glob(f"*/{kind}.pt"):
                loaded = torch.load(path)
                whole = loaded["param"] if isinstance(loaded, dict) else loaded
                found[f"{path.parent.name}/{kind}"] = whole
    return found


def weights(content: dict[str, Tensor]) -> Tensor:
    """In one vector."""
    chosen = [content[key].flatten() for key in sorted(content) if key.endswith("/fp32")]
    return torch.cat(chosen)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = (tmp_path_factory.mktemp(name) for name in ("saved", "model"))
    save_model(model, vocabulary=64)
    with ranks_of(work) as processes:
        for rank in processes.start("resize", folder, model, num_ranks=2):
            assert rank.ended(seconds=PATIENCE_SECONDS) == 0, rank.printed
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_one_rank_has_what_two_had_and_two_have_it_again(name: str, saved: Path) -> None:
    two, *others = (content(saved / f"{name}-{ranks}") for ranks in ("two", "one", "again"))
    assert ("lora" in name) == all("lora_" in key for key in two)
    assert all(value.dtype == torch.float32 for value in two.values())
    assert any(bool(value.any()) for key, value in two.items() if key.endswith("exp_avg"))
    for other in others:
        assert two.keys() == other.keys()
        assert [key for key in two if not torch.equal(two[key], other[key])] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_it_moves_on_alike(name: str, saved: Path) -> None:
    before = weights(content(saved / f"{name}-two"))
    two, *others = (
        weights(content(saved / f"{name}-{ranks}" / "later")) for ranks in ("two", "one", "again")
    )
    moved = (two - before).norm()
    assert moved > 0
    for other in others:
        assert (other - two).norm() < (MOVED_APART if "bfloat16" in name else 1e-3) * moved
