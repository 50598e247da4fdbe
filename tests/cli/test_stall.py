"""What a person sees of a run that stands still: whom to look at first."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protos import learner_pb2, rollout_pb2, verifier_pb2
from services.cli.observer import LearnerView, ServiceView, View
from services.cli.progress import PlainProgress, dashboard
from services.cli.run_folder import RunFolder
from services.cli.status import print_status
from services.cli.watch import Watch
from shared.lease import Member, Registry, Role
from shared.redis_stream import Streams
from shared.rpc import serve
from tests.cli import stand_in

CULPRIT = "waits for batch 41: 3 of 8 groups are at verifier-2 for 312 s"
STALLED = LearnerView(40, 100, 40, CULPRIT, False, is_stalled=True, seconds_without_step=312.0)
GOES_ON = LearnerView(41, 100, 41, "trains step 42, 1 s", False)


class Learner(stand_in.Learner):
    async def GetStatus(self, request: Any, context: Any) -> Any:
        return learner_pb2.GetLearnerStatusResponse(
            step=40,
            num_steps=100,
            policy_version=40,
            activity=CULPRIT,
            is_stalled=True,
            seconds_without_step=312.0,
        )


class Rollout(stand_in.Rollout):
    def __init__(self, activity: str, age: float) -> None:
        self.activity, self.age = activity, age

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return rollout_pb2.GetRolloutStatusResponse(
            state=rollout_pb2.REPLICA_STATE_SERVING,
            activity=self.activity,
            progress_age_seconds=self.age,
        )


class Verifier(stand_in.Verifier):
    async def GetStatus(self, request: Any, context: Any) -> Any:
        return verifier_pb2.GetVerifierStatusResponse(
            activity="scores 3 groups, the oldest for 312 s", progress_age_seconds=312.0
        )


MADE: dict[Role, Any] = {"learner": Learner, "rollout": Rollout, "verifier": Verifier}


@asynccontextmanager
async def there(
    streams: Streams, role: Role, name: str, *account: object, is_stuck: bool = False
) -> AsyncIterator[None]:
    """A service that holds a lease and answers."""
    servicer, (_, add) = MADE[role](*account), stand_in.SERVICERS[role]
    serving = serve(
        host="127.0.0.1",
        port=0,
        port_key="port",
        services=[role],
        add=lambda server: add(servicer, server),
    )
    async with serving as server:
        await server.set_progressing(not is_stuck)
        async with leased(streams, role, name, port=server.port):
            yield


@asynccontextmanager
async def silent(streams: Streams, role: Role, name: str) -> AsyncIterator[None]:
    """A process that stands still: its lease has not run out, and its socket is open."""

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(never, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, leased(streams, role, name, port=port):
        yield


@asynccontextmanager
async def leased(streams: Streams, role: Role, name: str, *, port: int) -> AsyncIterator[None]:
    registry = Registry(streams.client, prefix=streams.prefix)
    address = f"127.0.0.1:{port}"
    async with registry.hold(role, name, address=address, metrics_address="", seconds=30.0):
        yield


@pytest.mark.integration
async def test_status_tells_the_culprit_and_what_everybody_is_at_the_worst_first(
    streams: Streams, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / re.findall(r"{(.*)}", streams.prefix)[0])
    folder.path.mkdir()
    folder.write_redis_url(redis_url)
    async with AsyncExitStack() as all_of_them:
        for service in (
            there(streams, "learner", "learner"),
            there(streams, "rollout", "rollout-0", "waits for prompts for 90 s", 0.0),
            there(streams, "rollout", "rollout-1", "samples 2 groups, [/b] 20 s", 20.0),
            silent(streams, "rollout", "rollout-2"),
            there(streams, "verifier", "verifier-2", is_stuck=True),
        ):
            await all_of_them.enter_async_context(service)
        await asyncio.to_thread(print_status, folder)
    lines = capsys.readouterr().out.splitlines()
    assert f"{'doing':<20}{CULPRIT}" in lines
    assert f"{'stalled':<20}no step for 5 min 12 s" in lines
    assert lines[-4:] == [
        "rollout-2           does not answer",
        "verifier-2          stalled: scores 3 groups, the oldest for 312 s",
        "rollout-1           samples 2 groups, [/b] 20 s",
        "rollout-0           waits for prompts for 90 s",
    ]


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def activity(self, text: str) -> None:
        raise AssertionError(text)

    def show(self, view: View) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_stall_is_told_once_and_so_is_its_end() -> None:
    told, nobody = Told(), Any
    watch = Watch(
        supervisor=nobody,  # type: ignore[arg-type]
        observer=nobody,  # type: ignore[arg-type]
        progress=told,
        start_timeout_seconds=1.0,
        restart_command=str,
    )
    for learner in (GOES_ON, STALLED, STALLED, None, STALLED, GOES_ON, GOES_ON, STALLED):
        watch._tell(View(learner, (), []))
    warning = f"warning: no step for 5 min 12 s: {CULPRIT}"
    assert told.lines == [warning, "the run goes on", warning]


def test_the_displays_show_the_sentence_and_mark_who_is_stuck() -> None:
    member = Member("verifier", "verifier-2", "127.0.0.1:1", "", "token")
    stuck = ServiceView(member, answers=True, state="scoring", is_stalled=True)
    view = View(STALLED, (stuck,), [])
    output = io.StringIO()
    Console(file=output, width=100).print(dashboard(view, "demo-1", 100, 65.0))
    text = " ".join(output.getvalue().split())
    assert f"no step for 5 min 12 s: {CULPRIT}" in text
    assert re.search(r"verifier-2 +stalled", output.getvalue())
    plain = io.StringIO()
    PlainProgress(plain, num_steps=100).show(view)
    assert plain.getvalue() == f"no step for 5 min 12 s: {CULPRIT}\n"
