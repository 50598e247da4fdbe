"""A publication under way: who is still to get the version, who failed, what the time went to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from services.learner.peer import CANARY, Peer, left_behind
from services.learner.refit import Version
from shared.broadcast import SLOW
from shared.errors import PeerError

MAX_FAILURES = 2
"""Of one replica in one publication; more rounds for it would hold up the training."""


@dataclass(slots=True)
class Rounds:
    """The rounds of one publication; `pauses` has those that serve the version.

    Attributes:
        until: monotonic; no other round begins later.
        num_rounds: begun so far.
    """

    policy_version: int
    remaining: list[Peer]
    until: float
    num_rounds: int = 0
    version: Version | None = None
    failures: Counter[Peer] = field(default_factory=Counter)
    pauses: dict[Peer, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"gather": 0.0, "broadcast": 0.0, "load": 0.0}
    )

    def count(self, failed: dict[Peer, PeerError], *, doing: str) -> None:
        """These failed, and are to blame."""
        left_behind(failed, doing=doing)
        for peer, error in failed.items():
            # The same bytes give the same canary once more, and take as long on the same way.
            self.failures[peer] += MAX_FAILURES if error.status in (CANARY, SLOW) else 1

    def drop_the_hopeless(self) -> None:
        """Keep those for whom another round may do something."""
        self.remaining = [
            peer
            for peer in self.remaining
            if peer not in self.pauses
            and self.failures[peer] < MAX_FAILURES
            and not peer.gone.is_set()
        ]


class Timed:
    """Iterates over what `start` gives, and takes the time that producing it takes."""

    def __init__(self, start: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        self.seconds = 0.0
        self._start = start

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        items = self._start()
        while True:
            started = time.monotonic()
            item = next(items, None)
            self.seconds += time.monotonic() - started
            if item is None:
                return
            yield item
