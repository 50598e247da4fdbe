"""Why no batch comes, in one sentence that names whom to look at first.

    waits for batch 41: 3 of 8 groups are at verifier-2 for 120 s

A pure function of what the learner can see: where the groups are, who has had one longest, who
holds a lease, what each replica serves. Groups belong to no batch before they are taken, so that
more may be under way than are missing; evaluations travel with them and are counted too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.stream import NOBODY, PROMPTS, ROLLOUTS, Holder

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class Awaited:
    """What the learner waits for: `what` is `batch 41`; `since` in monotonic seconds."""

    what: str
    num_missing: int
    num_wanted: int
    since: float

    @property
    def activity(self) -> str:
        """What the learner does meanwhile."""
        return f"waits for {self.what}"


@dataclass(frozen=True, slots=True)
class Station:
    """A stream, and those who take groups from it.

    Attributes:
        waiting: groups that nobody has taken.
        holders: who has taken some, longest first.
        leases: who of that role is there.
    """

    stream: Literal["prompts", "rollouts"]
    waiting: int = 0
    holders: Sequence[Holder] = ()
    leases: Collection[str] = ()

    @classmethod
    def of(
        cls,
        stream: Literal["prompts", "rollouts"],
        *,
        waiting: int,
        holders: Sequence[Holder],
        leases: Collection[str],
    ) -> Station:
        """As the stream says; what was given back waits like what nobody has taken."""
        given_back = sum(each.num_entries for each in holders if each.consumer == NOBODY)
        holders = [each for each in holders if each.consumer != NOBODY]
        return cls(stream, waiting + given_back, holders, leases)

    @property
    def kind(self) -> str:
        """What takes from it."""
        return {PROMPTS: "rollout replica", ROLLOUTS: "verifier"}[self.stream]

    @property
    def num_groups(self) -> int:
        """Groups that wait or are held."""
        return self.waiting + sum(holder.num_entries for holder in self.holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the learner sees of a run that it waits for.

    Attributes:
        waited_seconds: since the learner has waited.
        num_scored: groups that wait on `scored`.
        scored_is_full: by groups that were taken, and wait for a checkpoint.
        num_dead: entries in `dead_letter`.
        versions: what each replica that the learner has met serves; None for nothing.
        policy_version: the newest.
        learner_does: what keeps the learner from taking groups, or nothing.
    """

    awaited: Awaited
    waited_seconds: float
    prompts: Station
    rollouts: Station
    num_scored: int = 0
    scored_is_full: bool = False
    num_dead: int = 0
    versions: Mapping[str, int | None]
    policy_version: int
    learner_does: str = ""


def name_culprit(seen: Situation) -> str:
    """The sentence; one line, with a number and a name in it."""
    clause = (
        _of_the_learner(seen)
        or _of_nobody_there(seen)
        or _of_nobody_serving(seen)
        or _of_a_holder(seen)
        or _of_a_queue(seen)
        or _of_nothing_left(seen)
    )
    return _sentence(seen.awaited, clause)


def name_missing(awaited: Awaited, cause: str) -> str:
    """The sentence where nothing can be seen, and why not."""
    return _sentence(awaited, f"{_share(awaited)} missing; {cause}")


def name_redis(seconds: float, *, reason: str) -> str:
    """What is said of a Redis that does not answer."""
    return " ".join(f"Redis has not answered for {seconds:.0f} s ({reason})".split())


def _of_the_learner(seen: Situation) -> str:
    """Groups are there and the learner does not take them, or leaves no room for others."""
    if seen.num_scored and seen.learner_does:
        return _some(seen, seen.num_scored, f"in `scored`; the learner {seen.learner_does}")
    if seen.scored_is_full and not seen.num_scored:
        return (
            f"{_share(seen.awaited)} missing; `scored` is full of groups that the learner has"
            " taken, and only a checkpoint makes room"
        )
    return ""


def _of_nobody_there(seen: Situation) -> str:
    """Groups at a station of which no process holds a lease."""
    deserted = [
        station
        for station in (seen.rollouts, seen.prompts)
        if station.num_groups and not station.leases
    ]
    if not deserted:
        return ""
    worst = max(deserted, key=lambda station: station.num_groups)
    where = f"in `{worst.stream}`; no {worst.kind} holds a lease"
    return _some(seen, worst.num_groups, where)


def _of_nobody_serving(seen: Situation) -> str:
    """Prompts that no replica may take, since the learner has confirmed no weights of any."""
    leases = seen.prompts.leases
    may_not = not any(seen.versions.get(name) is not None for name in leases)
    if not (seen.prompts.waiting and may_not) or seen.prompts.holders:
        return ""
    who = f"{_names(leases)} {'is' if len(leases) == 1 else 'are'} stale"
    return _some(seen, seen.prompts.waiting, f"in `prompts`; no replica serves, {who}")


def _of_a_holder(seen: Situation) -> str:
    """Whoever has had a group longest, if that is about as long as the learner has waited."""
    held = [
        (holder, station) for station in (seen.rollouts, seen.prompts) for holder in station.holders
    ]
    if not held:
        return ""
    holder, station = max(held, key=lambda each: each[0].oldest_seconds)
    is_queued = bool(seen.prompts.waiting or seen.rollouts.waiting)
    if is_queued and 2 * holder.oldest_seconds < seen.waited_seconds:
        return ""
    where = f"at {holder.consumer} for {holder.oldest_seconds:.0f} s{_state(seen, holder, station)}"
    return _some(seen, holder.num_entries, where, is_waiting=False)


def _of_a_queue(seen: Situation) -> str:
    """The longer queue, and who takes from it too slowly or not at all."""
    station = max((seen.rollouts, seen.prompts), key=lambda each: each.waiting)
    if not station.waiting:
        return ""
    busy = [holder.consumer for holder in station.holders]
    who, does = (busy, "busy") if busy else (station.leases, "there and takes none")
    if not busy and len(station.leases) > 1:
        does = "there and take none"
    where = f"in `{station.stream}`; {_names(who)} {'is' if len(who) == 1 else 'are'} {does}"
    return _some(seen, station.waiting, where)


def _of_nothing_left(seen: Situation) -> str:
    if seen.num_scored:
        return _some(seen, seen.num_scored, "in `scored` for the learner")
    if seen.num_dead:
        return (
            f"{_share(seen.awaited)} in no stream, and {seen.num_dead} in `dead_letter`:"
            " `isentrope dead-letters` shows why"
        )
    return (
        f"{_share(seen.awaited)} in no stream: Redis lost them, and the learner issues them again"
    )


def _state(seen: Situation, holder: Holder, station: Station) -> str:
    """What is wrong with a holder, if anything is known to be."""
    if holder.consumer not in station.leases:
        return ", which holds no lease"
    if station.stream != PROMPTS:
        return ""
    if holder.consumer not in seen.versions:
        return ", which the learner does not reach"
    version = seen.versions[holder.consumer]
    if version is None:
        return ", which is stale"
    is_behind = version < seen.policy_version
    return f", which serves version {version} of {seen.policy_version}" if is_behind else ""


def _some(seen: Situation, count: int, where: str, *, is_waiting: bool = True) -> str:
    """`3 of 8 groups wait in ...` if these are all that are missing; else both numbers."""
    one, many = ("waits", "wait") if is_waiting else ("is", "are")
    verb = one if count == 1 else many
    if count == seen.awaited.num_missing:
        return f"{count} of {seen.awaited.num_wanted} groups {verb} {where}"
    return f"{_share(seen.awaited)} missing; {count} {verb} {where}"


def _share(awaited: Awaited) -> str:
    verb = "is" if awaited.num_missing == 1 else "are"
    return f"{awaited.num_missing} of {awaited.num_wanted} groups {verb}"


def _names(names: Collection[str]) -> str:
    """`a`, `a and b`, `a, b, c and 5 more`."""
    shown = sorted(names)[:_SHOWN_NAMES]
    more = len(names) - len(shown)
    last = f"{more} more" if more else shown.pop()
    return f"{', '.join(shown)} and {last}" if shown else last


def _sentence(awaited: Awaited, clause: str) -> str:
    """In one line, whatever a consumer is called or an error says."""
    return " ".join(f"{awaited.activity}: {clause}".split())
