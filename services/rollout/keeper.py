"""Saves what a group has so far, and takes up what another replica has saved of it.

Only tokens of versions that the learner confirmed to this replica are saved, so whoever goes on
from them need not ask. A group whose completions are shorter than one interval is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.rollout.draft import GroupDraft
from services.rollout.replica import Replica
from shared.errors import StreamError
from shared.metrics.rollout import ROLLOUT_SAVED_TOKENS
from shared.partials import Partials
from shared.rl.staleness import staleness
from shared.stream import Entry

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


class Keeper:
    """Keeps the drafts of one replica's groups.

    Args:
        consumer: the name under which the entries are claimed.
        every_tokens: a group is saved when one of its completions has so many new tokens; 0 keeps
            nothing, neither in the store nor from one attempt to the next.
        max_staleness: a saved completion with an older token is begun anew, since the learner
            would drop it.
    """

    def __init__(
        self,
        partials: Partials,
        *,
        consumer: str,
        replica: Replica,
        every_tokens: int,
        max_staleness: int,
    ) -> None:
        self.is_on = every_tokens > 0
        self._partials = partials
        self._consumer = consumer
        self._replica = replica
        self._every_tokens = every_tokens
        self._max_staleness = max_staleness
        self._saved: set[str] = set()

    async def restore(self, entry: Entry, draft: GroupDraft) -> None:
        """Begin the draft with what an earlier delivery of the entry has saved."""
        if not self.is_on or not entry.is_redelivered:
            return
        try:
            kept = await self._partials.load(entry)
        except StreamError as error:
            logger.warning("group %s begins anew: %s", draft.group.uid, error)
            return
        self._saved.add(entry.id)
        draft.restore(kept)
        draft.forget_older(self._is_too_old)
        await self.save(entry, draft)
        if draft.num_tokens:
            logger.info("group %s goes on after %d tokens", draft.group.uid, draft.num_tokens)

    @asynccontextmanager
    async def keeping(
        self, entry: Entry, draft: GroupDraft, *, on_progress: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Save at intervals meanwhile, as long as the entry is this replica's.

        Args:
            on_progress: called when tokens have arrived.
        """
        if not self.is_on or draft.group.max_completion_tokens < self._every_tokens:
            yield
            return
        keeping = asyncio.create_task(
            self._keep(entry, draft, on_progress), name=f"keep {entry.id}"
        )
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait({keeping})

    async def save(self, entry: Entry, draft: GroupDraft) -> None:
        """Save what may be saved now; without the store, or without the entry, nothing."""
        if not self.is_on or not draft.is_ours:
            return
        try:
            await self._save(entry, draft)
        except StreamError as error:
            logger.warning("group %s was not saved: %s", draft.group.uid, error)

    async def leave(self, entry: Entry, draft: GroupDraft) -> None:
        """Save what may be saved, for another: this replica does not finish the group."""
        await self.save(entry, draft)
        self._saved.discard(entry.id)

    async def drop(self, entry: Entry) -> None:
        """The entry is done: forget what was saved of it."""
        if entry.id not in self._saved:
            return
        self._saved.discard(entry.id)
        try:
            await self._partials.drop(entry, consumer=self._consumer)
        except StreamError as error:
            logger.warning("left the pieces of entry %s to expire: %s", entry.id, error)

    async def _keep(self, entry: Entry, draft: GroupDraft, on_progress: Callable[[], None]) -> None:
        while draft.is_ours:
            await asyncio.sleep(_POLL_SECONDS)
            if draft.catch_up():
                on_progress()
            if self._is_due(draft):
                await self.save(entry, draft)

    async def _save(self, entry: Entry, draft: GroupDraft) -> None:
        confirmed = self._replica.confirmed_versions
        if draft.is_saved_too_far(confirmed):
            await self._partials.drop(entry, consumer=self._consumer)
            draft.mark_dropped()
        pieces, num_cuts = draft.unsaved(confirmed), draft.num_cuts
        if not pieces:
            return
        self._saved.add(entry.id)
        draft.is_ours = await self._partials.save(entry, pieces, consumer=self._consumer)
        if draft.is_ours:
            draft.mark_saved(pieces, num_cuts=num_cuts)
            ROLLOUT_SAVED_TOKENS.inc(sum(len(piece.tokens.token_ids) for piece in pieces))
        else:
            logger.warning("group %s is another replica's now", draft.group.uid)

    def _is_due(self, draft: GroupDraft) -> bool:
        confirmed = self._replica.confirmed_versions
        is_long = draft.num_unsaved(confirmed) >= self._every_tokens
        return is_long or draft.is_saved_too_far(confirmed)

    def _is_too_old(self, policy_version: int) -> bool:
        return staleness(self._replica.policy_version, [policy_version]) > self._max_staleness
