"""An engine whose answers a test decides; it keeps the promises of `services.rollout.engine`."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.rollout.concurrency import EngineLoad
from shared.errors import EngineError
from shared.partials import append_runs
from shared.records import Completion, VersionRun

FIRST_ID = 100
"""A token's id is this and its place in prompt and completion, so that a gap shows."""


@dataclass
class Request:
    """A request, and the version of each token that it has."""

    prompt: list[int]
    max_tokens: int
    versions: list[int] = field(default_factory=list)
    ends: asyncio.Event = field(default_factory=asyncio.Event)

    def tokens(self, start: int, *, is_truncated: bool = False) -> Completion:
        ids = [FIRST_ID + len(self.prompt) + place for place in range(len(self.versions))][start:]
        runs: list[VersionRun] = []
        append_runs(runs, [VersionRun(version, 1) for version in self.versions[start:]])
        logprobs = array("f", [-1.0 / id for id in ids])
        return Completion(array("I", ids), logprobs, tuple(runs), is_truncated)


class FakeEngine:
    """Each request waits for `allow` or `end`, and has a token of each version seen on the way.

    Attributes:
        requests: names of all requests ever made.
        running: those under way, and those that the engine's death left.
        failures: so many requests that end will be given up instead.
    """

    kv_cache_tokens = 1 << 20

    def __init__(self) -> None:
        self.policy_version = 0
        self.requests: list[str] = []
        self.running: dict[str, Request] = {}
        self.prompts: list[list[int]] = []
        self.cancelled: list[str] = []
        self.failures = 0
        self.load = EngineLoad()
        self.is_alive = True
        self.allow = asyncio.Event()
        self.allow.set()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Completion:
        assert request_id not in self.requests, "the engine refuses a name it knows"
        assert max_completion_tokens > 0
        if not self.is_alive:
            raise EngineError("the engine's process has ended")
        self.requests.append(request_id)
        self.prompts.append(list(prompt_token_ids))
        request = self.running[request_id] = Request(list(prompt_token_ids), max_completion_tokens)
        started = self.policy_version
        try:
            await self._end_of(request)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            del self.running[request_id]
            raise
        if not self.is_alive:
            raise EngineError("the engine's process has ended")
        del self.running[request_id]
        if self.failures:
            self.failures -= 1
            raise EngineError("given up")
        first = max([started, *(version + 1 for version in request.versions)])
        request.versions += range(first, self.policy_version + 1)
        del request.versions[max_completion_tokens:]
        is_truncated = len(request.versions) == max_completion_tokens
        return request.tokens(0, is_truncated=is_truncated)

    def progress(self, request_id: str, *, start: int) -> Completion | None:
        request = self.running.get(request_id)
        return request.tokens(start) if request and len(request.versions) > start else None

    def emit(self, num_tokens: int) -> None:
        """Every running request samples so many tokens of the present version."""
        for request in self.running.values():
            request.versions += [self.policy_version] * num_tokens

    def die(self) -> None:
        """Every request fails, and each one after; what they had sampled is still known."""
        self.is_alive = False
        self.allow.set()

    async def _end_of(self, request: Request) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.allow, request.ends)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
