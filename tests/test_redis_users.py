"""The users of the Redis server: each role does its part, and nothing else, on a real server."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from protos.lease_pb2 import Lease
from services.learner.telemetry import observe_queues
from shared.dead_letters import bury, put_back
from shared.errors import StartError, StreamError
from shared.lease import Registry, Role
from shared.partials import Piece
from shared.redis_connection import REFUSED, Patience, RefusedError, check_server, connect
from shared.redis_partials import RedisPartials
from shared.redis_server import RedisServer, prepare_redis, until_redis_answers
from shared.redis_stream import Streams, key_prefix, open_streams
from shared.redis_users import USERS, User
from shared.stage import Stage
from shared.stream import PROMPTS, Bounds, Entry
from tests.factories import make_completion

pytestmark = pytest.mark.integration

RUN = "demo-1"
KEY = key_prefix(RUN)
ROOM = Bounds(100, 1 << 20)
START_SECONDS = 60.0


@dataclass(frozen=True)
class Running:
    """A server with users, and where each finds it."""

    server: RedisServer

    def url(self, user: User) -> str:
        return self.server.url_of(user)

    @property
    def socket(self) -> str:
        return urlsplit(self.server.url).path

    @asynccontextmanager
    async def streams(self, user: User, **choices: Any) -> AsyncIterator[Streams]:
        async with open_streams(
            self.url(user),
            run_id=RUN,
            prompts=ROOM,
            groups=ROOM,
            timeout_seconds=START_SECONDS,
            **choices,
        ) as opened:
            yield opened


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = prepare_redis(tmp_path_factory.mktemp("redis"), run_id=RUN)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(until_redis_answers(server.url, timeout_seconds=START_SECONDS))
        yield Running(server)
    finally:
        process.terminate()
        process.wait(20)
        server.remove_socket_folder()


async def claim_one(stream: Any, consumer: str) -> Entry:
    [entry] = await stream.claim(consumer, count=1, wait_seconds=START_SECONDS)
    return entry  # type: ignore[no-any-return]


async def as_rollout(streams: Streams, *, gives_up: bool) -> None:
    """Take a prompt as a replica does: another had it before, pieces are kept meanwhile."""
    await claim_one(streams.prompts, "dead")
    [entry] = await streams.prompts.reclaim("r", idle_seconds=0, alive=["r"], count=9)
    assert await streams.prompts.pending("r", held=[entry.id]) == []
    partials = RedisPartials(streams.client, prefix=streams.prefix, stream=PROMPTS)
    tokens = make_completion()
    assert await partials.save(entry, [Piece(0, 0, tokens)], consumer="r")
    assert (await partials.load(entry))[0].token_ids == tokens.token_ids
    await partials.drop(entry, consumer="r")
    assert await streams.prompts.give_back("r", idle_seconds=0) == 1
    [entry] = await streams.prompts.reclaim("r", idle_seconds=0, alive=["r"], count=9)
    await Registry(streams.client, prefix=streams.prefix).announced_version()
    if gives_up:
        await bury(entry, streams.prompts, streams.dead_letter, error="too long")
    else:
        assert await streams.prompts.finish(entry, output=streams.rollouts, payload=b"rollout")


async def as_verifier(streams: Streams, *, gives_up: bool) -> None:
    entry = await claim_one(streams.rollouts, "v")
    assert await streams.rollouts.pending("v", held=[entry.id]) == []
    assert await streams.rollouts.reclaim("v", idle_seconds=0, alive=["v"], count=9) == []
    if gives_up:
        await bury(entry, streams.rollouts, streams.dead_letter, error="no answer")
    else:
        assert await streams.rollouts.finish(entry, output=streams.scored, payload=b"scored")


async def as_learner(streams: Streams) -> None:
    """Take what came, one in and one out, and look at everything as the loop and watchdog do."""
    entry = await claim_one(streams.scored, "l")
    assert entry.payload == b"scored"
    assert await streams.scored.labels() == {entry.id: "train/0/0/0"}
    await streams.scored.pending("l")
    for stream in (*streams.sources, streams.dead_letter):
        await stream.labels()
        await stream.holders()
    await observe_queues(streams)
    assert await streams.server()
    await bury(entry, streams.scored, streams.dead_letter, error="cut short")


async def test_a_group_goes_its_way_with_every_service_as_its_own_user(running: Running) -> None:
    async with (
        running.streams("learner") as learner,
        running.streams("rollout") as rollout,
        running.streams("verifier") as verifier,
        running.streams("operator") as operator,
    ):
        for gives_up in ("rollout", "verifier", "nobody"):
            await learner.prompts.put(b"prompt", label="train/0/0/0")
            await as_rollout(rollout, gives_up=gives_up == "rollout")
            if gives_up != "rollout":
                await as_verifier(verifier, gives_up=gives_up == "verifier")
        await as_learner(learner)
        letters = await operator.dead_letter.browse()
        for letter, origin in zip(letters, operator.sources, strict=True):
            await put_back(letter, operator.dead_letter, origin, timeout_seconds=START_SECONDS)
        for streams, name in ((rollout, "prompts"), (verifier, "rollouts"), (learner, "scored")):
            stream = getattr(streams, name)
            back = await claim_one(stream, "again")
            await stream.acknowledge([back.id])
        await operator.dead_letter.acknowledge(["1-1"])


@pytest.mark.parametrize("user", ["learner", "rollout", "verifier"])
async def test_sizes_that_were_lost_are_counted_anew_by_whoever_needs_them(
    running: Running, user: User
) -> None:
    async with running.streams("rollout") as maker, running.streams(user) as streams:
        assert await maker.rollouts.put(b"x", label="train/0/1/0")
        await streams.client.delete(KEY + "rollouts:sizes")
        assert (await streams.rollouts.depth()).num_bytes == 1
        await streams.client.delete(KEY + "rollouts:sizes")
        [entry] = await streams.rollouts.browse()
        await streams.rollouts.acknowledge([entry.id])
        assert (await streams.rollouts.depth()).num_bytes == 0


@pytest.mark.parametrize("junk", ["junk", "inf", "1e3", "-1", "9" * 40, ""])
async def test_sizes_that_are_none_are_counted_anew(running: Running, junk: str) -> None:
    async with running.streams("verifier") as verifier, running.streams("learner") as learner:
        assert await verifier.scored.put(b"xyz", label="train/0/1/0")
        [entry] = await learner.scored.browse()
        await verifier.client.hset(KEY + "scored:sizes", mapping={"sum": junk, entry.id: junk})
        assert (await observe_queues(learner))["scored"] == 1
        assert (await learner.scored.depth()).num_bytes == 3
        await verifier.client.hset(KEY + "scored:sizes", entry.id, junk)
        await learner.scored.acknowledge([entry.id])
        assert (await learner.scored.depth()).num_bytes == 0


async def test_a_consumer_s_name_may_be_anything(running: Running) -> None:
    async with running.streams("rollout") as rollout, running.streams("verifier") as verifier:
        assert await rollout.rollouts.put(b"x")
        name: Any = b"\xff"
        entry = await claim_one(verifier.rollouts, name)
        async with running.streams("learner") as learner:
            assert [each.num_entries for each in await learner.rollouts.holders()] == [1]
        assert [entry.id] == [
            each.id
            for each in await verifier.rollouts.reclaim("v", idle_seconds=0, alive=[], count=1)
        ]
        await verifier.rollouts.acknowledge([entry.id])


@pytest.mark.parametrize("role", ["learner", "rollout", "verifier"])
async def test_a_service_holds_a_lease_of_its_own_role_only(running: Running, role: Role) -> None:
    others = {"learner", "rollout", "verifier"} - {role}
    client, operator = connect(running.url(role)), connect(running.url("operator"))
    registry, lookout = (Registry(each, prefix=KEY) for each in (client, operator))
    async with registry.hold(role, "one", address="h:1", metrics_address="", seconds=0.3) as lease:
        for reader in (registry, lookout):
            await client.delete(f"{KEY}lease:{role}:one")
            async with asyncio.timeout(START_SECONDS):
                while [each.name for each in await reader.members(role)] != ["one"]:
                    await asyncio.sleep(0.01)  # until it is refreshed
        assert not lease.done()
        for other in others:
            with pytest.raises(RefusedError, match=f"refuses user '{role}' SET"):
                await client.set(f"{KEY}lease:{other}:one", b"an address of mine", px=1000)
    assert await lookout.members(role) == []
    await client.aclose()
    await operator.aclose()


async def test_what_a_verifier_writes_of_itself_is_believed_of_no_replica_and_ends_nobody(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    rollout, verifier, learner = (
        connect(running.url(user)) for user in ("rollout", "verifier", "learner")
    )
    lookout = Registry(learner, prefix=KEY)
    holder = Registry(rollout, prefix=KEY)
    async with holder.hold("rollout", "r", address="a:1", metrics_address="", seconds=30.0):
        for claim in (b"\xff\xff", Lease(role="rollout", name="evil").SerializeToString(), b""):
            await verifier.set(KEY + "lease:verifier:evil", claim, px=30_000)
            await verifier.sadd(KEY + "leases:verifier", KEY + "lease:verifier:evil")
            for asked in ("rollout", None, None):
                assert [each.name for each in await lookout.members(asked)] == ["r"]
    assert caplog.text.count("does not count as a lease") == 3, "each of them once"
    for client in (rollout, verifier, learner):
        await client.aclose()


async def test_a_name_that_is_no_lease_s_hides_nobody(running: Running) -> None:
    async with running.streams("verifier") as streams:
        registry = Registry(streams.client, prefix=streams.prefix)
        await streams.client.sadd(KEY + "leases:verifier", KEY + "prompts", "another")
        async with registry.hold(
            "verifier", "one", address="a:1", metrics_address="a:2", seconds=30.0
        ):
            assert [member.name for member in await registry.members()] == ["one"]


async def test_only_the_learner_says_which_version_is_published(running: Running) -> None:
    for user in USERS:
        client = connect(running.url(user))
        announce = Registry(client, prefix=KEY).announce_version(3)
        if user == "learner":
            await announce
        else:
            with pytest.raises(StreamError, match=f"refuses user '{user}' SET"):
                await announce
        await client.aclose()


STREAM = {name: KEY + name for name in ("prompts", "rollouts", "scored", "dead_letter")}
NOT_THEIRS: list[tuple[User, list[str]]] = [
    ("rollout", ["XRANGE", STREAM["scored"], "-", "+"]),
    ("rollout", ["XADD", STREAM["scored"], "*", "d", "forged"]),
    ("rollout", ["XREADGROUP", "GROUP", "rollouts", "me", "STREAMS", STREAM["rollouts"], ">"]),
    ("rollout", ["XADD", STREAM["prompts"], "*", "d", "forged"]),
    ("rollout", ["INFO"]),
    ("verifier", ["GET", KEY + "policy_version"]),
    ("verifier", ["XRANGE", STREAM["prompts"], "-", "+"]),
    ("verifier", ["XADD", STREAM["prompts"], "*", "d", "forged"]),
    ("verifier", ["DEL", STREAM["prompts"]]),
    ("verifier", ["DEL", STREAM["scored"]]),
    ("verifier", ["HSET", STREAM["scored"], "another", "kind"]),
    ("verifier", ["ZADD", STREAM["scored"] + ":labels", "1", "another kind"]),
    ("verifier", ["HSET", STREAM["dead_letter"] + ":recent", "another", "kind"]),
    ("verifier", ["XREADGROUP", "GROUP", "scored", "me", "STREAMS", STREAM["scored"], ">"]),
    ("learner", ["XREADGROUP", "GROUP", "prompts", "me", "STREAMS", STREAM["prompts"], ">"]),
    ("learner", ["XADD", key_prefix("another") + "prompts", "*", "d", "x"]),
    ("operator", ["XGROUP", "DESTROY", STREAM["prompts"], "prompts"]),
    ("monitor", ["XRANGE", STREAM["rollouts"], "-", "+"]),
    ("monitor", ["XINFO", "STREAM", STREAM["rollouts"]]),
    ("monitor", ["SUNION", KEY + "leases:rollout"]),
    ("verifier", ["SREM", KEY + "leases:rollout", "r"]),
    ("verifier", ["SADD", KEY + "leases:rollout", "r"]),
    ("verifier", ["DEL", KEY + "leases:verifier"]),
    ("verifier", ["SET", KEY + "leases:verifier", "no set"]),
    ("monitor", ["DEL", STREAM["rollouts"]]),
]  # fmt: skip


@pytest.mark.parametrize(("user", "words"), NOT_THEIRS, ids=lambda each: str(each)[:40])
async def test_what_is_not_theirs_is_refused(
    running: Running, user: User, words: list[str]
) -> None:
    client = connect(running.url(user))
    with pytest.raises(RefusedError, match=f"refuses user '{user}' {words[0]} .*redis-users"):
        await client.execute_command(*words)
    await client.aclose()


@pytest.mark.parametrize("user", USERS)
async def test_nobody_rules_the_server(running: Running, user: User) -> None:
    client = connect(running.url(user))
    for words in (
        "FLUSHALL", "FLUSHDB", "KEYS *", "SCAN 0", "CONFIG GET *", "CONFIG SET dir /tmp",
        "SHUTDOWN NOSAVE", "ACL LIST", "ACL SETUSER x on nopass +@all ~*", "SAVE",
        "BGREWRITEAOF", "MONITOR", "CLIENT LIST", "SCRIPT FLUSH", "EVAL return 0", "SELECT 1",
        "REPLICAOF 127.0.0.1 1", "MODULE LIST", "FUNCTION LIST", "PUBLISH a b",
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=f"refuses user '{user}'"):
            await client.execute_command(*words.split(" "))
    await client.aclose()


async def test_a_script_does_no_more_than_its_user_may(running: Running) -> None:
    client = connect(running.url("rollout"))
    steal = client.register_script(f"return redis.call('XLEN', '{STREAM['scored']}')")
    with pytest.raises(RefusedError, match="ACL failure in script"):
        await steal(keys=[STREAM["prompts"]])
    await client.aclose()


async def test_what_scales_and_scrapes_sees_lengths(running: Running) -> None:
    async with running.streams("learner"):
        client = connect(running.url("monitor"))
        assert await client.ping()
        assert await client.xlen(STREAM["rollouts"]) == 0
        [group] = await client.xinfo_groups(STREAM["rollouts"])
        assert group["name"] == b"rollouts"
        await client.aclose()


@pytest.mark.parametrize("who", ["rollout:wrong-password@", "stranger:wrong-password@", ""])
async def test_a_stranger_is_told_so_at_once_and_not_waited_for(running: Running, who: str) -> None:
    url = f"unix://{who}{running.socket}"
    told: list[float | None] = []
    name = who.partition(":")[0] or "default"
    with pytest.raises(StartError, match=f"refuses user '{name}'.*redis-users") as refusal:
        await check_server(url, timeout_seconds=START_SECONDS)
    assert "wrong-password" not in str(refusal.value)
    client = connect(url)
    patient = Patience(url, seconds=START_SECONDS, told=told.append)
    with pytest.raises(StreamError, match=f"refuses user '{name}'") as error:
        await Registry(client, prefix=KEY, patience=patient).members()
    assert error.value.status == REFUSED
    assert told == []
    await client.aclose()


async def test_a_service_that_is_refused_ends_and_says_so(running: Running) -> None:
    """As after a change of the server's users: neither stage nor lease tries for ever."""

    async def work(entry: Entry) -> None:
        raise AssertionError(entry)

    async def goes_on() -> bool:
        return True

    async with running.streams("verifier") as verifier:
        stage = Stage(
            name="v", source=verifier.prompts, output=verifier.scored,
            dead_letter=verifier.dead_letter, work=work, max_in_flight=1, max_attempts=3,
        )  # fmt: skip
        with pytest.raises(StreamError, match="refuses user 'verifier' XPENDING") as error:
            async with asyncio.timeout(START_SECONDS):
                await stage.run(goes_on)
        assert error.value.status == REFUSED
