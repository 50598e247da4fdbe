"""Learners that are killed, or refused by the disk, while they write; and what comes after."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from services.cli.audit import audit
from services.cli.measurements import read_rows
from services.learner.export import export_checkpoint
from shared.config import load_run
from shared.process import run_service
from shared.tasks.countdown import Countdown
from shared.tokenizer import save_characters
from tests.chaos.disk import leave_for_namespace, small_disk
from tests.forked import FORKED, redirect_output
from tests.integration.rank_processes import free_port
from tests.integration.recorded_run import (
    NUM_STEPS,
    PATIENCE_SECONDS,
    SEED,
    RecordedRun,
    _be_a_learner,
)
from tests.integration.test_export import same
from tests.integration.test_learner_engine import save_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NO_NAMESPACE = 77
ROOM_BYTES = 2**14
"""Less than a file of weights or of moments."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, vocabulary=64)
    (folder / "tokenizer_config.json").unlink()
    save_characters(Countdown.alphabet, end=Countdown.end, folder=folder)
    return folder


def prepared(folder: Path, model: Path, redis_url: str, *, num_steps: int) -> RecordedRun:
    """A run of so many steps under ZeRO-2, with a checkpoint of each."""
    run = RecordedRun(folder, model, redis_url)
    run.prepare()
    text = run.run_file.read_text()
    for section, old, new in (
        ("[run]", f"num_steps = {NUM_STEPS}", f"num_steps = {num_steps}"),
        ("[checkpoint]", "every_steps = 3", "every_steps = 1"),
        ("[learner]", "", "zero_stage = 2\n"),
    ):
        before, after = text.split(f"{section}\n")
        text = f"{before}{section}\n{after.replace(old, new, 1)}"
    run.run_file.write_text(text)
    return run


def learn_until_the_disk_is_full(run: RecordedRun, run_file: Path) -> None:
    """In a process of its own: the run's folder is a small disk, which fills at the export."""
    redirect_output(run_file.with_suffix(".log"))
    if not leave_for_namespace():
        sys.exit(NO_NAMESPACE)
    from services.learner.__main__ import main

    os.environ["REDIS_URL"] = run.redis_url
    with small_disk(run.folder) as disk, ExitStack() as filling:
        assert disk is not None

        def listen(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.mkdir" and str(args[0]).endswith(".model.new.tmp"):
                filling.enter_context(disk.full(room_bytes=ROOM_BYTES))

        sys.addaudithook(listen)
        arguments = ["--config", str(run_file), "--run-id", run.run_id, "--name", "learner"]
        code = run_service("learner", main, arguments)
    sys.exit(code)


async def test_a_disk_that_is_full_at_the_end_costs_the_model_until_there_is_room(
    model: Path, redis_url: str, tmp_path: Path
) -> None:
    run = prepared(tmp_path / "full", model, redis_url, num_steps=1)
    run_file = shutil.copy(run.run_file, tmp_path / "run.toml")
    async with run.produced():
        process = FORKED.Process(
            target=learn_until_the_disk_is_full, args=(run, Path(run_file)), daemon=True
        )
        process.start()
        await asyncio.to_thread(process.join, PATIENCE_SECONDS)
        said = (tmp_path / "run.log").read_text()
        if process.exitcode == NO_NAMESPACE:
            pytest.skip("this user may not mount")
        assert process.exitcode == 1, said
        assert said.splitlines()[-1].startswith(f"error: {run.folder}/model: the model was not")
        assert "No space left on device" in said
        assert "GiB); the run's last checkpoint holds it: make room" in said
        assert "Traceback" not in said
        last = run.checkpoints[-1]
        assert last.startswith("step-000001")
        assert not [each for each in os.listdir(run.folder) if "model" in each]
        export_checkpoint(
            load_run(run.run_file),
            run.folder / "checkpoints" / last,
            tmp_path / "elsewhere",
            report=print,
        )
        await run.until_ended(run.start(resume=True), exit_code=0)
    assert same(run.folder / "model", tmp_path / "elsewhere")


def be_a_rank(
    run: RecordedRun, place: Mapping[str, str], resume: bool, dies_writing: str | None
) -> None:
    """In a process of its own: one of the learner's, which dies while it writes this file."""
    os.environ.update(place)
    if dies_writing is not None:
        arrange_death_amid(dies_writing)
    _be_a_learner(run, resume, None)


def arrange_death_amid(file: str) -> None:
    """The kernel kills at the first byte after so many, and nothing is cleared up."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(file):
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, ROOM_BYTES))

    sys.addaudithook(listen)


def started(run: RecordedRun, *, resume: bool, dying: int, writing: str) -> list[Any]:
    """Two ranks, of which one dies while it writes this file."""
    place = {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        given = (run, {**place, "RANK": str(rank)}, resume, writing if rank == dying else None)
        ranks.append(FORKED.Process(target=be_a_rank, args=given, daemon=True))
        ranks[-1].start()
    return ranks


def optimizer_file(step: int, rank: int) -> str:
    folder = f".step-{step:06}.tmp/engine/state"
    return f"{folder}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


async def test_ranks_killed_amid_a_save_leave_the_one_before_it_to_two_and_to_one(
    model: Path, redis_url: str, tmp_path: Path
) -> None:
    run = prepared(tmp_path / "killed", model, redis_url, num_steps=4)
    async with run.produced():
        for dying in (1, 0):
            before = run.checkpoints
            step = 2 + len(before)
            ranks = started(
                run, resume=bool(before), dying=dying, writing=optimizer_file(step, dying)
            )
            await run.until_ended(ranks[dying], exit_code=-signal.SIGXFSZ)
            await run.until_ended(ranks[1 - dying], exit_code=1)
            last = run.log.splitlines()[-1]
            assert last.startswith("error: ")
            assert "another rank is gone or stands still: its log says why; then resume" in last
            assert run.checkpoints[-1] == f"step-{step - 1:06}"
            half = run.folder / f"checkpoints/{optimizer_file(step, dying)}"
            assert 0 < half.stat().st_size <= ROOM_BYTES
        await run.until_ended(run.start(resume=True), exit_code=0)
    rows = read_rows(run.folder / "metrics.jsonl")
    found = audit(run.ledger, rows, seed=SEED, num_steps=4)
    assert found.is_right, found
    assert not list((run.folder / "checkpoints").glob(".*"))
