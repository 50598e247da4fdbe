"""A group's way through three services as one trace, at a collector that a test stands in for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as pb,
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2_grpc as pb_grpc,
)

from services.rollout.replica import Event
from services.verifier.worker import Worker
from shared import tracing
from shared.codec import decode_prompt_group, encode_prompt_group
from shared.memory_stream import MemoryStream
from shared.records import Outcome, Score
from shared.rpc import call, serve
from tests.factories import make_prompt
from tests.learner.test_inbox import Scene as LearnerScene
from tests.learner.test_inbox import WaitedError, give_up
from tests.rollout.scene import Scene as RolloutScene


@dataclass
class Collector:
    """What arrived, by the name of the service."""

    endpoint: str
    spans: dict[str, list[Any]] = field(default_factory=dict)

    async def Export(self, request: pb.ExportTraceServiceRequest, _: Any) -> Any:
        for each in request.resource_spans:
            about = {pair.key: pair.value.string_value for pair in each.resource.attributes}
            found = self.spans.setdefault(about["service.name"], [])
            found += [span for scope in each.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> Any:
        (found,) = [span for span in self.spans.get(service, ()) if span.name == name]
        return found


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    stub = Collector(f"http://127.0.0.1:{port}")
    pb_grpc.add_TraceServiceServicer_to_server(stub, server)  # type: ignore[no-untyped-call]
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", stub.endpoint)
    yield stub
    await server.stop(None)


def as_service(collector: Collector, role: str) -> Any:
    return tracing.exporting(collector.endpoint, role=role, name=f"{role}-0", run_id="run")


class GivesOne:
    """A pool whose every completion passes."""

    task = type("Task", (), {"name": "countdown"})

    async def score(self, completion: str, *, answer: str) -> Score:
        return Score(Outcome.PASS, 1.0, "")


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def filled(stream: MemoryStream) -> None:
    async with asyncio.timeout(60.0):
        while not (await stream.depth()).waiting:
            await asyncio.sleep(0.001)


async def sample(learner: LearnerScene, collector: Collector) -> None:
    scene = RolloutScene(prompts=learner.prompts, rollouts=learner.rollouts)
    await scene.replica.handle(Event.READY)
    await scene.serve(0)
    async with as_service(collector, "rollout"), running(scene.sampler.run()):
        await filled(learner.rollouts)


async def score(learner: LearnerScene, collector: Collector) -> None:
    pool: Any = GivesOne()
    tokenizer: Any = type("Tokenizer", (), {"decode": lambda self, token_ids: ""})()
    worker = Worker(
        name="verifier-0",
        pool=pool,
        tokenizer=tokenizer,
        rollouts=learner.rollouts,
        scored=learner.scored,
        dead_letter=learner.dead,
        max_concurrent_groups=1,
        max_attempts=2,
    )
    async with as_service(collector, "verifier"), running(worker.run(asyncio.Event())):
        await filled(learner.scored)


GROUP = (
    ("isentrope-learner", "issue"),
    ("isentrope-rollout", "wait in prompts"),
    ("isentrope-rollout", "sample"),
    ("isentrope-verifier", "wait in rollouts"),
    ("isentrope-verifier", "score"),
    ("isentrope-learner", "wait in scored"),
    ("isentrope-learner", "drop"),
)


async def test_a_group_is_one_trace_through_three_services_in_order(collector: Collector) -> None:
    learner = LearnerScene()
    async with as_service(collector, "learner"):
        await learner.feeder._put(learner.ledger.issue_next(), 0)
    await sample(learner, collector)
    await score(learner, collector)
    learner.ledger.finish(0)  # so that it comes as a duplicate
    async with as_service(collector, "learner"):
        with pytest.raises(WaitedError):
            await learner.inbox.take_batch(1, policy_version=0, while_waiting=give_up)
    spans = [collector.named(*each) for each in GROUP]
    assert len({span.trace_id for span in spans}) == 1
    assert [span.parent_span_id for span in spans] == [b"", *(each.span_id for each in spans[:-1])]
    starts = [span.start_time_unix_nano for span in spans]
    assert starts == sorted(starts)
    runs = [event for event in spans[2].events if event.name == "version run"]
    assert len(runs) == 8, "one version each, of a group of 8"
    assert {pair.key for pair in runs[0].attributes} == {
        "completion", "policy_version", "num_tokens",
    }  # fmt: skip


async def test_a_publication_s_calls_are_spans_of_one_trace_on_both_sides(
    collector: Collector,
) -> None:
    async def pause(request: Any, context: Any) -> bytes:
        return b""

    handler = grpc.method_handlers_generic_handler(
        "test.Test", {"Do": grpc.unary_unary_rpc_method_handler(pause, bytes, bytes)}
    )
    serving = serve(
        host="127.0.0.1",
        port=0,
        port_key="port",
        services=[],
        add=lambda server: server.add_generic_rpc_handlers((handler,)),
    )
    async with (
        as_service(collector, "learner"),
        serving as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        method: Callable[..., Any] = channel.unary_unary("/test.Test/Do")
        with tracing.span("publish", policy_version=3):
            await call(method, b"", peer="rollout-0", timeout_seconds=60.0)
    names = ("publish", "bytes", "/test.Test/Do")
    spans = [collector.named("isentrope-learner", name) for name in names]
    assert len({span.trace_id for span in spans}) == 1
    assert [span.parent_span_id for span in spans[1:]] == [each.span_id for each in spans[:-1]]


async def test_what_is_not_sampled_is_not_traced_anywhere(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    learner = LearnerScene()
    async with as_service(collector, "learner"):
        await learner.feeder._put(learner.ledger.issue_next(), 0)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    await sample(learner, collector)
    assert collector.spans == {}


async def test_without_an_endpoint_nothing_is_carried_and_nothing_imported() -> None:
    learner = LearnerScene()
    async with tracing.exporting(None, role="learner", name="learner", run_id="run"):
        await learner.feeder._put(learner.ledger.issue_next(), 0)
    (payload,) = await learner.prompts.peek()
    assert decode_prompt_group(payload).trace_context == b""
    program = "import sys; import shared.tracing; print('opentelemetry' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout == "False\n"


def test_a_context_costs_at_most_sixty_bytes_a_group() -> None:
    plain = make_prompt()
    context = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
    traced = encode_prompt_group(replace(plain, trace_context=context))
    assert decode_prompt_group(traced).trace_context == context
    assert len(traced) - len(encode_prompt_group(plain)) <= 60
