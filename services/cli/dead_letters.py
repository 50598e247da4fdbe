"""`isentrope dead-letters`: what a running run gave up, and what becomes of it.

The run does not wait for a person: the learner issues the prompt of a dead letter again, up to
`redis.max_attempts` times, then it abandons that place of the prompt order. A letter that is put
back after another attempt was trained on, or its place abandoned, is dropped as a duplicate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from services.cli.run_folder import RunFolder
from services.cli.status import redis_url_of
from shared.codec import decode_prompt_group, decode_rollout_group, decode_scored_group
from shared.config import load_run
from shared.dead_letters import DeadLetter, decode_dead_letter, put_back
from shared.errors import ConfigError, StreamError
from shared.records import PromptGroup
from shared.redis_stream import Streams, open_streams
from shared.stream import PROMPTS, ROLLOUTS, SCORED, Entry

ALL = "all"

_ANSWER_SECONDS = 10.0
ROOM_SECONDS = 30.0
"""How long an entry waits for room in the stream it goes back to."""

_WHAT_BECOMES_OF_THEM = (
    "the learner issues these prompts again by itself, redis.max_attempts times at most, then"
    " abandons them; one that is put back counts only if no other attempt did"
)

_READERS: dict[str, Callable[[bytes], PromptGroup]] = {
    PROMPTS: decode_prompt_group,
    ROLLOUTS: lambda payload: decode_rollout_group(payload).prompt,
    SCORED: lambda payload: decode_scored_group(payload).rollout.prompt,
}


def show(folder: RunFolder) -> None:
    """Print what every dead letter is, where it is from, when and how often it failed, and why.

    Raises:
        StartError: the run does not run.
    """

    async def look(streams: Streams) -> None:
        entries = await streams.dead_letter.browse()
        print(f"{folder.run_id}: {_counted(len(entries))}")
        for entry in entries:
            print("\n".join(_described(entry)))
        if entries:
            print(_WHAT_BECOMES_OF_THEM)

    _with_streams(folder, look)


def requeue(folder: RunFolder, which: str) -> None:
    """Put one back where it came from, or all that can be read.

    Raises:
        ConfigError: no dead letter has that id.
        StreamError: that one cannot be read, or there is no room for it.
    """

    async def put_all_back(streams: Streams) -> None:
        streams_by_name = {each.name: each for each in streams.sources}
        chosen = await _chosen(streams, folder, which)
        if not chosen:
            print(f"{folder.run_id}: {_counted(0)}")
        for entry in chosen:
            try:
                origin = streams_by_name[decode_dead_letter(entry.payload).stream]
            except StreamError as error:
                advice = f"{entry.id}: {error}; --drop {entry.id} forgets it"
                if which != ALL:
                    raise StreamError(advice) from None
                print(f"left {advice}")
                continue
            await put_back(entry, streams.dead_letter, origin, timeout_seconds=ROOM_SECONDS)
            print(f"put {entry.id} back on {origin.name}")

    _with_streams(folder, put_all_back)


def drop(folder: RunFolder, which: str) -> None:
    """Forget one, or all there are now.

    Raises:
        ConfigError: no dead letter has that id.
    """

    async def forget(streams: Streams) -> None:
        entries = await _chosen(streams, folder, which)
        await streams.dead_letter.acknowledge([entry.id for entry in entries])
        print(f"{folder.run_id}: dropped {_counted(len(entries))}")

    _with_streams(folder, forget)


async def _chosen(streams: Streams, folder: RunFolder, which: str) -> Sequence[Entry]:
    entries = await streams.dead_letter.browse()
    chosen = [entry for entry in entries if which in (ALL, entry.id)]
    if not chosen and which != ALL:
        raise ConfigError(
            f"{which}: no dead letter of {folder.run_id} has this id; without --requeue and --drop"
            " this command lists them"
        )
    return chosen


def _with_streams(folder: RunFolder, deed: Callable[[Streams], Awaitable[None]]) -> None:
    async def run() -> None:
        async with _opened(folder) as streams:
            await deed(streams)

    asyncio.run(run())


@asynccontextmanager
async def _opened(folder: RunFolder) -> AsyncIterator[Streams]:
    redis = load_run(folder.run_file).redis
    async with open_streams(
        redis_url_of(folder),
        run_id=folder.run_id,
        prompts=redis.prompt_bounds,
        groups=redis.group_bounds,
        timeout_seconds=_ANSWER_SECONDS,
    ) as streams:
        yield streams


def _described(entry: Entry) -> list[str]:
    try:
        letter = decode_dead_letter(entry.payload)
    except StreamError as error:
        return [f"{entry.id}  {len(entry.payload)} bytes", f"    {error}"]
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.buried_at))
    often = "once" if letter.deliveries == 1 else f"{letter.deliveries} times"
    return [
        f"{entry.id}  from {letter.stream}  {at}  delivered {often}  {_subject(letter)}",
        f"    {_on_one_line(letter.error)}",
    ]


def _subject(letter: DeadLetter) -> str:
    """Which group it is, where that can still be read."""
    size = f"{len(letter.payload)} bytes"
    try:
        prompt = _READERS[letter.stream](letter.payload)
    except StreamError:
        return f"unreadable, {size}"
    uid = prompt.uid
    return (
        f"{prompt.purpose.name.lower()} group {uid.index} of epoch {uid.epoch}, attempt"
        f" {uid.attempt}, {size}"
    )


def _on_one_line(text: str) -> str:
    """As a terminal can show it: what came from an entry may hold anything."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))


def _counted(number: int) -> str:
    return "1 dead letter" if number == 1 else f"{number or 'no'} dead letters"
