"""The streams of a run that was stopped, copied and restored elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from shared.redis_server import prepare_redis, until_redis_answers
from shared.redis_stream import Streams, open_streams
from shared.redis_users import User
from shared.stream import Bounds

pytestmark = pytest.mark.integration

RUN = "copied"
SECONDS = 120.0
ROOM = Bounds(100, 1 << 20)


@asynccontextmanager
async def running(data: Path) -> AsyncIterator[dict[User, Streams]]:
    """A server as `isentrope up` starts it; its end is that of a stopped run."""
    server = prepare_redis(data, run_id=RUN)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        await until_redis_answers(server.url, timeout_seconds=SECONDS)
        async with (
            opened(server.url_of("learner")) as learner,
            opened(server.url_of("rollout")) as rollout,
        ):
            yield {"learner": learner, "rollout": rollout}
    finally:
        process.terminate()
        process.wait(SECONDS)
        server.remove_socket_folder()


def opened(url: str) -> AbstractAsyncContextManager[Streams]:
    return open_streams(url, run_id=RUN, prompts=ROOM, groups=ROOM, timeout_seconds=SECONDS)


async def test_a_copy_of_a_stopped_server_s_files_goes_on_elsewhere(tmp_path: Path) -> None:
    async with running(tmp_path / "here") as users:
        learner, rollout = users["learner"], users["rollout"]
        for index in range(20):
            await learner.prompts.put(b"%d" % index, label=f"train/0/{index}/0", once=str(index))
        claimed = await rollout.prompts.claim("r", count=10, wait_seconds=SECONDS)
        for entry in claimed[:4]:
            assert await rollout.prompts.finish(
                entry, output=rollout.rollouts, payload=b"done " + entry.payload
            )
        before = [await stream.browse() for stream in learner.sources]
        labels = [await stream.labels() for stream in learner.sources]
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    async with running(tmp_path / "there") as users:
        learner, rollout = users["learner"], users["rollout"]
        assert [await stream.browse() for stream in learner.sources] == before
        assert [await stream.labels() for stream in learner.sources] == labels
        held = [entry.id for entry in await rollout.prompts.pending("r")]
        assert held == [entry.id for entry in claimed[4:]]
        waiting = await rollout.prompts.claim("r", count=20, wait_seconds=SECONDS)
        assert [entry.payload for entry in waiting] == [b"%d" % index for index in range(10, 20)]
        assert await learner.prompts.put(b"again", once="3")
        assert (await learner.prompts.depth()).num_bytes == sum(len(e.payload) for e in before[0])
