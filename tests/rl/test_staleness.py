from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rl.staleness import admissible, staleness


class Run:
    """Issue, complete, train, publish: the life of groups, in whatever order a test asks."""

    def __init__(self, max_staleness: int, groups_per_batch: int) -> None:
        self.max_staleness = max_staleness
        self.groups_per_batch = groups_per_batch
        self.version = 0
        self.in_flight: list[list[int]] = []  # a group: the versions that sampled it
        self.scored: deque[list[int]] = deque()
        self.num_unpublished = 0
        self.num_dropped = 0
        self.trained_staleness: list[int] = []

    @property
    def num_outstanding(self) -> int:
        return len(self.in_flight) + len(self.scored) + self.num_unpublished

    def issue(self, wanted: int) -> None:
        allowed = admissible(
            self.num_outstanding,
            max_staleness=self.max_staleness,
            groups_per_batch=self.groups_per_batch,
        )
        self.in_flight += [[self.version] for _ in range(min(wanted, allowed))]
        limit = (self.max_staleness + 1) * self.groups_per_batch
        assert self.num_outstanding <= limit

    def complete(self, choice: int) -> None:
        if self.in_flight:
            group = self.in_flight.pop(choice % len(self.in_flight))
            group.append(self.version)  # its last tokens come from the newest weights
            self.scored.append(group)

    def train(self) -> None:
        """Take a batch if there is one; what is too old is dropped, and trained never."""
        if self.num_unpublished:
            return
        fresh = [g for g in self.scored if staleness(self.version, g) <= self.max_staleness]
        self.num_dropped += len(self.scored) - len(fresh)
        self.scored = deque(fresh)
        if len(fresh) >= self.groups_per_batch:
            for _ in range(self.groups_per_batch):
                group = self.scored.popleft()
                self.trained_staleness.append(staleness(self.version, group))
            self.num_unpublished = self.groups_per_batch

    def publish(self) -> None:
        if self.num_unpublished:
            self.num_unpublished = 0
            self.version += 1


settings_of_a_run = (st.integers(0, 4), st.integers(1, 5))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("issue"), st.integers(1, 30)),
        st.tuples(st.just("complete"), st.integers(0, 100)),
        st.tuples(st.just("train"), st.just(0)),
        st.tuples(st.just("publish"), st.just(0)),
    ),
    max_size=200,
)


@given(*settings_of_a_run, actions)
@settings(max_examples=150)
def test_nothing_over_the_bound_is_trained_whatever_the_completion_order(
    max_staleness: int, groups_per_batch: int, steps: list[tuple[str, int]]
) -> None:
    run = Run(max_staleness, groups_per_batch)
    for action, number in steps:
        if action in ("issue", "complete"):
            getattr(run, action)(number)
        else:
            getattr(run, action)()
    assert all(age <= max_staleness for age in run.trained_staleness)


@given(*settings_of_a_run, actions)
@settings(max_examples=150)
def test_first_in_first_out_nothing_grows_too_stale_and_nothing_is_dropped(
    max_staleness: int, groups_per_batch: int, steps: list[tuple[str, int]]
) -> None:
    run = Run(max_staleness, groups_per_batch)
    for action, number in steps:
        if action == "issue":
            run.issue(number)
        elif action == "complete":
            run.complete(0)
        else:
            getattr(run, action)()
    assert run.num_dropped == 0
    assert all(age <= max_staleness for age in run.trained_staleness)


@given(*settings_of_a_run, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_a_run_that_issues_all_it_may_never_starves(
    max_staleness: int, groups_per_batch: int, random: Random
) -> None:
    run = Run(max_staleness, groups_per_batch)
    for _ in range(400):
        run.issue(10**6)
        run.complete(random.randrange(1000))
        run.train()
        run.publish()
        if run.version == 5:
            break
    assert run.version == 5


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_the_bound_is_tight(max_staleness: int) -> None:
    # All that may be issued at version 0 is issued; the last of it is exactly at the bound.
    run = Run(max_staleness, 2)
    run.issue(10**6)
    assert len(run.in_flight) == 2 * (max_staleness + 1)
    while run.in_flight:
        run.complete(0)
    for _ in range(max_staleness + 1):
        run.train()
        run.publish()
    assert max(run.trained_staleness) == max_staleness
    assert run.num_dropped == 0


@given(st.integers(0, 50), *settings_of_a_run)
@settings(max_examples=50)
def test_admission_fills_up_to_the_limit_and_never_over_it(
    num_outstanding: int, max_staleness: int, groups_per_batch: int
) -> None:
    more = admissible(
        num_outstanding, max_staleness=max_staleness, groups_per_batch=groups_per_batch
    )
    limit = (max_staleness + 1) * groups_per_batch
    assert num_outstanding + more == max(num_outstanding, limit)


@pytest.mark.parametrize(
    ("learner_version", "token_versions", "expected"),
    [(5, [5, 5], 0), (5, [3, 4, 5], 2), (5, [7], 2), (5, [4, 8], 3), (0, [0], 0)],
)
def test_the_farthest_token_decides_on_either_side(
    learner_version: int, token_versions: list[int], expected: int
) -> None:
    assert staleness(learner_version, token_versions) == expected
    assert staleness(learner_version, reversed(token_versions)) == expected


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled token"):
        staleness(3, [])
    for num_outstanding, max_staleness, groups_per_batch in ((-1, 0, 1), (0, -1, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="need"):
            admissible(
                num_outstanding, max_staleness=max_staleness, groups_per_batch=groups_per_batch
            )
