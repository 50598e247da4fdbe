"""A learner that is killed and resumed trains to the weights of one that never was, bit by bit.

One CPU rank of real DeepSpeed, Clip-Cov, AEnt and dynamic sampling, a real Redis. What holds: the
groups lie on `scored` in the order in which they were answered, pending entries are read again in
that order, so each batch has the groups that it would have had. The producer is one, and answers
in order; with many, the order is that of one of their possible races.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.learner.warmup import warm_up
from shared.config import parse_run
from tests.chaos.proxy import Proxy
from tests.integration.rank_processes import free_port
from tests.integration.recorded_run import (
    GROUPS_PER_BATCH,
    NUM_STEPS,
    PATIENCE_SECONDS,
    POLL_SECONDS,
    Death,
    RecordedRun,
)
from tests.test_redis_stream import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SIGKILL = -9
FEW = 14
"""Groups, those of an evaluation among them: enough for two steps, and not for half of the run."""

WARMUP = """
[run]
name = "warmup"
num_steps = 1
[model]
max_length = 32
[warmup]
num_steps = 1
batch_size = 4
hidden_size = 32
num_layers = 1
num_heads = 1
intermediate_size = 32
[task]
name = "countdown"
params = { numbers = 2 }
[rollout]
max_completion_tokens = 16
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmup") / "model"
    warm_up(parse_run(WARMUP), folder, report=lambda progress: None)
    return folder


async def test_a_run_killed_three_times_ends_in_the_weights_of_one_that_was_not(
    model: Path, redis_url: str, tmp_path: Path
) -> None:
    whole = RecordedRun(tmp_path / "whole", model, redis_url)
    whole.prepare()
    async with whole.produced():
        await whole.until_ended(whole.start(), exit_code=0)

    run = RecordedRun(tmp_path / "killed", model, redis_url)
    run.prepare()
    async with run.produced() as gate:
        gate.let(FEW)
        process = run.start()
        await run.until(lambda: len(run.steps) >= 2, process)
        process.kill()  # between steps, or in one: wherever it is
        await run.until_ended(process, exit_code=SIGKILL)
        gate.open()

        before = run.checkpoints  # none, or what a quick learner wrote before it was killed
        reached = max([0, *(int(name.removeprefix("step-")) for name in before)])
        third, sixth = (f"step-{reached + ahead:06}" for ahead in (3, 6))
        amid = Death(opens=f".{third}.tmp/engine/state/mp_rank_00_model_states.pt")
        await run.until_ended(run.start(resume=True, death=amid), exit_code=SIGKILL)
        assert run.checkpoints == before

        unacknowledged = Death(opens="checkpoints", after_renaming_to=sixth)
        await run.until_ended(run.start(resume=True, death=unacknowledged), exit_code=SIGKILL)
        assert run.checkpoints[-2:] == [third, sixth]
        async with run.streams() as streams:
            assert (await streams.scored.depth()).pending >= 3 * GROUPS_PER_BATCH

        await run.until_ended(run.start(resume=True), exit_code=0)

    assert run.trained == whole.trained
    assert run.measured == whole.measured
    assert run.weights == whole.weights
    assert run.weights
    assert len(run.measured) == NUM_STEPS
    first = run.measured[0]
    assert {"loss", "entropy", "entropy_coefficient", "selected_tokens"} <= set(first)
    assert any(row["selected_tokens"] for row in run.measured)
    assert len({row["entropy_coefficient"] for row in run.measured}) > 1
    assert sum(row["groups_replaced"] for row in run.measured) > 0
    assert run.audit().is_right, run.audit()


async def test_a_run_whose_redis_was_wiped_while_it_was_dead_trains_each_place_once(
    model: Path, redis_url: str, tmp_path: Path
) -> None:
    run = RecordedRun(tmp_path / "wiped", model, redis_url)
    run.prepare()
    async with run.produced():
        death = Death(opens="checkpoints", after_renaming_to="step-000003")
        await run.until_ended(run.start(death=death), exit_code=SIGKILL)
        async with run.streams() as streams:
            keys = [key async for key in streams.client.scan_iter(match=f"*{{{run.run_id}}}*")]
            await streams.client.delete(*keys)
        await run.until_ended(run.start(resume=True), exit_code=0)
    found = run.audit()
    assert found.is_right, found
    assert found.ended["trained"] == NUM_STEPS * GROUPS_PER_BATCH
    assert found.reissued > 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "redis")
    yield made
    made.end()


async def test_a_run_waits_for_a_redis_that_is_away_and_goes_on_with_one_that_forgot(
    model: Path, server: Server, tmp_path: Path
) -> None:
    """Longer than the learner's client repeats a call, each time; the second time it is empty."""
    await server.start()
    run = RecordedRun(tmp_path / "away", model, server.url)
    run.prepare()
    async with run.produced() as gate:
        gate.close()  # the learner waits for groups when the server dies
        process = run.start()
        address = await run.until_known(process)
        for forgets in (False, True):
            server.kill()
            await run.until_says(address, "Redis", process)
            if forgets:
                server.forget()
            await server.start()
            gate.let(FEW)
            num_steps = len(run.steps)
            await run.until(lambda: len(run.steps) >= num_steps + 2, process)  # noqa: B023
        gate.open()
        await run.until_ended(process, exit_code=0)
    found = run.audit()
    assert found.is_right, found
    assert found.ended["trained"] == NUM_STEPS * GROUPS_PER_BATCH
    assert found.reissued > 0
    assert "groups that are out are in no stream, and are issued again" in run.log


async def test_a_run_goes_on_with_a_standby_that_had_fallen_behind(
    model: Path, server: Server, tmp_path: Path
) -> None:
    """A fail-over to one that was cut off from the primary some steps before."""
    standby = Server(tmp_path / "standby")
    try:
        await server.start()
        await standby.start()
        async with Proxy(socket_of(server)) as link:
            run = RecordedRun(tmp_path / "taken-over", model, f"redis://{link.address}/0")
            run.prepare()
            async with run.produced() as gate:
                gate.close()
                process = run.start()
                address = await run.until_known(process)
                await run.until_says(address, "batch 1", process)
                await replicate_once(server, standby)
                gate.let(FEW)
                # What replaces a skipped group is issued now, and the standby will not have it.
                await run.until(lambda: run.num_skipped > 0, process)
                server.kill()
                assert len(run.steps) < NUM_STEPS
                link.lead_to(socket_of(standby))
                gate.open()
                await run.until_ended(process, exit_code=0)
    finally:
        standby.end()
    found = run.audit()
    assert found.is_right, found
    assert found.ended["trained"] == NUM_STEPS * GROUPS_PER_BATCH
    assert found.reissued > 0


async def replicate_once(primary: Server, standby: Server) -> None:
    """The standby has all that the primary has now, and follows it no longer."""
    port = free_port()
    async with Redis.from_url(primary.url) as at_primary, Redis.from_url(standby.url) as at_standby:
        await at_primary.config_set("bind", "127.0.0.1")
        await at_primary.config_set("port", port)
        await at_standby.replicaof("127.0.0.1", port)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            said = await at_standby.info("replication")
            offset = (await at_primary.info("replication"))["master_repl_offset"]
            if said["master_link_status"] == "up" and said["slave_repl_offset"] >= offset:
                break
            assert time.monotonic() < deadline, said
            await asyncio.sleep(POLL_SECONDS)
        await at_standby.replicaof("NO", "ONE")


def socket_of(server: Server) -> str:
    return server.url.removeprefix("unix://")


async def test_a_learner_that_is_told_to_stop_while_redis_is_away_stops_with_a_checkpoint(
    model: Path, server: Server, tmp_path: Path
) -> None:
    await server.start()
    run = RecordedRun(tmp_path / "stopped", model, server.url)
    run.prepare()
    async with run.produced() as gate:
        gate.let(FEW)
        process = run.start()
        await run.until(lambda: len(run.steps) >= 1, process)
        address = await run.until_known(process)
        server.kill()
        await run.until_says(address, "Redis", process)
        process.terminate()
        await run.until_ended(process, exit_code=0)
        assert int(run.checkpoints[-1].split("-")[1]) == len(run.steps) == len(run.ledger)
        await server.start()
        gate.open()
        await run.until_ended(run.start(resume=True), exit_code=0)
    assert run.audit().is_right, run.audit()
