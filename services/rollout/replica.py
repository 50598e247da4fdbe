"""What a replica may do: its state, and the pure function that changes it.

    JOINING --ready--> STALE --confirmed--> SERVING --drain--> DRAINING --finished--> GONE
                         ^--- swapped, rejected, left behind, broken --'

Only SERVING samples new groups, and the only way into it is `confirmed`: the learner saw that the
checksum of the weights and the canary's log-probs match its own. A swap that is not yet confirmed
is STALE; completions that saw such weights are not handed on before the word of the learner.

A replica that is SERVING may be outdated, by what the learner announced (`announced`): then it
samples no new groups either, until it hears otherwise or is refitted.
"""

from __future__ import annotations

import asyncio
import math
import time
from enum import Enum
from typing import Any

REMEMBERED_VERSIONS = 256
"""A completion that saw a version older than this many publications is sampled again."""


class State(Enum):
    """Where a replica is in its life."""

    JOINING = "joining"
    STALE = "stale"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


class Event(Enum):
    """What can happen to a replica."""

    READY = "the engine is loaded"
    SWAPPED = "new weights are in, not yet confirmed"
    CONFIRMED = "the learner confirmed the weights"
    REJECTED = "the learner rejected the weights"
    LEFT_BEHIND = "the learner published without this replica"
    BROKEN = "new weights could not be loaded, and the old ones are damaged"
    DRAIN = "asked to stop"
    FINISHED = "nothing is in flight any more"


_TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.JOINING, Event.READY): State.STALE,
    (State.STALE, Event.SWAPPED): State.STALE,
    (State.STALE, Event.CONFIRMED): State.SERVING,
    (State.STALE, Event.REJECTED): State.STALE,
    (State.SERVING, Event.SWAPPED): State.STALE,
    (State.SERVING, Event.REJECTED): State.STALE,
    (State.STALE, Event.LEFT_BEHIND): State.STALE,
    (State.SERVING, Event.LEFT_BEHIND): State.STALE,
    (State.STALE, Event.BROKEN): State.STALE,
    (State.SERVING, Event.BROKEN): State.STALE,
    (State.JOINING, Event.DRAIN): State.DRAINING,
    (State.STALE, Event.DRAIN): State.DRAINING,
    (State.SERVING, Event.DRAIN): State.DRAINING,
    (State.DRAINING, Event.DRAIN): State.DRAINING,
    (State.DRAINING, Event.SWAPPED): State.DRAINING,
    (State.DRAINING, Event.CONFIRMED): State.DRAINING,
    (State.DRAINING, Event.REJECTED): State.DRAINING,
    (State.DRAINING, Event.LEFT_BEHIND): State.DRAINING,
    (State.DRAINING, Event.BROKEN): State.DRAINING,
    (State.DRAINING, Event.FINISHED): State.GONE,
}


def next_state(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        ValueError: the event cannot happen in this state.
    """
    try:
        return _TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"{event.name} cannot happen to a replica that is {state.name}") from None


class Replica:
    """The state of this process, and the versions it sampled from; others may wait on it.

    Attributes:
        is_outdated: the learner would drop what is sampled from the version here.
        claims_from: no group is to be claimed by an older version than this.
    """

    def __init__(self) -> None:
        self.state = State.JOINING
        self.policy_version = -1
        self.is_outdated = False
        self.claims_from = 0
        self._served: dict[int, float] = {}
        self._verdicts: dict[int, bool] = {}
        self._changed = asyncio.Condition()

    async def handle(self, event: Event) -> None:
        """Apply an event that says nothing about a version."""
        async with self._changed:
            self._note_served()
            self.state = next_state(self.state, event)
            self._changed.notify_all()

    async def heed(self, *, is_outdated: bool, claims_from: int) -> None:
        """What follows from the announced version, until the next refit or the next call."""
        async with self._changed:
            self._note_served()
            self.is_outdated, self.claims_from = is_outdated, claims_from
            self._changed.notify_all()

    async def swapped(self, policy_version: int) -> None:
        """The engine samples from `policy_version` now; the learner has not confirmed it."""
        async with self._changed:
            self._note_served()
            self.state = next_state(self.state, Event.SWAPPED)
            self.policy_version = policy_version
            self._verdicts.pop(policy_version, None)
            self._changed.notify_all()

    async def judged(self, policy_version: int, *, is_confirmed: bool) -> None:
        """The learner's word on a swapped version.

        Raises:
            ValueError: the engine does not hold this version.
        """
        async with self._changed:
            if policy_version != self.policy_version or policy_version < 0:
                raise ValueError(
                    f"version {policy_version} is not loaded; {self.policy_version} is"
                )
            event = Event.CONFIRMED if is_confirmed else Event.REJECTED
            if self.state is State.SERVING and is_confirmed:
                return
            self._note_served()
            self.state = next_state(self.state, event)
            self.is_outdated = False
            self._remember(policy_version, is_confirmed)
            self._changed.notify_all()

    async def wait_to_claim(self) -> bool:
        """Wait until this replica may take groups; False if it drains first."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_ending or self.serves(self.claims_from))
            return not self.is_ending

    async def wait_to_serve(self, *, min_policy_version: int) -> bool:
        """Wait until this replica serves that version or a later one; False if it drains first."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_ending or self.serves(min_policy_version))
            return not self.is_ending

    async def wait_for_verdict(self, policy_version: int) -> bool:
        """Wait for the learner's word on a version that was sampled from; True if confirmed.

        A version that was replaced before the learner judged it counts as rejected.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: policy_version in self._verdicts or policy_version != self.policy_version
            )
            return self._verdicts.get(policy_version, False)

    def serves(self, min_policy_version: int) -> bool:
        """Whether a group that needs this version or a later one may be sampled here now."""
        is_serving = self.state is State.SERVING and not self.is_outdated
        return is_serving and self.policy_version >= min_policy_version

    def served_until(self, min_policy_version: int) -> float:
        """When `serves` was last true, on the monotonic clock; -inf if it never was."""
        self._note_served()
        times = (at for version, at in self._served.items() if version >= min_policy_version)
        return max(times, default=-math.inf)

    @property
    def confirmed_versions(self) -> frozenset[int]:
        """Versions that were sampled from, and that the learner confirmed."""
        return frozenset(each for each, is_confirmed in self._verdicts.items() if is_confirmed)

    def _remember(self, policy_version: int, is_confirmed: bool) -> None:
        self._verdicts[policy_version] = is_confirmed
        _keep_newest(self._verdicts)

    def _note_served(self) -> None:
        """Before anything changes: until now it was as it is."""
        if self.serves(0):
            self._served.pop(self.policy_version, None)
            self._served[self.policy_version] = time.monotonic()
            _keep_newest(self._served)

    @property
    def is_ending(self) -> bool:
        """True once no new group is to be claimed, ever."""
        return self.state in (State.DRAINING, State.GONE)


def _keep_newest(by_version: dict[int, Any]) -> None:
    """Of what was put in last."""
    while len(by_version) > REMEMBERED_VERSIONS:
        del by_version[next(iter(by_version))]
