"""Which places of the prompt order were issued and how each ended: exactly once, across crashes.

A *position* is a place of the endless prompt order (`shared.prompt_order`). It is outstanding from
its first issue until it was trained, abandoned or skipped; re-issues raise its attempt. The state
is small: everything below `frontier` is done, and the few positions above it are listed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from shared.prompt_order import problem_at
from shared.records import GroupUid


def _nothing_untold() -> dict[str, list[list[int]]]:
    return {"skipped": [], "abandoned": []}


@dataclass(slots=True)
class Ledger:
    """The bookkeeping of one run; a checkpoint holds `state_dict()`.

    Attributes:
        frontier: every position below it is done.
        done: finished positions at or above the frontier.
        outstanding: issued, not done; position to the attempt that counts.
        failures: how often an outstanding position's group came to nothing by itself: no verdict,
            or a dead letter; not that it was lost or became stale.
        abandoned: positions given up, all of them done.
        num_skipped: positions done whose group taught nothing and was replaced by another.
        num_replaced: those of them since a group was last trained on: for the batch under way.
        untold: uids that were skipped or abandoned and are in no `account` yet, by how they ended.
    """

    run_id: str
    num_problems: int
    seed: int
    cursor: int = 0
    frontier: int = 0
    done: set[int] = field(default_factory=set)
    outstanding: dict[int, int] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    num_skipped: int = 0
    num_replaced: int = 0
    untold: dict[str, list[list[int]]] = field(default_factory=_nothing_untold)

    @property
    def num_outstanding(self) -> int:
        """Positions issued and not done."""
        return len(self.outstanding)

    @property
    def num_trained(self) -> int:
        """Positions trained on."""
        return self.frontier + len(self.done) - len(self.abandoned) - self.num_skipped

    def issue_next(self) -> GroupUid:
        """The next position of the order that is neither outstanding nor done."""
        while self.cursor in self.outstanding or self.is_done(self.cursor):
            self.cursor += 1
        self.outstanding[self.cursor] = 0
        self.cursor += 1
        return self._uid(self.cursor - 1)

    def reissue(self, position: int) -> GroupUid:
        """Another attempt at an outstanding position."""
        self.outstanding[position] += 1
        return self._uid(position)

    def attempt(self, position: int) -> int:
        """How often an outstanding position was issued again."""
        return self.outstanding[position]

    def fail(self, position: int) -> int:
        """An outstanding position's newest attempt came to nothing; how many have by now."""
        self.failures[position] = self.failures.get(position, 0) + 1
        return self.failures[position]

    def adopt(self, uids: Iterable[GroupUid]) -> None:
        """Count groups that the streams hold as issued: after a crash they are ahead of us."""
        for uid in uids:
            position = self.position(uid)
            if uid.index < self.num_problems and not self.is_done(position):
                attempt = max(uid.attempt, self.outstanding.get(position, 0))
                self.outstanding[position] = attempt

    def missing(self, held: Collection[int]) -> list[int]:
        """Outstanding positions that are not among those the streams hold, in order."""
        return sorted(set(self.outstanding) - set(held))

    def finish(self, position: int) -> None:
        """An outstanding position was trained on."""
        self._close(position)
        self.num_replaced = 0

    def abandon(self, position: int) -> None:
        """An outstanding position will never be trained on."""
        self._tell("abandoned", position)
        self._close(position)
        self.abandoned.add(position)

    def skip(self, position: int) -> None:
        """An outstanding position is not trained on: another one replaces it."""
        self._tell("skipped", position)
        self._close(position)
        self.num_skipped += 1
        self.num_replaced += 1

    def account(self) -> dict[str, Any]:
        """What a row of ledger.jsonl says besides what was trained; each ending is in one row."""
        told, self.untold = self.untold, _nothing_untold()
        return {
            **told,
            "outstanding": sorted(self.outstanding),
            "frontier": self.frontier,
            "num_problems": self.num_problems,
        }

    def is_done(self, position: int) -> bool:
        """Trained on, abandoned or skipped."""
        return position < self.frontier or position in self.done

    def is_wanted(self, uid: GroupUid) -> bool:
        """True for the first arrival of an outstanding position, whichever attempt it is."""
        return uid.run_id == self.run_id and self.position(uid) in self.outstanding

    def position(self, uid: GroupUid) -> int:
        """The place of `uid` in the prompt order."""
        return uid.epoch * self.num_problems + uid.index

    def problem_index(self, uid: GroupUid) -> int:
        """The problem at that place, in the task's training split."""
        return problem_at(uid.epoch, uid.index, num_problems=self.num_problems, seed=self.seed)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {
            "run_id": self.run_id,
            "num_problems": self.num_problems,
            "seed": self.seed,
            "cursor": self.cursor,
            "frontier": self.frontier,
            "done": sorted(self.done),
            "outstanding": sorted(self.outstanding.items()),
            "failures": sorted(self.failures.items()),
            "abandoned": sorted(self.abandoned),
            "num_skipped": self.num_skipped,
            "num_replaced": self.num_replaced,
            "untold": {ending: list(uids) for ending, uids in self.untold.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state.

        Raises:
            ValueError: the state is of another run, task or seed.
        """
        for name in ("run_id", "num_problems", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the ledger has {name} = {state[name]!r}, this run {getattr(self, name)!r}"
                )
        self.cursor, self.frontier = state["cursor"], state["frontier"]
        self.done, self.abandoned = set(state["done"]), set(state["abandoned"])
        self.outstanding = dict(state["outstanding"])
        # A checkpoint from before there was dynamic sampling, or an account, has none of these.
        self.num_skipped = state.get("num_skipped", 0)
        self.num_replaced = state.get("num_replaced", 0)
        self.failures = dict(state.get("failures", ()))
        self.untold = state.get("untold", _nothing_untold())

    def _tell(self, ending: str, position: int) -> None:
        uid = self._uid(position)
        self.untold[ending].append([uid.epoch, uid.index, uid.attempt])

    def _close(self, position: int) -> None:
        del self.outstanding[position]
        self.failures.pop(position, None)
        self.done.add(position)
        while self.frontier in self.done:
            self.done.remove(self.frontier)
            self.frontier += 1

    def _uid(self, position: int) -> GroupUid:
        epoch, index = divmod(position, self.num_problems)
        return GroupUid(self.run_id, epoch, index, self.outstanding[position])
