"""The completions of a group while they are sampled: what is known of each, wherever it came from.

A draft is what an attempt leaves behind: the next one, here or in another replica, asks the engine
only for what is missing. Tokens count once the learner confirmed the weights that sampled them.
Those that came from the store were confirmed where they were sampled; of the others the caller
tells by version.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping

from shared.partials import Piece, append_runs
from shared.records import Completion, PromptGroup, VersionRun


class Draft:
    """One completion, as far as it is.

    Attributes:
        num_saved: tokens at its front that the store holds.
        read: the tokens of the request under way that are not in the draft yet, or None.
    """

    def __init__(self) -> None:
        self.num_saved = 0
        self.read: Callable[[], Completion | None] = _nothing
        self.is_complete = False
        self._is_truncated = False
        self._num_restored = 0
        self._token_ids = array("I")
        self._logprobs = array("f")
        self._runs: list[VersionRun] = []

    def __len__(self) -> int:
        return len(self._token_ids)

    @property
    def token_ids(self) -> array[int]:
        """What was sampled so far; a copy."""
        return self._token_ids[:]

    def restore(self, kept: Completion, *, is_complete: bool) -> None:
        """Begin with what another attempt has saved."""
        self.extend(kept)
        self._num_restored = self.num_saved = len(self)
        self._end(is_complete, kept.is_truncated)

    def extend(self, tokens: Completion) -> None:
        """Put tokens behind those that are there."""
        self._token_ids += tokens.token_ids
        self._logprobs += tokens.behaviour_logprobs
        append_runs(self._runs, tokens.version_runs)

    def catch_up(self) -> None:
        """Take what the request under way has sampled meanwhile."""
        if (tokens := self.read()) is not None:
            self.extend(tokens)

    def complete(self, tokens: Completion, *, start: int) -> None:
        """Take the whole of a request that ended, in place of what was read of it.

        Args:
            start: tokens of the draft when the request was made.
        """
        self.cut(start)
        self.extend(tokens)
        self._end(True, tokens.is_truncated)

    def cut(self, num_tokens: int) -> None:
        """Forget what comes after so many tokens."""
        if num_tokens >= len(self):
            return
        self._runs = list(_runs_between(self._runs, 0, num_tokens))
        del self._token_ids[num_tokens:], self._logprobs[num_tokens:]
        self._num_restored = min(self._num_restored, num_tokens)
        self._end(False, False)

    def versions(self) -> set[int]:
        """Policy versions of the tokens, wherever they were sampled."""
        return {run.policy_version for run in self._runs}

    def versions_sampled_here(self) -> set[int]:
        """Policy versions of the tokens that are not from the store."""
        runs = _runs_between(self._runs, self._num_restored, len(self))
        return {run.policy_version for run in runs}

    def num_confirmed(self, confirmed: Collection[int]) -> int:
        """Tokens before the first that was sampled here by a version not among `confirmed`."""
        count = self._num_restored
        for run in _runs_between(self._runs, self._num_restored, len(self)):
            if run.policy_version not in confirmed:
                break
            count += run.num_tokens
        return count

    def piece(self, start: int, stop: int) -> Completion:
        """The tokens from `start` to before `stop`; at least one."""
        return Completion(
            self._token_ids[start:stop],
            self._logprobs[start:stop],
            tuple(_runs_between(self._runs, start, stop)),
            self._is_truncated and stop == len(self),
        )

    def _end(self, is_complete: bool, is_truncated: bool) -> None:
        self.is_complete = is_complete
        self._is_truncated = is_truncated
        self.read = _nothing


class GroupDraft:
    """The drafts of one group.

    Args:
        stop_token_ids: end a completion; one that ends with them is complete.

    Attributes:
        is_ours: False once the store refused to take more from this replica.
        num_cuts: how often tokens were forgotten; a save that was under way meanwhile is in doubt.
    """

    def __init__(self, group: PromptGroup, *, stop_token_ids: Collection[int]) -> None:
        self.group = group
        self.drafts = tuple(Draft() for _ in range(group.group_size))
        self.is_ours = True
        self.num_cuts = 0
        self._is_in_doubt = False
        self._stop_token_ids = frozenset(stop_token_ids)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return all(draft.is_complete for draft in self.drafts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions so far."""
        return sum(map(len, self.drafts))

    def restore(self, kept: Mapping[int, Completion]) -> None:
        """Begin with what was saved of the completions, by number."""
        for number, completion in kept.items():
            if number < len(self.drafts):
                ends = completion.is_truncated or completion.token_ids[-1] in self._stop_token_ids
                self.drafts[number].restore(completion, is_complete=ends)

    def forget_older(self, is_too_old: Callable[[int], bool]) -> None:
        """Begin each completion again that has a token of such a policy version."""
        self._cut(
            [0 if any(map(is_too_old, each.versions())) else len(each) for each in self.drafts]
        )

    def forget(self) -> None:
        """Begin again with nothing."""
        self._cut([0] * len(self.drafts))

    def catch_up(self) -> bool:
        """Take what the requests under way have sampled meanwhile; whether that was anything."""
        before = self.num_tokens
        for draft in self.drafts:
            draft.catch_up()
        return self.num_tokens > before

    def versions_sampled_here(self) -> set[int]:
        """Policy versions of the tokens that are not from the store."""
        return set().union(*(draft.versions_sampled_here() for draft in self.drafts))

    def cut(self, confirmed: Collection[int]) -> None:
        """Forget each completion from its first token of a version not among `confirmed`."""
        self._cut([draft.num_confirmed(confirmed) for draft in self.drafts])

    def unsaved(self, confirmed: Collection[int]) -> list[Piece]:
        """What may be saved and is not, by completion."""
        found = []
        for number, draft in enumerate(self.drafts):
            start, stop = draft.num_saved, draft.num_confirmed(confirmed)
            if start < stop:
                found.append(Piece(number, start, draft.piece(start, stop)))
        return found

    def num_unsaved(self, confirmed: Collection[int]) -> int:
        """Tokens that may be saved and are not, of the completion that has most of them."""
        return max(draft.num_confirmed(confirmed) - draft.num_saved for draft in self.drafts)

    def is_saved_too_far(self, confirmed: Collection[int]) -> bool:
        """Whether the store may hold tokens that do not count any more."""
        return self._is_in_doubt or any(
            draft.num_saved > draft.num_confirmed(confirmed) for draft in self.drafts
        )

    def mark_saved(self, pieces: Collection[Piece], *, num_cuts: int) -> None:
        """The store took these pieces, made when there had been so many cuts."""
        self._is_in_doubt |= num_cuts != self.num_cuts
        for piece in pieces:
            self.drafts[piece.number].num_saved = piece.start + len(piece.tokens.token_ids)

    def mark_dropped(self) -> None:
        """The store holds nothing of the group."""
        self._is_in_doubt = False
        for draft in self.drafts:
            draft.num_saved = 0

    def completions(self) -> tuple[Completion, ...]:
        """The group's completions; each must be complete."""
        return tuple(draft.piece(0, len(draft)) for draft in self.drafts)

    def _cut(self, lengths: list[int]) -> None:
        before = self.num_tokens
        for draft, length in zip(self.drafts, lengths, strict=True):
            draft.cut(length)
        self.num_cuts += self.num_tokens < before


def _runs_between(runs: list[VersionRun], start: int, stop: int) -> Iterator[VersionRun]:
    """The runs of the tokens from `start` to before `stop`."""
    first = 0
    for run in runs:
        last = first + run.num_tokens
        count = min(last, stop) - max(first, start)
        if count > 0:
            yield VersionRun(run.policy_version, count)
        first = last


def _nothing() -> None:
    """No request is under way."""
    return
