"""OpenTelemetry traces, for who asks for them: a trace per group, and one per publication.

    issue ─▶ wait in prompts ─▶ sample ─▶ wait in rollouts ─▶ score ─▶ wait in scored ─▶ train
    publish ─▶ one span a call, on the learner's and on the replica's side

Each span is the parent of the next, whichever process that is in; a group that is not trained on
ends with `drop`. A group carries the context of
its last span as W3C's `traceparent`, 55 bytes; one without belongs to no trace, and costs nothing.

Tracing is on where `OTEL_EXPORTER_OTLP_ENDPOINT` is set and the extra `isentrope[otel]` is
installed. OpenTelemetry reads its other standard variables itself, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` and `OTEL_EXPORTER_OTLP_HEADERS` among them. Else nothing is imported.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_HEADER = "traceparent"

_tracer: Any = None
"""Of this process; None while tracing is off."""


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that is going on, or nothing, where it is not traced.

    Attributes:
        context: for what comes after it; empty if that is not to be traced.
    """

    context: bytes = b""
    _span: Any = None

    def event(self, name: str, **attributes: str | int | float) -> None:
        """Something that happened meanwhile."""
        if self._span is not None:
            self._span.add_event(name, attributes)


_NOTHING = Span()


@asynccontextmanager
async def exporting(
    endpoint: str | None, *, role: str, name: str, run_id: str
) -> AsyncIterator[None]:
    """Trace what this process does, and send it to `endpoint`; nothing if that is None.

    Begin it after every fork: what sends has a thread.

    Args:
        role: names the service, unless `OTEL_SERVICE_NAME` does.
        name: of the process in its role.
    """
    provider = None if endpoint is None else _provider(endpoint, role, name, run_id)
    if provider is None:
        yield
        return
    global _tracer
    _tracer = provider.get_tracer("isentrope")
    logger.info("sends traces to %s", endpoint)
    try:
        yield
    finally:
        _tracer = None
        # Sends what is left, for which it has a deadline of its own.
        await asyncio.to_thread(provider.shutdown)


def _provider(endpoint: str, role: str, name: str, run_id: str) -> Any:
    """What makes spans, and sends them; None without the packages."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT = %s, but %s: no traces; install isentrope[otel]",
            endpoint,
            error,
        )
        return None
    named = {"service.name": f"isentrope-{role}", "service.instance.id": name}
    resource = Resource.create({**named, "isentrope.run": run_id})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


@contextmanager
def span(
    name: str, *, began: float | None = None, **attributes: str | int | float
) -> Iterator[Span]:
    """Something that goes on in this block, within whatever span the block is in.

    Args:
        began: Unix seconds, if before the block.
    """
    if _tracer is None:
        yield _NOTHING
        return
    start = None if began is None else _nanoseconds(began)
    with _tracer.start_as_current_span(name, attributes=attributes, start_time=start) as started:
        yield Span(_context_of(started), started)


@contextmanager
def stage(
    name: str, context: bytes, *, stream: str, since: float, **attributes: str | int | float
) -> Iterator[Span]:
    """What is done with a group in this block, and before that its wait.

    Args:
        context: that the group carries.
        stream: where it waited.
        since: Unix seconds, when it came there.
    """
    if _tracer is None or not context:
        yield Span(context)
        return
    waited = _wait(context, stream, since, time.time())
    with _tracer.start_as_current_span(name, waited, attributes=attributes) as started:
        yield Span(_context_of(started), started)


def record(
    name: str,
    context: bytes,
    *,
    stream: str,
    since: float,
    began: float,
    **attributes: str | int | float,
) -> None:
    """What was done with a group from `began`, Unix seconds, until now; else as `stage`."""
    if _tracer is None or not context:
        return
    waited = _wait(context, stream, since, began)
    done = _tracer.start_span(name, waited, start_time=_nanoseconds(began), attributes=attributes)
    done.end()


def call_metadata() -> tuple[tuple[str, str], ...] | None:
    """What a call says of the span that it is made in."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    context = _context_of(trace.get_current_span())
    return ((_HEADER, context.decode()),) if context else None


@contextmanager
def served(method: str, metadata: Any) -> Iterator[None]:
    """A call that is answered in this block, if its caller traces it."""
    context = b""
    if _tracer is not None:
        context = next((value.encode() for key, value in metadata or () if key == _HEADER), b"")
    if not context:
        yield
        return
    with _tracer.start_as_current_span(method, _parent(context)):
        yield


def _wait(context: bytes, stream: str, since: float, until: float) -> Any:
    """The context of a span for the time in a stream; clocks of two machines may differ."""
    from opentelemetry import trace

    start = _nanoseconds(min(since, until))
    waited = _tracer.start_span(f"wait in {stream}", _parent(context), start_time=start)
    waited.end(_nanoseconds(until))
    return trace.set_span_in_context(waited)


def _parent(context: bytes) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    text = context.decode("ascii", "replace")
    return TraceContextTextMapPropagator().extract({_HEADER: text})


def _context_of(started: Any) -> bytes:
    """Empty for a span that is not sampled: nothing that follows it is either."""
    found = started.get_span_context()
    if not (found.is_valid and found.trace_flags.sampled):
        return b""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-01".encode()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
