"""The verifier as the process it is, beside a real Redis."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.verifier_pb2 import GetVerifierStatusRequest
from protos.verifier_pb2_grpc import VerifierStub
from services.verifier.__main__ import main
from services.verifier.service import SERVICE
from shared.codec import decode_scored_group, encode_rollout_group
from shared.config import load_run
from shared.lease import Member, Registry
from shared.process import run_service
from shared.records import Outcome
from shared.redis_stream import Streams, open_streams
from shared.rpc import PROGRESS, open_channel
from shared.stream import Bounds, Depth
from shared.tasks.countdown import Countdown
from shared.tokenizer import Tokenizer, save_characters
from tests.forked import Forked
from tests.verifier.test_worker import make_group
from tests.verifier.waiting import SECONDS, is_alive, until

pytestmark = pytest.mark.integration

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

RUN = """
[run]
name = "{name}"
num_steps = 1
[model]
path = "{model}"
max_length = 64
[task]
name = "{task}"
[rollout]
max_completion_tokens = 32
[network]
lease_seconds = 10.0
call_timeout_seconds = 30.0
[redis]
url = "{url}"
reclaim_seconds = 0.5
"""


class Verifiers:
    """Starts verifiers of one run, and ends what a test leaves."""

    def __init__(self, run_file: Path) -> None:
        self.run_file = run_file
        self._started: list[Forked] = []

    def start(self, name: str) -> Forked:
        printed = self.run_file.with_name(f"printed-{name}")
        arguments = ["--config", str(self.run_file), "--name", name]
        self._started.append(Forked(printed, be_a_verifier, arguments))
        return self._started[-1]

    def end(self) -> None:
        for process in self._started:
            process.close()


def be_a_verifier(arguments: list[str]) -> None:
    """`python -m services.verifier`, from its arguments on."""
    sys.exit(run_service("verifier", main, arguments))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_characters(Countdown.alphabet, end=Countdown.end, folder=tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def verifiers(tmp_path: Path, model: Path, redis_url: str) -> Iterator[Verifiers]:
    run_file = tmp_path / "run.toml"
    name = re.sub("[^a-z0-9]", "-", tmp_path.name)[:60].strip("-")
    run_file.write_text(RUN.format(name=name, model=model, task="countdown", url=redis_url), "utf8")
    made = Verifiers(run_file)
    yield made
    made.end()


@asynccontextmanager
async def opened(run_file: Path) -> AsyncIterator[tuple[Streams, Registry]]:
    config = load_run(run_file)
    assert config.redis.url is not None
    async with open_streams(
        config.redis.url,
        run_id=config.run.name,
        prompts=Bounds(64, 1 << 20),
        groups=Bounds(64, 1 << 20),
        timeout_seconds=60.0,
    ) as streams:
        yield streams, Registry(streams.client, prefix=streams.prefix)


async def until_leased(registry: Registry, name: str) -> Member:
    found: list[Member] = []

    async def is_there() -> bool:
        found[:] = [each for each in await registry.members("verifier") if each.name == name]
        return bool(found)

    await until(is_there)
    return found[0]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_verifier_serves_the_stream_and_callers_and_ends_in_order(
    verifiers: Verifiers, model: Path
) -> None:
    process = verifiers.start("one")
    async with opened(verifiers.run_file) as (streams, registry):
        member = await until_leased(registry, "one")
        for index in range(5):
            group = make_group(Tokenizer(str(model)), index=index)
            assert await streams.rollouts.put(encode_rollout_group(group))

        async def is_done() -> bool:
            return (await streams.rollouts.depth()) == Depth(waiting=0, pending=0)

        await until(is_done)
        scored = [decode_scored_group(payload) for payload in await streams.scored.peek()]
        assert sorted(each.rollout.prompt.uid.index for each in scored) == [0, 1, 2, 3, 4]
        for each in scored:
            assert [score.outcome for score in each.scores] == [Outcome.PASS, Outcome.FAIL]
            assert each.verifier == "one"

        async with open_channel(member.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            status = await VerifierStub(channel).GetStatus(GetVerifierStatusRequest())
            assert (status.groups_scored, status.completions_scored) == (5, 10)
        metrics = await asyncio.to_thread(
            lambda: urlopen(f"http://{member.metrics_address}/metrics").read().decode()
        )
        counted = 'isentrope_verifier_results_total{result="fail",verifier="countdown"} 5.0'
        assert counted in metrics

        scorers = children(process.pid)
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.ended, seconds=SECONDS) == 0
        assert await registry.members("verifier") == []
        assert len(scorers) == 1
        assert not any(is_alive(pid) for pid in scorers)


async def test_a_verifier_loads_no_torch(verifiers: Verifiers) -> None:
    # A process of its own: those that the other tests fork have torch from their parent.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.verifier", "--name", "lean"),
        *("--config", str(verifiers.run_file)),
    )
    try:
        async with opened(verifiers.run_file) as (_, registry):
            await until_leased(registry, "lean")
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert "tokenizers" in mapped
            assert "libtorch" not in mapped
    finally:
        process.kill()
        await process.wait()


async def test_a_scorer_that_stands_still_is_told_in_status_and_health_until_it_goes_on(
    verifiers: Verifiers, model: Path
) -> None:
    with verifiers.run_file.open("a", encoding="utf8") as file:
        file.write("[verifier]\ntimeout_seconds = 60.0\n[watchdog]\nstall_seconds = 0.5\n")
    process = verifiers.start("one")
    async with opened(verifiers.run_file) as (streams, registry):
        member = await until_leased(registry, "one")
        async with open_channel(member.address) as channel:
            checker: Any = health_pb2_grpc.HealthStub(channel)
            stub = VerifierStub(channel)

            async def health(name: str) -> Any:
                request = health_pb2.HealthCheckRequest(service=name)
                return (await checker.Check(request, timeout=SECONDS)).status

            async def is_stuck() -> bool:
                return bool(await health(PROGRESS) == NOT_SERVING)

            async def is_well() -> bool:
                return not await is_stuck()

            async def activity() -> str:
                return (await stub.GetStatus(GetVerifierStatusRequest(), timeout=SECONDS)).activity

            assert re.fullmatch(r"waits for rollouts for \d+ s", await activity())
            (scorer,) = children(process.pid)
            os.kill(scorer, signal.SIGSTOP)
            try:
                group = make_group(Tokenizer(str(model)))
                await streams.rollouts.put(encode_rollout_group(group))
                await until(is_stuck)
                said = await activity()
                assert re.fullmatch(r"scores 1 group, the oldest for \d+ s", said)
                assert [await health(name) for name in ("", SERVICE)] == [SERVING, SERVING]
            finally:
                os.kill(scorer, signal.SIGCONT)

            async def is_scored() -> bool:
                return bool(await streams.scored.peek())

            await until(is_scored)
            await until(is_well)
            (scored,) = [decode_scored_group(payload) for payload in await streams.scored.peek()]
            assert [score.outcome for score in scored.scores] == [Outcome.PASS, Outcome.FAIL]


async def test_what_a_killed_verifier_had_claimed_is_scored_by_another(
    verifiers: Verifiers, model: Path
) -> None:
    text = verifiers.run_file.read_text("utf8")
    short = text.replace("lease_seconds = 10.0", "lease_seconds = 1.0")
    verifiers.run_file.write_text(short, "utf8")
    first = verifiers.start("first")
    async with opened(verifiers.run_file) as (streams, registry):
        await until_leased(registry, "first")
        (scorer,) = children(first.pid)
        os.kill(scorer, signal.SIGSTOP)  # so that the verifier holds what it claims
        group = make_group(Tokenizer(str(model)))
        await streams.rollouts.put(encode_rollout_group(group))

        async def is_claimed() -> bool:
            return (await streams.rollouts.depth()).pending == 1

        await until(is_claimed)
        first.signal(signal.SIGKILL)
        verifiers.start("second")

        async def is_scored() -> bool:
            return bool(await streams.scored.peek())

        await until(is_scored)
        scored = [decode_scored_group(payload) for payload in await streams.scored.peek()]
        assert [(each.verifier, each.rollout) for each in scored] == [("second", group)]
        assert await streams.rollouts.depth() == Depth(waiting=0, pending=0)


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ('name = "countdown"', 'name = "x"', 2, "error: task.name = 'x': no such task; known"),
        ('path = "/', 'path = "/nowhere/', 1, "error: model.path = '/nowhere/"),
        (
            'call_timeout_seconds = 30.0\n[redis]\nurl = "',
            'call_timeout_seconds = 1.0\n[redis]\nurl = "redis://127.0.0.1:1/0"  # ',
            1,
            "error: redis.url = ",
        ),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    verifiers: Verifiers, old: str, new: str, code: int, message: str
) -> None:
    text = verifiers.run_file.read_text("utf8")
    verifiers.run_file.write_text(text.replace(old, new), "utf8")
    process = verifiers.start("one")
    assert process.ended(seconds=SECONDS) == code
    assert process.printed.splitlines()[-1].startswith(message)
    assert "Traceback" not in process.printed
