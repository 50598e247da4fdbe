"""`isentrope dead-letters` on a real Redis: what it shows, and what it moves."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from services.cli.__main__ import main
from services.cli.run_folder import RunFolder
from shared.codec import encode_prompt_group
from shared.dead_letters import bury
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds, Stream
from tests.factories import make_prompt

RUN_FILE = """
[run]
name = "demo"
num_steps = 3
[model]
path = "none"
max_length = 64
[rollout]
max_completion_tokens = 32
[learner]
groups_per_batch = 1
max_staleness = 0
[evaluation]
every_steps = 0
num_problems = 1
[checkpoint]
every_steps = 1
[redis]
max_prompts = 4
max_groups = 4
"""

ROOM = Bounds(4, 1 << 20)
GROUP = encode_prompt_group(make_prompt(7))
Answer = TypeVar("Answer")


@pytest.fixture
def folder(tmp_path: Path, redis_url: str) -> RunFolder:
    """A run that runs: its Redis answers."""
    made = RunFolder(tmp_path / f"demo-{secrets.token_hex(4)}")
    made.path.mkdir()
    made.run_file.write_text(RUN_FILE)
    made.write_redis_url(redis_url)
    return made


def with_streams(folder: RunFolder, do: Callable[[Streams], Awaitable[Answer]]) -> Answer:
    async def run() -> Answer:
        async with open_streams(
            folder.redis_url_file.read_text().strip(),
            run_id=folder.run_id,
            prompts=ROOM,
            groups=ROOM,
            timeout_seconds=60.0,
        ) as streams:
            return await do(streams)

    return asyncio.run(run())


async def give_up(streams: Streams, stream: Stream, payload: bytes, error: str) -> None:
    await stream.put(payload)
    (entry,) = await stream.claim("one", count=1, wait_seconds=0.1)
    (entry,) = await stream.pending("one")
    await bury(entry, stream, streams.dead_letter, error=error)


def give_two_up(folder: RunFolder) -> list[str]:
    """One group that can be read and one entry that cannot; the ids of their letters."""

    async def do(streams: Streams) -> list[str]:
        await give_up(streams, streams.prompts, GROUP, "EngineError: out\nof \x1b[31mmemory")
        await give_up(streams, streams.rollouts, b"poison", "not a group")
        return [entry.id for entry in await streams.dead_letter.browse()]

    return with_streams(folder, do)


def contents(folder: RunFolder) -> tuple[list[bytes], list[bytes], list[bytes]]:
    async def do(streams: Streams) -> tuple[list[bytes], list[bytes], list[bytes]]:
        return (
            await streams.prompts.peek(),
            await streams.rollouts.peek(),
            await streams.dead_letter.peek(),
        )

    return with_streams(folder, do)


def test_each_letter_is_shown_with_where_when_why_and_how_often(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = give_two_up(folder)
    assert main(["dead-letters", str(folder.path)]) == 0
    title, first, why_first, second, why_second, advice = capsys.readouterr().out.splitlines()
    assert title == f"{folder.run_id}: 2 dead letters"
    assert re.fullmatch(
        rf"{ids[0]}  from prompts  20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  delivered 2 times"
        r"  train group 7 of epoch 0, attempt 0, \d+ bytes",
        first,
    )
    assert why_first == "    EngineError: out of ?[31mmemory"
    assert re.fullmatch(rf"{ids[1]}  from rollouts  .*  unreadable, 6 bytes", second)
    assert why_second == "    not a group"
    assert advice.startswith("the learner issues these prompts again by itself")


def test_without_letters_it_says_so(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--requeue", "all"], ["--drop", "all"]):
        assert main(["dead-letters", str(folder.path), *more]) == 0
        assert "no dead letters" in capsys.readouterr().out


def test_one_is_put_back_where_it_came_from_once(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = give_two_up(folder)
    assert main(["dead-letters", str(folder.path), "--requeue", ids[0]]) == 0
    assert capsys.readouterr().out == f"put {ids[0]} back on prompts\n"
    assert main(["dead-letters", str(folder.path), "--requeue", ids[0]]) == 2
    assert f"{ids[0]}: no dead letter of {folder.run_id} has this id" in capsys.readouterr().err
    prompts, rollouts, dead = contents(folder)
    assert prompts == [GROUP]
    assert (rollouts, len(dead)) == ([], 1)


def test_all_are_put_back_but_what_cannot_be_read(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = give_two_up(folder)
    with_streams(folder, lambda streams: streams.dead_letter.put(b"from an older release"))
    assert main(["dead-letters", str(folder.path), "--requeue", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"put {ids[0]} back on prompts", f"put {ids[1]} back on rollouts"]
    assert re.fullmatch(r"left (\S+): not a dead letter.*; --drop \1 forgets it", lines[2])
    prompts, rollouts, dead = contents(folder)
    assert prompts == [GROUP]
    assert (rollouts, dead) == ([b"poison"], [b"from an older release"])


def test_one_that_cannot_be_read_is_refused_and_can_be_dropped(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with_streams(folder, lambda streams: streams.dead_letter.put(b"from an older release"))
    assert main(["dead-letters", str(folder.path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    id = line.split()[0]
    assert line == f"{id}  21 bytes"
    assert main(["dead-letters", str(folder.path), "--requeue", id]) == 1
    assert "not a dead letter" in capsys.readouterr().err
    assert main(["dead-letters", str(folder.path), "--drop", id]) == 0
    assert capsys.readouterr().out == f"{folder.run_id}: dropped 1 dead letter\n"
    assert contents(folder) == ([], [], [])


def test_a_stream_without_room_keeps_the_letter(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = give_two_up(folder)

    async def fill(streams: Streams) -> None:
        while await streams.prompts.put(b"in the way"):
            pass

    with_streams(folder, fill)
    monkeypatch.setattr("services.cli.dead_letters.ROOM_SECONDS", 0.1)
    assert main(["dead-letters", str(folder.path), "--requeue", ids[0]]) == 1
    assert "prompts is full" in capsys.readouterr().err
    assert len(contents(folder)[2]) == 2


def test_one_deed_at_a_time(folder: RunFolder) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["dead-letters", str(folder.path), "--requeue", "all", "--drop", "all"])
    assert refused.value.code == 2


def test_a_run_that_has_ended_is_named_with_the_remedy(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.redis_url_file.unlink()
    assert main(["dead-letters", str(folder.path)]) == 1
    assert "nothing runs (no redis-url file); start it with" in capsys.readouterr().err
