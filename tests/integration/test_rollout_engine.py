"""vLLM under updates and failures, with a tiny Qwen2 whose log-probs Hugging Face computes too."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from prometheus_client import REGISTRY
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from vllm.tokenizers import get_tokenizer

from services.learner.hugging_face import export_policy
from services.learner.policy import Policy
from services.learner.policy_weights import PolicyWeights
from services.rollout.app import run_replica
from services.rollout.engine import UpdateReport, VllmEngine
from services.rollout.replica import Event, Replica
from services.rollout.vllm_launch import EngineSettings
from shared.activity import Report
from shared.broadcast import BroadcastGroup, GroupSpec, open_group, open_store
from shared.buckets import Manifest, ParameterSpec, pack_buckets
from shared.codec import encode_prompt_group
from shared.errors import BroadcastError, EngineError
from shared.partials import append_runs
from shared.records import Completion, VersionRun
from shared.redis_stream import open_streams
from shared.stream import Bounds
from shared.tokenizer import Tokenizer, save_characters
from shared.weight_transfer import send_weights
from tests.factories import make_prompt
from tests.integration.tiny_qwen import TOLERANCE, VOCABULARY, random_model, reference_logprobs
from tests.learner.publishing import learner_side, replica_arguments
from tests.observability.catalogue import engine_series
from tests.rollout.scene import Scene

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]

BUCKET_BYTES = 32 << 10
MAX_LENGTH = 2048
LASTING_TOKENS = 2000
"""Of a request that is still under way whatever else a busy machine does first."""

PATIENCE_SECONDS = 60.0
CANARY = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def manifest_of(model: Qwen2ForCausalLM) -> Manifest:
    return tuple(
        ParameterSpec(name, "float32", tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    )


class Learner:
    """The sending side, reduced to what the engine meets of it."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.version = 0
        self.epoch = 0
        self.group: BroadcastGroup | None = None
        self.store = open_store("127.0.0.1")

    async def join(self) -> BroadcastGroup:
        self.leave()
        self.epoch += 1
        key = f"{self.epoch}/replica"
        spec = GroupSpec(
            self.epoch, "gloo", "127.0.0.1", self.store.port, key, 1, 2, PATIENCE_SECONDS
        )
        mine = replace(spec, rank=0).for_worker(0)
        self.group, _ = await asyncio.gather(
            asyncio.to_thread(open_group, mine, self.store), self.engine.join_group(spec)
        )
        return self.group  # type: ignore[return-value]

    def leave(self) -> None:
        if self.group is not None:
            self.group.close()
        self.group = None

    async def begin(self, model: Qwen2ForCausalLM) -> BroadcastGroup:
        group = self.group or await self.join()
        self.version += 1
        await self.engine.begin_update(self.version, manifest_of(model), bucket_bytes=BUCKET_BYTES)
        return group

    async def publish(self, model: Qwen2ForCausalLM) -> UpdateReport:
        group = await self.begin(model)
        report = await asyncio.to_thread(
            send_weights,
            [group],
            model.named_parameters(),
            manifest_of(model),
            bucket_bytes=BUCKET_BYTES,
        )
        assert report.failed == {}
        return await self.engine.commit_update(
            self.version, expected_checksum=report.checksum, timeout_seconds=PATIENCE_SECONDS
        )


def settings_for(model_path: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(model_path),
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=32,
        seed=1,
        device="cpu",
        kv_cache_bytes=64 << 20,
        load_format="auto",
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a learner exports at the end of a run, which any vLLM is to load."""
    source, export = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("export")
    random_model(0).save_pretrained(source)
    save_characters("0123456789+-*/()", end=".", folder=source)
    policy = Policy.load(str(source), dtype=torch.float32, chunk=16)
    weights = {name: weight for name, weight, _ in PolicyWeights(policy).published()}
    export_policy(policy, weights, str(source), export)
    return export


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_path: Path) -> AsyncIterator[VllmEngine]:
    engine = await VllmEngine.start(settings_for(model_path))
    yield engine
    await engine.shutdown()


@pytest.fixture(scope="module")
def learner(engine: VllmEngine) -> Iterator[Learner]:
    learner = Learner(engine)
    yield learner
    learner.leave()


def sample(
    engine: VllmEngine,
    name: str,
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_completion_tokens: int = 20,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
) -> asyncio.Task[Completion]:
    return asyncio.create_task(
        engine.generate(
            prompt,
            temperature=temperature,
            max_completion_tokens=max_completion_tokens,
            stop_token_ids=stop,
            request_id=name,
        )
    )


async def assert_serves(engine: VllmEngine, model: Qwen2ForCausalLM) -> None:
    assert await engine.score_tokens(CANARY) == pytest.approx(
        reference_logprobs(model, CANARY), abs=TOLERANCE
    )


# --- in order: the engine of this module has no version at first ---------------------------------


async def test_vllm_loads_an_export_of_the_learner_and_its_tokenizer(
    engine: VllmEngine, model_path: Path
) -> None:
    weights = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    expected = random_model(0).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    characters = get_tokenizer(str(model_path)).encode("12+3", add_special_tokens=False)
    assert characters == Tokenizer(str(model_path)).encode_prompt("12+3").tolist()


async def test_nothing_is_sampled_before_the_first_version(engine: VllmEngine) -> None:
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="no policy version"):
        await sample(engine, "too-early")
    with pytest.raises(EngineError, match="no policy version"):
        await engine.score_tokens(CANARY)


async def test_after_an_update_the_engine_computes_what_the_learner_computes(
    engine: VllmEngine, learner: Learner
) -> None:
    model = random_model(1)
    report = await learner.publish(model)
    assert engine.policy_version == report.policy_version == learner.version
    assert 0 < report.load_seconds <= report.pause_seconds
    await assert_serves(engine, model)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
async def test_behaviour_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VllmEngine, learner: Learner, temperature: float
) -> None:
    model = random_model(2)
    await learner.publish(model)
    prompt = (7, 8, 9)
    done = await sample(engine, f"at-{temperature}", prompt=prompt, temperature=temperature)
    assert len(done.token_ids) == len(done.behaviour_logprobs) == 20
    assert done.version_runs == (VersionRun(learner.version, 20),)
    assert done.is_truncated
    whole = [*prompt, *done.token_ids]
    expected = reference_logprobs(model, whole, temperature)[len(prompt) - 1 :]
    assert list(done.behaviour_logprobs) == pytest.approx(expected, abs=TOLERANCE)


async def test_a_completion_ends_with_its_stop_token(engine: VllmEngine) -> None:
    done = await sample(engine, "stop", max_completion_tokens=200, stop=tuple(range(10)))
    assert not done.is_truncated
    assert done.token_ids[-1] < 10
    assert all(token >= 10 for token in done.token_ids[:-1])
    assert isinstance(done.token_ids, array) and done.token_ids.typecode == "I"


async def test_a_prompt_that_does_not_fit_is_refused_and_the_engine_goes_on(
    engine: VllmEngine,
) -> None:
    with pytest.raises(ValueError):
        await sample(engine, "too-long", prompt=(1,) * (MAX_LENGTH + 50))
    with pytest.raises(ValueError):
        await sample(engine, "not-a-token", prompt=(VOCABULARY + 5,))
    assert len((await sample(engine, "after")).token_ids) == 20


async def test_the_engine_exports_every_series_that_its_source_declares(
    engine: VllmEngine,
) -> None:
    """The dashboard's queries are checked against the source, which takes no engine."""
    await sample(engine, "counted")
    exported = {
        each.name: frozenset(each.labels)
        for family in REGISTRY.collect()
        for each in family.samples
    }
    declared = dict(engine_series())
    assert len(declared) > 50
    assert {name: exported.get(name) for name in declared} == declared


async def test_a_cancelled_request_frees_its_place(engine: VllmEngine) -> None:
    tasks = [sample(engine, f"c{i}", max_completion_tokens=200) for i in range(40)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    after = [sample(engine, f"after-{i}", max_completion_tokens=5) for i in range(40)]
    assert len(await asyncio.wait_for(asyncio.gather(*after), PATIENCE_SECONDS)) == 40


async def test_updates_lose_no_request_and_label_every_token(
    engine: VllmEngine, learner: Learner
) -> None:
    first = learner.version
    lasting = sample(engine, "lasting", max_completion_tokens=LASTING_TOKENS)
    tasks = [
        sample(engine, f"r{i}", prompt=(1, 2, i % VOCABULARY), max_completion_tokens=200)
        for i in range(31)
    ]
    await asyncio.sleep(0.05)
    for seed in (3, 4, 5):
        model = random_model(seed)
        await learner.publish(model)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(versions_of(engine.progress("lasting", start=0))) < 3:
            await asyncio.sleep(0.005)
    lasting.cancel()
    completions = await asyncio.gather(*tasks)

    for completion in completions:
        versions = versions_of(completion)
        assert versions == sorted(set(versions)) and versions[0] >= first
        assert sum(run.num_tokens for run in completion.version_runs) == 200
        assert len(completion.behaviour_logprobs) == 200
    await assert_serves(engine, model)


def versions_of(completion: Completion | None) -> list[int]:
    """In the order in which they sampled it."""
    return [run.policy_version for run in completion.version_runs] if completion else []


async def test_what_a_request_has_sampled_is_known_while_it_runs(
    engine: VllmEngine, learner: Learner
) -> None:
    await learner.publish(random_model(5))
    first = learner.version
    names = [f"running-{number}" for number in range(8)]
    tasks = [sample(engine, name, max_completion_tokens=300) for name in names]
    updates = asyncio.create_task(learner.publish(random_model(6)))
    seen: list[list[Completion]] = [[] for _ in names]
    while not all(task.done() for task in tasks):
        for name, pieces in zip(names, seen, strict=True):
            start = sum(len(piece.token_ids) for piece in pieces)
            if (piece := engine.progress(name, start=start)) is not None:
                pieces.append(piece)
        await asyncio.sleep(0.005)
    await updates

    for name, task, pieces in zip(names, tasks, seen, strict=True):
        whole, ids, logprobs = await task, array("I"), array("f")
        runs: list[VersionRun] = []
        for piece in pieces:
            ids += piece.token_ids
            logprobs += piece.behaviour_logprobs
            append_runs(runs, piece.version_runs)
        assert len(pieces) > 1 and len(ids) > 1
        assert ids == whole.token_ids[: len(ids)]
        assert logprobs == whole.behaviour_logprobs[: len(ids)]
        versions = [run.policy_version for run in whole.version_runs for _ in range(run.num_tokens)]
        assert versions[: len(ids)] == [
            run.policy_version for run in runs for _ in range(run.num_tokens)
        ]
        assert set(versions) <= {first, learner.version}
        assert engine.progress(name, start=0) is None, "forgotten at its end"


async def test_new_requests_do_not_meet_the_prefix_cache_of_an_older_version(
    engine: VllmEngine, learner: Learner
) -> None:
    prompt = tuple(index % VOCABULARY for index in range(200))  # more than a cache block
    await sample(engine, "fills-the-cache", prompt=prompt)
    model = random_model(6)
    await learner.publish(model)
    for name in ("computes", "reuses"):
        done = await sample(engine, name, prompt=prompt)
        expected = reference_logprobs(model, [*prompt, *done.token_ids])[len(prompt) - 1 :]
        assert list(done.behaviour_logprobs) == pytest.approx(expected, abs=TOLERANCE)


async def test_a_transfer_that_breaks_off_leaves_the_old_weights_and_the_next_works(
    engine: VllmEngine, learner: Learner
) -> None:
    old, new = random_model(6), random_model(7)
    serving = engine.policy_version
    running = sample(engine, "during", max_completion_tokens=200)
    group = await learner.begin(new)
    packed = pack_buckets(new.named_parameters(), manifest_of(new), bucket_bytes=BUCKET_BYTES)
    group.broadcast(next(packed)[1])
    learner.leave()
    with pytest.raises(BroadcastError, match="a peer is gone"):
        await engine.commit_update(learner.version, timeout_seconds=PATIENCE_SECONDS)

    assert serving is not None
    assert engine.policy_version == serving
    assert (await running).version_runs == (VersionRun(serving, 200),)
    await assert_serves(engine, old)
    await learner.publish(new)
    await assert_serves(engine, new)


async def test_weights_with_another_checksum_than_was_sent_are_refused(
    engine: VllmEngine, learner: Learner
) -> None:
    new = random_model(8)
    group = await learner.begin(new)
    sending = asyncio.to_thread(
        send_weights,
        [group],
        new.named_parameters(),
        manifest_of(new),
        bucket_bytes=BUCKET_BYTES,
    )
    commit = engine.commit_update(
        learner.version, expected_checksum=1, timeout_seconds=PATIENCE_SECONDS
    )
    _, refusal = await asyncio.gather(sending, commit, return_exceptions=True)
    assert isinstance(refusal, BroadcastError) and "1 was sent" in str(refusal)
    await assert_serves(engine, random_model(7))
    learner.leave()


async def test_an_abort_ends_the_wait_for_weights(engine: VllmEngine, learner: Learner) -> None:
    await learner.begin(random_model(8))
    commit = asyncio.create_task(engine.commit_update(learner.version, timeout_seconds=3600))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await engine.abort_update()
        with pytest.raises(BroadcastError, match="no transfer was started"):
            await commit
    learner.leave()
    await learner.publish(random_model(7))
    await assert_serves(engine, random_model(7))


async def test_weights_that_never_arrive_fail_at_the_deadline(
    engine: VllmEngine, learner: Learner
) -> None:
    await learner.begin(random_model(8))
    with pytest.raises(BroadcastError, match=r"more than 0\.3 s"):
        await engine.commit_update(learner.version, timeout_seconds=0.3)
    learner.leave()
    await assert_serves(engine, random_model(7))


async def test_a_group_that_never_forms_fails_at_the_deadline(engine: VllmEngine) -> None:
    store = open_store("127.0.0.1")
    spec = GroupSpec(99, "gloo", "127.0.0.1", store.port, "lonely", 1, 2, 1.5)
    running = sample(engine, "meanwhile")
    with pytest.raises(BroadcastError, match="could not join"):
        await engine.join_group(spec)
    assert len((await running).token_ids) == 20


async def test_weights_of_another_model_stop_sampling_until_a_whole_version_arrives(
    engine: VllmEngine, learner: Learner
) -> None:
    class Incomplete(Qwen2ForCausalLM):  # type: ignore[misc]  # lacks its last parameter
        def named_parameters(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            yield from list(super().named_parameters(*args, **kwargs))[:-1]

    running = sample(engine, "given-up", max_completion_tokens=LASTING_TOKENS)
    await asyncio.sleep(0.01)
    with pytest.raises(EngineError, match=r"lacks 1 parameters, model\.norm\.weight"):
        await learner.publish(Incomplete(random_model(9).config))
    with pytest.raises(EngineError, match="given up"):
        await running
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="no policy version"):
        await sample(engine, "refused")

    learner.leave()
    await learner.publish(random_model(10))
    await assert_serves(engine, random_model(10))


class Trained:
    """A model as the learner's publisher asks for it."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self._model = model

    def manifest(self) -> Manifest:
        return manifest_of(self._model)

    def weights(self) -> Iterator[tuple[str, Any]]:
        yield from self._model.named_parameters()

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        return reference_logprobs(self._model, list(token_ids))


async def test_a_late_replica_fetches_the_published_version_and_hands_in_a_group(
    engine: VllmEngine, learner: Learner, redis_url: str
) -> None:
    learner.leave()
    model, run_id, bounds = random_model(11), "late", Bounds(8, 1 << 20)
    given = replica_arguments("late", run_id=run_id, redis_url=redis_url)
    async with open_streams(
        redis_url, run_id=run_id, prompts=bounds, groups=bounds, timeout_seconds=PATIENCE_SECONDS
    ) as streams:
        side = learner_side(
            streams,
            model=cast(Any, Trained(model)),
            bucket_bytes=BUCKET_BYTES,
            timeout_seconds=PATIENCE_SECONDS,
        )
        learner.version += 1
        await side.publisher.publish(learner.version)
        await streams.prompts.put(encode_prompt_group(make_prompt()))
        stop = asyncio.Event()
        running = asyncio.create_task(
            run_replica(
                given,
                stop,
                engine,
                streams,
                replica=Replica(),
                stop_token_ids=(),
                metrics_address="127.0.0.1:0",
            )
        )
        async with side.catching_up(), asyncio.timeout(PATIENCE_SECONDS):
            while not await streams.rollouts.peek():
                await asyncio.sleep(0.02)
        assert side.serving == {"late": learner.version}
        assert engine.policy_version == learner.version
        await assert_serves(engine, model)
        stop.set()
        await running
        await side.close()


async def test_a_replica_whose_engine_stands_still_is_stuck_until_it_goes_on(
    engine: VllmEngine, learner: Learner
) -> None:
    await learner.publish(random_model(11))
    assert engine.policy_version is not None
    scene = Scene(name="stalled", engine=cast(Any, engine))
    await scene.replica.handle(Event.READY)
    await scene.replica.swapped(engine.policy_version)
    await scene.replica.judged(engine.policy_version, is_confirmed=True)
    running = asyncio.create_task(scene.sampler.run())
    (process,) = engine.processes
    os.kill(process.pid, signal.SIGSTOP)
    try:
        await scene.prompts.put(encode_prompt_group(make_prompt()))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while scene.sampler.report().stuck_seconds < 1:
                await asyncio.sleep(0.05)
        sentence = scene.sampler.report().sentence
        assert re.fullmatch(r"samples 1 group, the oldest for \d+ s", sentence)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await scene.results():
            await asyncio.sleep(0.05)
    await scene.replica.handle(Event.DRAIN)
    await running
    assert scene.sampler.report() == Report("has drained", 0.0)


async def test_kill_9_of_the_engine_makes_every_pending_call_raise(engine: VllmEngine) -> None:
    version = engine.policy_version
    assert version is not None
    running = [sample(engine, f"k{i}", max_completion_tokens=LASTING_TOKENS) for i in range(8)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while engine.progress("k0", start=0) is None:
            await asyncio.sleep(0.005)
    (child,) = engine_processes(os.getpid())
    os.kill(child, signal.SIGKILL)
    pending = [*running, engine.leave_group(), engine.adopt_version(1)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    last = engine.progress("k0", start=0)
    assert last is not None and last.version_runs == (VersionRun(version, len(last.token_ids)),)
    await asyncio.wait_for(engine.wait_until_dead(), PATIENCE_SECONDS)
    assert not engine.is_alive
    with pytest.raises(EngineError):
        await sample(engine, "after-death")


# --- with engines of their own ------------------------------------------------------------------


def engine_processes(parent: int) -> list[int]:
    """Children of `parent` that run an engine: forked, and renamed by vLLM where it can."""
    found = []
    forked = Path(f"/proc/{parent}/cmdline").read_bytes()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        is_engine = b"EngineCore" in command or command == forked
        if int(fields[1]) == parent and fields[0] != "Z" and is_engine:
            found.append(int(entry.name))
    return found


async def test_a_frozen_engine_is_killed_at_the_deadline_and_shutdown_leaves_no_process(
    model_path: Path,
) -> None:
    settings = replace(settings_for(model_path), control_timeout_seconds=3.0)
    engine = await VllmEngine.start(settings)
    (child,) = engine_processes(os.getpid())
    await engine.adopt_version(3)
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer"):
        await engine.leave_group()
    assert not engine.is_alive
    await engine.shutdown()
    await engine.shutdown()
    assert engine_processes(os.getpid()) == []


async def test_shutdown_ends_running_requests_and_leaves_no_process(model_path: Path) -> None:
    engine = await VllmEngine.start(settings_for(model_path))
    await engine.adopt_version(3)
    running = sample(engine, "running", max_completion_tokens=LASTING_TOKENS)
    await asyncio.sleep(0.02)
    await engine.shutdown()
    with pytest.raises(EngineError):
        await asyncio.wait_for(running, PATIENCE_SECONDS)
    assert engine_processes(os.getpid()) == []


FRONT_END = """
    import asyncio, sys
    from services.rollout.engine import VllmEngine
    from services.rollout.vllm_launch import EngineSettings

    async def main():
        engine = await VllmEngine.start(EngineSettings(
            model_path=sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=2, seed=1,
            device="cpu", kv_cache_bytes=16 << 20, load_format="dummy"))
        print("started", flush=True)
        await engine.wait_until_dead()

    asyncio.run(main())
"""


async def test_kill_9_of_the_front_end_leaves_no_engine(model_path: Path) -> None:
    root = Path(__file__).parents[2]
    front_end = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FRONT_END), str(model_path)],
        cwd=root,
        stdout=subprocess.PIPE,
    )
    assert front_end.stdout is not None
    try:
        line = await asyncio.wait_for(asyncio.to_thread(front_end.stdout.readline), 600)
        assert line == b"started\n"
        (child,) = engine_processes(front_end.pid)
    finally:
        front_end.kill()
        front_end.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
