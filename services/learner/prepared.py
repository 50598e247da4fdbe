"""A batch made ready for the ranks: as a rule while the step before it is computed.

Which groups a step trains on is decided when they are taken, by the version and the ledger of that
moment. What is made ready before is therefore a guess: it is used if just these groups are taken
for that version, and made anew if not. A wrong guess costs a thread some time, no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from services.learner.balance import Plan
from services.learner.batch import Batch
from shared.records import ScoredGroup


class Prepared(NamedTuple):
    """A batch, and what the ranks but the first are told and given of it.

    Attributes:
        plans: of its mini-batches.
        rows: as `shares.pack_rows`, for all of them.
        tokens: as `shares.pack_tokens`, for each.
    """

    batch: Batch
    plans: tuple[Plan, ...]
    rows: bytes
    tokens: tuple[bytes, ...]


Prepare = Callable[[Sequence[ScoredGroup], int], Prepared]
"""Makes groups ready for a step of this policy version; in any thread, whatever the engine does."""


class Preparation:
    """Prepares in a thread, at most one guess at a time."""

    def __init__(self, prepare: Prepare) -> None:
        """Nothing is guessed yet."""
        self._prepare = prepare
        self._guess: Sequence[ScoredGroup] = ()
        self._guessed_version = -1
        self._making: asyncio.Task[Prepared] | None = None

    def begin(self, groups: Sequence[ScoredGroup], *, policy_version: int) -> None:
        """Guess that the next batch is of these groups, in this order."""
        self.drop()
        self._guess, self._guessed_version = tuple(groups), policy_version
        self._making = asyncio.create_task(
            asyncio.to_thread(self._prepare, groups, policy_version), name="prepares a batch"
        )

    async def of(self, groups: Sequence[ScoredGroup], *, policy_version: int) -> Prepared:
        """These groups made ready, whether that was guessed or not."""
        if self._making is None or not self._is_guessed(groups, policy_version):
            self.drop()
            return await asyncio.to_thread(self._prepare, groups, policy_version)
        making, self._making, self._guess = self._making, None, ()
        return await making

    def drop(self) -> None:
        """Forget the guess; a thread that is at it ends by itself."""
        if self._making is not None:
            self._making.cancel()
        self._making, self._guess = None, ()

    def _is_guessed(self, groups: Sequence[ScoredGroup], policy_version: int) -> bool:
        """The very groups: another attempt of a prompt is equal in nothing but its place."""
        return (
            policy_version == self._guessed_version
            and len(groups) == len(self._guess)
            and all(one is other for one, other in zip(groups, self._guess, strict=True))
        )
