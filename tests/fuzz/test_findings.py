"""What fuzzing found, one by one; each was mended."""

from __future__ import annotations

import json
import math
import secrets
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from protos import rollout_pb2 as pb
from services.cli.measurements import read_rows
from services.learner.checkpoint import newest_checkpoint, write_checkpoint
from services.learner.evaluation import Evaluation
from services.learner.labels import read_label
from services.learner.ledger import Ledger
from services.rollout.replica import State
from services.rollout.update_size import max_update_bytes
from shared.codec import decode_prompt_group, encode_prompt_group
from shared.dead_letters import decode_dead_letter
from shared.errors import CheckpointError, StreamError
from shared.lease import Registry
from shared.partials import decode_pieces
from shared.records import GroupUid, Outcome, Purpose, Score, ScoredGroup
from shared.redis_stream import Streams
from tests.factories import make_completion, make_prompt, make_scored
from tests.fuzz.calls import Fuzzed, fuzzed
from tests.fuzz.services import MAX_LENGTH, TARGETS, Code
from tests.learner.test_inbox import Scene, WaitedError, give_up

ROLLOUT = "/isentrope.v1.Rollout/"
ENDLESS = (math.nan, math.inf, -1.0, 0.0, 1e300)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Fuzzed]:
    async with fuzzed() as servers:
        yield servers


@pytest.fixture
def fresh(running: Fuzzed) -> Fuzzed:
    """With a replica that has no version yet."""
    running.servers.replica.state, running.servers.replica.policy_version = State.STALE, -1
    return running


def good(method: str, **changes: Any) -> Any:
    """The full good request of a method of the rollout, changed."""
    seed = TARGETS[ROLLOUT + method].seeds[-1]
    request: Any = type(seed)()
    request.CopyFrom(seed)
    for name, value in changes.items():
        setattr(request, name, value)
    return request


async def answer(servers: Fuzzed, method: str, request: Message) -> grpc.StatusCode:
    return await servers.call(ROLLOUT + method, request.SerializeToString())


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", TARGETS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    fresh: Fuzzed, method: str
) -> None:
    assert await fresh.call(method, b"\x0b" * 300) is Code.INVALID_ARGUMENT


def manifest(*specs: tuple[str, str, list[int]]) -> pb.BeginUpdateRequest:
    request: pb.BeginUpdateRequest = good("BeginUpdate", epoch=1)
    del request.manifest[:]
    for name, dtype, shape in specs:
        request.manifest.add(name=name, dtype=dtype, shape=shape)
    return request


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "request_",
    [
        manifest(("a", "float32", [10**9])),
        manifest(("a", "float32", [2**63, 2**63, 2**63])),
        manifest(*((f"p{index}", "float32", [1 << 10]) for index in range(17))),
        manifest(("a", "float32", [4]), ("a", "float32", [4])),
        manifest(("a", "__class__", [4])),
        manifest(("a", "", [4])),
        good("BeginUpdate", bucket_bytes=0),
        good("BeginUpdate", policy_version=-1),
    ],
)
async def test_a_hostile_manifest_is_refused_before_the_engine_hears_of_it(
    fresh: Fuzzed, request_: pb.BeginUpdateRequest
) -> None:
    await answer(fresh, "JoinBroadcast", good("JoinBroadcast", store_port=2))
    assert await answer(fresh, "BeginUpdate", request_) is Code.INVALID_ARGUMENT
    assert await answer(fresh, "CommitUpdate", good("CommitUpdate")) is Code.FAILED_PRECONDITION


def test_a_version_has_at_most_eight_times_the_bytes_of_the_model_s_files(tmp_path: Path) -> None:
    assert max_update_bytes(tmp_path) > 1 << 28, "without weights to go by, the machine's memory"
    assert max_update_bytes(Path("someone/a-hub-model")) > 1 << 28
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert max_update_bytes(tmp_path) == 800


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("seconds", ENDLESS)
async def test_a_time_that_does_not_end_is_refused(fresh: Fuzzed, seconds: float) -> None:
    join = good("JoinBroadcast", store_port=2, timeout_seconds=seconds)
    assert await answer(fresh, "JoinBroadcast", join) is Code.INVALID_ARGUMENT
    streamed: pb.BeginUpdateRequest = good("BeginUpdate")
    streamed.source.timeout_seconds = seconds
    assert await answer(fresh, "BeginUpdate", streamed) is Code.INVALID_ARGUMENT
    await answer(fresh, "JoinBroadcast", good("JoinBroadcast", store_port=2))
    assert await answer(fresh, "BeginUpdate", good("BeginUpdate", epoch=1)) is Code.OK
    commit = good("CommitUpdate", timeout_seconds=seconds)
    assert await answer(fresh, "CommitUpdate", commit) is Code.INVALID_ARGUMENT


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("canary", [b"", b"\0", b"\xff" * 4, b"\1\0\0\0" * MAX_LENGTH])
async def test_a_canary_that_cannot_be_scored_is_refused_before_the_swap(
    fresh: Fuzzed, canary: bytes
) -> None:
    await answer(fresh, "JoinBroadcast", good("JoinBroadcast", store_port=2))
    assert await answer(fresh, "BeginUpdate", good("BeginUpdate", epoch=1)) is Code.OK
    commit = good("CommitUpdate", canary_token_ids=canary)
    assert await answer(fresh, "CommitUpdate", commit) is Code.INVALID_ARGUMENT
    assert fresh.servers.replica.policy_version == -1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replica_without_weights_cannot_be_told_to_serve(fresh: Fuzzed) -> None:
    order = pb.ServeRequest(policy_version=-1)
    assert await answer(fresh, "Serve", order) is Code.FAILED_PRECONDITION
    assert fresh.servers.replica.state is State.STALE


@pytest.mark.asyncio(loop_scope="module")
async def test_giving_up_the_version_before_the_first_is_ok(fresh: Fuzzed) -> None:
    fresh.servers.replica.state = State.JOINING
    order = pb.AbortUpdateRequest(policy_version=-1)
    assert await answer(fresh, "AbortUpdate", order) is Code.OK


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("temperature", [math.nan, math.inf, 0.0, -1.0])
async def test_a_temperature_that_is_none_is_refused(fresh: Fuzzed, temperature: float) -> None:
    fresh.servers.replica.state = State.SERVING
    hot = pb.GenerateRequest(
        prompt_token_ids=b"\1\0\0\0",
        num_completions=1,
        temperature=temperature,
        max_completion_tokens=4,
    )
    assert await answer(fresh, "Generate", hot) is Code.INVALID_ARGUMENT


@pytest.mark.asyncio(loop_scope="module")
async def test_callers_that_gave_up_on_a_checkpoint_are_forgotten(fresh: Fuzzed) -> None:
    method = "/isentrope.v1.Learner/Checkpoint"
    for _ in range(3):
        assert await fresh.call(method, b"") is Code.DEADLINE_EXCEEDED
    await fresh.assert_serves()
    await fresh.assert_forgets()


# --- entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4097, 2**32 - 1])
def test_a_group_of_more_completions_than_any_run_asks_for_is_refused(size: int) -> None:
    payload = encode_prompt_group(replace(make_prompt(), group_size=size))
    with pytest.raises(StreamError, match="need 1 to 4096"):
        decode_prompt_group(payload)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 0.0, -1.0])
def test_a_group_at_no_temperature_is_refused(temperature: float) -> None:
    payload = encode_prompt_group(replace(make_prompt(), temperature=temperature))
    with pytest.raises(StreamError, match="temperature"):
        decode_prompt_group(payload)


def with_completion(**changes: Any) -> ScoredGroup:
    group = make_scored(0)
    bad = replace(make_completion(), **changes)
    completions = (bad, *group.rollout.completions[1:])
    return replace(group, rollout=replace(group.rollout, completions=completions))


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (with_completion(token_ids=array("I", [4, 1000, 5])), "token id 1000: the model has 1000"),
        (with_completion(behaviour_logprobs=array("f", [0, math.nan, 0])), "not finite"),
        (with_completion(behaviour_logprobs=array("f", [math.inf, -math.inf, 0])), "not finite"),
    ],
)
async def test_what_would_end_the_learner_or_its_step_is_a_dead_letter(
    group: ScoredGroup, reason: str
) -> None:
    scene = Scene()
    await scene.feeder.fill(policy_version=0)
    await scene.arrive(group)
    with pytest.raises(WaitedError):
        await scene.inbox.take_batch(1, policy_version=0, while_waiting=give_up)
    (letter,) = await scene.dead.peek()
    assert reason in decode_dead_letter(letter).error


async def test_a_trajectory_longer_than_the_model_is_a_dead_letter() -> None:
    scene = Scene()
    await scene.feeder.fill(policy_version=0)
    group, long = make_scored(0), make_completion(30)
    rollout = replace(group.rollout, completions=(long, long))
    await scene.arrive(replace(group, rollout=rollout))
    with pytest.raises(WaitedError):
        await scene.inbox.take_batch(1, policy_version=0, while_waiting=give_up)
    assert "33 tokens: the model takes 32" in decode_dead_letter((await scene.dead.peek())[0]).error


def evaluated(index: int, **changes: Any) -> ScoredGroup:
    return replace(make_scored(index, epoch=1, purpose=Purpose.EVAL), **changes)


async def test_an_evaluation_takes_only_what_it_asked_for() -> None:
    scene = Scene()
    scene.evaluator._under_way[1] = evaluation = Evaluation(0, 0.0)
    assert scene.evaluator.add(evaluated(2)) is None
    of_another_run = make_scored(0, run_id="other", epoch=1, purpose=Purpose.EVAL)
    assert scene.evaluator.add(of_another_run) is None
    assert not evaluation.results


async def test_rewards_without_a_sum_do_not_end_an_evaluation() -> None:
    scene = Scene()
    scene.evaluator._under_way[1] = Evaluation(0, 0.0)
    endless = tuple(Score(Outcome.PASS, reward, "") for reward in (math.inf, -math.inf))
    assert scene.evaluator.add(evaluated(0, scores=endless)) is None
    metrics = scene.evaluator.add(evaluated(1))
    assert metrics is not None
    assert metrics["eval_score"] == 0.25


def test_a_label_outside_of_the_prompt_order_is_none() -> None:
    for label in ("train/0/-1/0", "train/0/4294967296/0", "train/0/1/2/3", "train/0/1"):
        with pytest.raises(ValueError):
            read_label(label, run_id="run")
    ledger = Ledger(run_id="run", num_problems=8, seed=0)
    ledger.adopt([GroupUid("run", 0, 8, 0)])
    assert not ledger.outstanding


@pytest.mark.parametrize("place", [b"0/" + b"9" * 5000, "0/٣".encode(), b"0/", b"/", b"-1/0"])
def test_a_piece_without_a_place_is_a_stream_error(place: bytes) -> None:
    with pytest.raises(StreamError, match="no place in a group"):
        decode_pieces({place: b""})


@pytest.mark.integration
async def test_an_entry_that_is_not_ours_is_an_empty_one(streams: Streams) -> None:
    key = streams.prefix + "prompts"
    await streams.client.xadd(key, {"foreign": b"x"})
    (claimed,) = await streams.prompts.claim("a", count=1, wait_seconds=1.0)
    (again,) = await streams.prompts.pending("a")
    assert [claimed.payload, again.payload, *await streams.prompts.peek()] == [b""] * 3


@pytest.mark.integration
async def test_an_announced_version_that_is_none_is_a_stream_error(streams: Streams) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    await streams.client.set(streams.prefix + "policy_version", secrets.token_hex(2) + "x")
    with pytest.raises(StreamError, match="which is no version"):
        await registry.announced_version()


# --- files ----------------------------------------------------------------------------------------


def named(name: str, size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps({name: [size, 0]}))

    return write


def holding(file: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / file).write_text(text)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        named("/dev/zero", 0),
        named("../../outside", 3),
        named(".", 0),
        holding("manifest.json", "[1]"),
        holding("manifest.json", "[" * 100_000),
        holding("manifest.json", '{"state.json": null}'),
    ],
)
def test_a_checkpoint_whose_manifest_is_hostile_is_damaged(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    (tmp_path / "outside").write_text("abc")
    root = tmp_path / "checkpoints"
    damage(write_checkpoint(root, step=4, state={}, save_engine=Path.mkdir))
    with pytest.raises(CheckpointError, match="is damaged"):
        newest_checkpoint(root)


def test_a_row_nested_without_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + '\n{"step": 1}\n')
    assert read_rows(path) == [{"step": 1}]
