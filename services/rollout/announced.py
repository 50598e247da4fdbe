"""What the learner announced in Redis, and what it means for a replica that gRPC may not reach.

The learner tells a replica of a version by gRPC. One that it does not reach, while Redis does,
would sample its old version for ever, and hold what only newer ones may sample. So a replica also
reads the version that was announced, now and then. Beyond `max_staleness` of it the learner would
drop all that is sampled here: the replica is outdated, and claims nothing.

That is no state: the weights are those that the learner confirmed, and an announcement may itself
be wrong for a while, when Redis fell back to an older one, or the learner to an older version that
it has not announced yet. The next look puts it right, where a replica that had declared itself
stale would wait for a refit that the learner sees no need of.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from services.rollout.replica import Replica
from shared.rl.staleness import staleness


class Announced:
    """The last announcement, told to one replica.

    Args:
        ask: `shared.lease.Registry.announced_version`.
        patience_seconds: a replica ahead of the announced version is outdated after this time
            only. As a rule its version is being published and not yet announced; else the learner
            resumed at an older one.

    Attributes:
        version: the last that was heard; None before the first, and after Redis lost it.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[int | None]],
        *,
        replica: Replica,
        max_staleness: int,
        patience_seconds: float,
    ) -> None:
        self.version: int | None = None
        self._ask = ask
        self._replica = replica
        self._max_staleness = max_staleness
        self._patience_seconds = patience_seconds
        self._ahead_since: float | None = None
        self._needed = 0

    async def look(self) -> None:
        """Hear the last announcement.

        Raises:
            StreamError: Redis does not tell.
        """
        self.version = await self._ask()
        await self._tell()

    async def need(self, policy_version: int) -> None:
        """The replica gave groups back that need this version: without it, it claims no more.

        Unless the version is above the announced one: then nobody has it, and the learner, which
        resumed at an older one, issues such groups again.
        """
        self._needed = max(self._needed, policy_version)
        await self._tell()

    async def _tell(self) -> None:
        if self.version is None or self._needed > self.version:
            self._needed = 0
        await self._replica.heed(is_outdated=self._is_outdated(), claims_from=self._needed)

    def _is_outdated(self) -> bool:
        own, announced, now = self._replica.policy_version, self.version, time.monotonic()
        if announced is None or own < 0 or staleness(announced, [own]) <= self._max_staleness:
            self._ahead_since = None
            return False
        if own < announced:
            self._ahead_since = None
            return True
        if self._ahead_since is None:
            self._ahead_since = now
        return now - self._ahead_since >= self._patience_seconds
