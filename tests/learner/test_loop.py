from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.learner.batch import Batch
from services.learner.checkpoint import MANIFEST, write_checkpoint
from services.learner.evaluation import LawFit
from services.learner.loop import Learner
from services.learner.measures import StepReport
from services.learner.prepared import Prepared
from services.learner.progress import Progress
from services.learner.publisher import Publication
from services.learner.run_record import RunRecord
from shared.codec import encode_scored_group
from shared.config import parse_run
from shared.errors import CheckpointError
from shared.memory_stream import MemoryStream
from shared.metrics.quantities import LearnerGauges
from shared.records import Outcome, ScoredGroup
from shared.redis_stream import open_streams
from shared.stream import Bounds
from tests.factories import make_scored
from tests.learner.test_inbox import RUN, SOLVED, Scene
from tests.learner.test_saver import PATIENCE_SECONDS, open_taken

SIZE = len(encode_scored_group(make_scored(0)))


class NobodyListens:
    """A publisher without replicas."""

    async def publish(self, policy_version: int) -> Publication:
        return Publication(policy_version, (), (), 0, 0.0, 0.0, 0.0, 0.0, 0.0)


def learner_of(scene: Scene, folder: Path) -> Learner:
    """The loop over real parts but for the engine, which only saves."""
    config = parse_run(RUN)
    nobody: Any = NobodyListens()
    engine: Any = SimpleNamespace(snapshot=lambda *, copies: open_taken())
    streams: Any = scene.streams
    law, progress = LawFit(config.law), Progress()

    async def at_once(work: Callable[[], Any]) -> Any:
        return work()

    return Learner(
        config=config,
        run_folder=folder,
        streams=streams,
        ledger=scene.ledger,
        feeder=scene.feeder,
        inbox=scene.inbox,
        reconciler=scene.make_reconciler(),
        evaluator=scene.evaluator,
        law=law,
        publisher=nobody,
        engine=engine,
        on_engine=at_once,
        record=RunRecord(
            config=config,
            folder=folder,
            ledger=scene.ledger,
            inbox=scene.inbox,
            law=law,
            gauges=LearnerGauges(),
            progress=progress,
        ),
        progress=progress,
    )


@pytest.mark.parametrize(
    ("capacity", "capacity_bytes"), [(3, 1 << 20), (64, 5 * SIZE // 2)], ids=["items", "bytes"]
)
async def test_replaced_groups_that_fill_the_stream_are_let_go_by_an_early_checkpoint(
    tmp_path: Path, capacity: int, capacity_bytes: int
) -> None:
    scored = MemoryStream(name="s", capacity=capacity, capacity_bytes=capacity_bytes)
    scene = Scene(scored=scored, replace_degenerate=True)
    await scene.feeder.fill(policy_version=0)
    learner = learner_of(scene, tmp_path)
    await scene.arrive(make_scored(0, outcomes=SOLVED), make_scored(1, outcomes=SOLVED))
    mixed = make_scored(2, outcomes=(Outcome.PASS, Outcome.FAIL))
    await scene.arrive(mixed)

    async def wait(missing: int) -> None:
        assert missing == 1
        await learner._make_room()
        await scene.arrive(make_scored(3))

    batch = await scene.inbox.take_batch(2, policy_version=0, while_waiting=wait)
    assert [group.rollout.prompt.uid.index for group in batch] == [2, 3]
    assert list((tmp_path / "checkpoints").iterdir())
    assert scene.inbox.num_unacknowledged == 2
    depth = await scene.scored.depth()
    assert depth.pending == 2


async def test_a_stream_that_is_full_of_what_is_being_written_waits_for_that(
    tmp_path: Path,
) -> None:
    scene = Scene(scored=MemoryStream(name="s", capacity=2))
    await scene.feeder.fill(policy_version=0)
    await scene.arrive(make_scored(0), make_scored(1))
    await scene.take()
    learner = learner_of(scene, tmp_path)
    await learner._checkpoint()
    await learner._make_room()
    assert (await scene.scored.depth()).pending == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


async def test_a_disk_that_refuses_does_not_end_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(scored=MemoryStream(name="s", capacity=2))
    await scene.feeder.fill(policy_version=0)
    await scene.arrive(make_scored(0), make_scored(1))
    await scene.take()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    learner = learner_of(scene, tmp_path)
    await learner._checkpoint()
    await learner._settle()
    assert "training goes on" in caplog.text
    assert (await scene.scored.depth()).pending == 2
    with pytest.raises(CheckpointError):
        await learner._last_checkpoint()


async def test_rows_that_the_disk_refused_are_in_the_checkpoint_and_in_the_resumed_run(
    tmp_path: Path,
) -> None:
    for name in ("metrics", "ledger"):
        (tmp_path / f"{name}.jsonl").symlink_to("/dev/full")
    learner = learner_of(Scene(), tmp_path)
    learner.record.write({"step": 1, "loss": 0.5})
    learner.record.write_trained(1, [make_scored(0)], policy_version=0)
    await learner._checkpoint()
    await learner._settle()
    for name in ("metrics", "ledger"):
        (tmp_path / f"{name}.jsonl").unlink()
    resumed = learner_of(Scene(), tmp_path)
    engine: Any = SimpleNamespace(load=lambda folder: None, snapshot=lambda *, copies: open_taken())
    resumed.engine = engine
    await resumed._begin(resume=True)
    rows = [json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("metrics", "ledger")]
    assert [row["step"] for row in rows] == [1, 1]
    assert (rows[0]["loss"], rows[1]["trained"]) == (0.5, [[0, 0, 0]])
    await resumed._checkpoint()
    assert resumed.record.kept == {"metrics": [], "ledger": []}
    await resumed._settle()


async def test_while_a_step_is_computed_the_next_batch_is_read_and_prepared(
    redis_url: str, tmp_path: Path
) -> None:
    bounds, run_id = Bounds(8, 1 << 20), f"test-{secrets.token_hex(4)}"
    async with open_streams(
        redis_url, run_id=run_id, prompts=bounds, groups=bounds, timeout_seconds=PATIENCE_SECONDS
    ) as streams:
        real: Any = streams.scored
        scene = Scene(scored=real)
        await scene.arrive(*(make_scored(index) for index in range(4)))
        learner = learner_of(scene, tmp_path)
        prepared, trained = [], []
        next_is_prepared = threading.Event()

        def prepare(groups: Sequence[ScoredGroup], policy_version: int) -> Prepared:
            batch = Batch.of([], [], groups)
            prepared.append((indices(batch), policy_version))
            if len(prepared) == 2:
                next_is_prepared.set()
            return Prepared(batch, (), b"", ())

        def train(prepared: Prepared, *, step: int) -> StepReport:
            assert next_is_prepared.wait(PATIENCE_SECONDS)
            trained.append(indices(prepared.batch))
            return StepReport({}, {}, {})

        engine: Any = SimpleNamespace(prepare=prepare, train_prepared=train)
        learner.engine, learner.on_engine, learner.streams = engine, asyncio.to_thread, streams
        await learner._step()
        assert (trained, learner.progress.policy_version) == ([[0, 1]], 1)
        assert scene.inbox.num_unacknowledged == 2  # of the next batch nothing is decided yet
        await learner._step()
        assert trained == [[0, 1], [2, 3]]
        assert prepared == [([0, 1], 0), ([2, 3], 1)]
        learner.preparation.drop()
        await scene.inbox.close()


def indices(batch: Batch) -> list[int]:
    return [group.rollout.prompt.uid.index for group in batch.groups]


async def test_a_full_stream_alone_is_no_reason_for_a_checkpoint(tmp_path: Path) -> None:
    scene = Scene(scored=MemoryStream(name="s", capacity=1))
    await scene.feeder.fill(policy_version=0)
    await scene.arrive(make_scored(0))
    await learner_of(scene, tmp_path)._make_room()
    assert not (tmp_path / "checkpoints").exists()


async def test_a_resumed_run_answers_while_it_reads_its_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "checkpoints", step=3, state={}, save_engine=lambda engine: None
    )
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)  # whoever reads it waits until somebody writes
    answered = threading.Event()

    def write_when_answered() -> bool:
        is_answered = answered.wait(PATIENCE_SECONDS)
        (folder / MANIFEST).write_text(manifest)
        return is_answered

    learner = learner_of(Scene(scored=MemoryStream(name="s", capacity=2)), tmp_path)
    writing = asyncio.create_task(asyncio.to_thread(write_when_answered))
    running = asyncio.create_task(learner.run(resume=True))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while "reads the checkpoint" not in learner.progress.sentence:
            await asyncio.sleep(0)
    learner.progress.is_stopping = True  # or it would miss the rest of a state
    answered.set()
    assert await writing
    await asyncio.wait_for(running, PATIENCE_SECONDS)
    assert learner.progress.step == 0


async def test_a_run_that_went_back_publishes_only_when_lost_evaluations_are_taken_back(
    tmp_path: Path,
) -> None:
    """Or replicas that serve the older version would fill their places with these groups."""
    scene = Scene()
    await scene.evaluator.issue(1, policy_version=1)
    scene.evaluator.load_state_dict({})
    learner = learner_of(scene, tmp_path)
    on_prompts: list[int] = []

    class Looks(NobodyListens):
        async def publish(self, policy_version: int) -> Publication:
            on_prompts.append(len(await scene.prompts.peek()))
            return await super().publish(policy_version)

    looks: Any = Looks()
    learner.publisher = looks
    await learner._begin(resume=True)
    assert on_prompts == [0]
    assert {uid.epoch for uid in await scene.issued()} == {0}
