"""An engine whose answers a test decides; it keeps the promises of `services.rollout.engine`."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

from shared.errors import EngineError
from shared.records import Completion, VersionRun


class FakeEngine:
    """Each request waits for `allow`, then ends after one token per version seen on the way."""

    def __init__(self) -> None:
        self.policy_version = 0
        self.requests: list[str] = []
        self.cancelled: list[str] = []
        self.failures = 0
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
        self.requests.append(request_id)
        started = self.policy_version
        try:
            await self.allow.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        if self.failures:
            self.failures -= 1
            raise EngineError("given up")
        versions = list(range(started, self.policy_version + 1))
        return Completion(
            token_ids=array("I", versions),
            behaviour_logprobs=array("f", [-1.0] * len(versions)),
            version_runs=tuple(VersionRun(version, 1) for version in versions),
            is_truncated=False,
        )
