"""A simulated replica: groups in work, and a clock that counts the tokens of each sequence.

All sequences of an engine advance together, a token each per step of the engine. So a sequence
that begins when the clock stands at k and is n tokens long ends when it stands at k + n, however
fast the clock runs meanwhile; its pace changes when a sequence comes or goes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from services.cli.plan.rates import Decode


@dataclass(slots=True, eq=False)
class Group:
    """One group on its way.

    Attributes:
        position: of the prompt order; the attempts of one position have the same.
        lengths: tokens of each completion.
        version: that its replica sampled from when it began; -1 before.
        num_missing: completions under way.
    """

    position: int
    lengths: tuple[int, ...]
    is_evaluation: bool = False
    version: int = -1
    num_missing: int = 0

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(self.lengths)


class SimulatedReplica:
    """One engine.

    Attributes:
        num_groups: in work.
        busy_seconds: with a sequence in work.
        place_seconds: groups in work, integrated over time.
    """

    def __init__(
        self, decode: Decode, *, prompt_tokens: float, prompt_seconds: float, max_groups: int
    ) -> None:
        self.num_groups = 0
        self.busy_seconds = 0.0
        self.place_seconds = 0.0
        self.max_groups = max_groups
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        self._prompt_seconds = prompt_seconds
        self._sequences: list[tuple[float, int, float, Group]] = []
        self._num_begun = 0
        self._begin_clocks = 0.0
        self._clock = 0.0
        self._now = 0.0
        self._stall_seconds = 0.0
        self._token_seconds = 1.0

    @property
    def num_free(self) -> int:
        """Groups that could begin."""
        return self.max_groups - self.num_groups

    def begin(self, group: Group, now: float, *, version: int) -> None:
        """Sample a group, all of its completions at once."""
        self.advance(now)
        group.version, group.num_missing = version, len(group.lengths)
        self.num_groups += 1
        self._stall_seconds += self._prompt_seconds
        for length in group.lengths:
            self._num_begun += 1
            end = self._clock + length
            heapq.heappush(self._sequences, (end, self._num_begun, self._clock, group))
            self._begin_clocks += self._clock
        self._set_pace()

    def pause(self, now: float, seconds: float) -> None:
        """Stand still from now on, whatever is in work."""
        self.advance(now)
        self._stall_seconds += seconds

    def advance(self, now: float) -> None:
        """Let the clock run to `now`; nothing ends before."""
        elapsed = now - self._now
        self._now = now
        self.place_seconds += elapsed * self.num_groups
        stalled = min(self._stall_seconds, elapsed)
        self._stall_seconds -= stalled
        if self._sequences:
            self.busy_seconds += elapsed
            self._clock += (elapsed - stalled) / self._token_seconds

    def next_end(self) -> float | None:
        """When the next sequence ends, if nothing else happens; None without one."""
        if not self._sequences:
            return None
        tokens = max(0.0, self._sequences[0][0] - self._clock)
        return self._now + self._stall_seconds + tokens * self._token_seconds

    def end_next(self, now: float) -> Group | None:
        """End that sequence now; the group if it was its last."""
        self.advance(now)
        self._clock, _, begin, group = heapq.heappop(self._sequences)
        self._begin_clocks -= begin
        group.num_missing -= 1
        self._set_pace()
        if group.num_missing:
            return None
        self.num_groups -= 1
        return group

    def _set_pace(self) -> None:
        """For the time until the next end, with the context as it is in the middle of it."""
        count = len(self._sequences)
        if not count:
            return
        to_go = max(0.0, self._sequences[0][0] - self._clock)
        sampled = count * (self._clock + to_go / 2) - self._begin_clocks
        context = count * self._prompt_tokens + sampled
        self._token_seconds = self._decode.token_seconds(count, context)
