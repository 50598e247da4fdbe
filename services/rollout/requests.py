"""Asking the engine for the completions of one prompt, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from services.rollout.concurrency import EngineLoad
from services.rollout.draft import Draft, GroupDraft
from shared.errors import EngineError
from shared.metrics.rollout import ROLLOUT_IN_FLIGHT, ROLLOUT_RESUMED_TOKENS
from shared.records import Completion

T = TypeVar("T")


class Engine(Protocol):
    """What the sampler needs of vLLM; `services.rollout.engine.VllmEngine` is it."""

    @property
    def is_alive(self) -> bool:
        """False once nothing can be sampled any more, ever."""

    @property
    def load(self) -> EngineLoad:
        """What the engine said of itself last."""

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Completion:
        """Sample one completion."""

    def progress(self, request_id: str, *, start: int) -> Completion | None:
        """What a request has sampled so far, without its first `start` tokens; None if nothing.

        Exact in every field, as in the completion that is being made; known also after the engine
        has died, until the request is aborted.
        """


class Requests:
    """The requests of one replica.

    Args:
        name: of the replica; the engine tells requests apart by names that begin with it.
        on_progress: called when a completion ended.

    Attributes:
        num_groups: groups that the engine works on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        stop_token_ids: Sequence[int],
        on_progress: Callable[[], None],
    ) -> None:
        self.num_groups = 0
        self._engine = engine
        self._name = name
        self._stop_token_ids = tuple(stop_token_ids)
        self._on_progress = on_progress
        self._num_requests = 0

    async def sample(
        self,
        prompt_token_ids: Sequence[int],
        *,
        num_completions: int,
        temperature: float,
        max_completion_tokens: int,
    ) -> tuple[Completion, ...]:
        """Completions of one prompt.

        Raises:
            EngineError, ValueError: the first that failed; the others are cancelled.
        """
        return await self._all(
            self._request(
                prompt_token_ids,
                temperature=temperature,
                max_completion_tokens=max_completion_tokens,
                request_id=self._next_id(),
            )
            for _ in range(num_completions)
        )

    async def finish(self, draft: GroupDraft) -> None:
        """Sample what a group lacks; after a failure the draft has what was sampled until then.

        Raises:
            EngineError, ValueError: as `sample`.
        """
        ROLLOUT_RESUMED_TOKENS.inc(draft.num_tokens)
        self.num_groups += 1
        try:
            await self._all(
                self._continue(draft, each) for each in draft.drafts if not each.is_complete
            )
        finally:
            self.num_groups -= 1

    async def _continue(self, whole: GroupDraft, draft: Draft) -> None:
        group, start, request_id = whole.group, len(draft), self._next_id()
        draft.read = lambda: self._engine.progress(request_id, start=len(draft) - start)
        try:
            tokens = await self._request(
                [*group.prompt_token_ids, *draft.token_ids],
                temperature=group.temperature,
                max_completion_tokens=group.max_completion_tokens - start,
                request_id=request_id,
            )
        except EngineError:
            # Before the others of the group are cancelled, which ends what is known of them.
            whole.catch_up()
            raise
        draft.complete(tokens, start=start)

    async def _request(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        request_id: str,
    ) -> Completion:
        with ROLLOUT_IN_FLIGHT.track_inprogress():
            completion = await self._engine.generate(
                prompt_token_ids,
                temperature=temperature,
                max_completion_tokens=max_completion_tokens,
                stop_token_ids=self._stop_token_ids,
                request_id=request_id,
            )
        self._on_progress()
        return completion

    async def _all(self, requests: Iterable[Coroutine[Any, Any, T]]) -> tuple[T, ...]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(request) for request in requests]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tuple(task.result() for task in tasks)

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"{self._name}/{self._num_requests}"
