"""The simulated run, where its result can be worked out by hand, and what must hold of any."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest

from services.cli.plan.candidates import (
    Candidate,
    Effort,
    Gpus,
    candidate,
    recommended,
    replicas_around_balance,
)
from services.cli.plan.rates import Decode, Lengths, Publishing, Rates, Shape
from services.cli.plan.replica import Group, SimulatedReplica
from services.cli.plan.simulation import Outcome, Simulation

TOKEN_SECONDS = 0.01
LENGTH = 100
SAMPLE_SECONDS = LENGTH * TOKEN_SECONDS
GROUPS, SIZE = 4, 2
BATCH_TOKENS = GROUPS * SIZE * LENGTH

ALIKE = Lengths(mean=LENGTH, sigma=0.0, maximum=1000)
UNLIKE = Lengths(mean=LENGTH, sigma=0.8, maximum=1000)


def rates(
    train_seconds: float, *, lengths: Lengths = ALIKE, publish: Publishing | None = None
) -> Rates:
    """Engines as slow for many sequences as for one, and a batch that trains for so long."""
    return Rates(
        lengths=lengths,
        decode=Decode(fixed_seconds=TOKEN_SECONDS),
        train_seconds_per_token=(train_seconds / BATCH_TOKENS,),
        publishing=(publish or Publishing(0.0, 0.0),),
    )


def shape(
    num_replicas: int = 1, *, max_staleness: int = 1, max_concurrent_groups: int = 4
) -> Shape:
    return Shape(
        num_replicas=num_replicas,
        max_staleness=max_staleness,
        groups_per_batch=GROUPS,
        group_size=SIZE,
        max_concurrent_groups=max_concurrent_groups,
    )


def simulate(rates: Rates, shape: Shape, *, seed: int = 1, num_steps: int = 40) -> Outcome:
    return Simulation(rates, shape, seed=seed).run(num_steps=num_steps, skipped_steps=5)


@pytest.mark.parametrize("train_seconds", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("places", [1, 2, 4])
def test_a_step_takes_as_long_as_the_slower_of_sampling_and_training(
    train_seconds: float, places: int
) -> None:
    outcome = simulate(rates(train_seconds), shape(max_concurrent_groups=places, max_staleness=2))
    sampling_seconds = GROUPS / places * SAMPLE_SECONDS
    expected = max(train_seconds, sampling_seconds)
    assert outcome.seconds / outcome.num_steps == pytest.approx(expected, rel=0.03)
    assert outcome.learner_idle == pytest.approx(1 - train_seconds / expected, abs=0.03)
    assert outcome.num_dropped == 0


def test_with_max_staleness_0_each_waits_while_the_other_works() -> None:
    publish = Publishing(0.5, 0.2)
    outcome = simulate(rates(2.0, publish=publish), shape(max_staleness=0))
    seconds = SAMPLE_SECONDS + 2.0 + publish.seconds
    assert outcome.seconds / outcome.num_steps == pytest.approx(seconds)
    assert outcome.learner_idle == pytest.approx(SAMPLE_SECONDS / seconds)
    assert outcome.replica_idle == pytest.approx(1 - SAMPLE_SECONDS / seconds)
    assert outcome.staleness == {0: 40 * GROUPS}


def test_a_publication_stops_engines_for_its_pause_and_the_learner_for_all_of_it() -> None:
    bound_by_replicas = simulate(rates(0.1, publish=Publishing(0.3, 0.25)), shape(max_staleness=2))
    assert bound_by_replicas.seconds / 40 == pytest.approx(SAMPLE_SECONDS + 0.25, rel=0.03)
    bound_by_learner = simulate(rates(2.0, publish=Publishing(0.3, 0.25)), shape(max_staleness=2))
    assert bound_by_learner.seconds / 40 == pytest.approx(2.0 + 0.3, rel=0.03)


def test_a_verifier_that_is_slower_than_all_else_sets_the_pace() -> None:
    slow = replace(rates(0.1), verify_seconds=1.0)
    outcome = simulate(slow, replace(shape(4, max_staleness=2), num_verifiers=2))
    assert outcome.seconds / 40 == pytest.approx(GROUPS * 1.0 / 2, rel=0.03)
    assert outcome.verifier_busy == pytest.approx(1.0, abs=0.03)


def test_a_checkpoint_is_written_beside_the_steps_and_the_next_one_waits_for_its_end() -> None:
    usual = replace(shape(max_staleness=0), checkpoint_every=10)
    between, copied = 10 * (SAMPLE_SECONDS + 1.0), replace(rates(1.0), checkpoint_seconds=0.5)
    fast = simulate(replace(copied, checkpoint_write_seconds=between - 0.1), usual)
    assert fast.seconds == pytest.approx(4 * (between + 0.5))
    slow = simulate(replace(copied, checkpoint_write_seconds=between + 2.0), usual)
    assert slow.seconds == pytest.approx(4 * (between + 0.5) + 3 * 2.0)


def test_checkpoints_and_evaluations_take_their_time() -> None:
    usual = replace(shape(max_staleness=0), checkpoint_every=10)
    with_pause = simulate(replace(rates(1.0), checkpoint_seconds=5.0), usual)
    assert with_pause.seconds == pytest.approx(40 * (SAMPLE_SECONDS + 1.0) + 4 * 5.0)
    evaluated = replace(
        shape(max_staleness=0),
        evaluation_every=10,
        evaluation_problems=8,
        evaluation_group_size=SIZE,
    )
    outcome = simulate(rates(1.0), evaluated)
    # Two rounds of 4 places before the prompts of the next batch get theirs.
    assert outcome.seconds == pytest.approx(40 * (SAMPLE_SECONDS + 1.0) + 4 * 2 * SAMPLE_SECONDS)
    assert outcome.num_trained == 45 * GROUPS


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("num_replicas", [1, 3, 9])
def test_nothing_trained_is_staler_than_the_bound_and_every_group_ends_once(
    max_staleness: int, num_replicas: int
) -> None:
    made = replace(rates(0.5, lengths=UNLIKE), replaced_share=0.2)
    outcome = simulate(made, shape(num_replicas, max_staleness=max_staleness))
    assert max(outcome.staleness) <= max_staleness
    assert outcome.num_issued == (
        outcome.num_trained + outcome.num_replaced + outcome.num_outstanding
    )
    assert outcome.num_outstanding <= (max_staleness + 1) * GROUPS
    assert outcome.num_trained == 45 * GROUPS
    assert outcome.num_replaced > 0


def test_groups_that_others_overtake_are_sampled_again_when_they_became_too_stale() -> None:
    outcome = simulate(rates(0.05, lengths=UNLIKE), shape(8, max_staleness=1))
    assert outcome.num_dropped > 0
    assert max(outcome.staleness) == 1


def test_more_replicas_are_never_slower() -> None:
    speeds = [
        statistics.fmean(
            simulate(rates(0.3, lengths=UNLIKE), shape(number), seed=seed).steps_per_hour
            for seed in range(4)
        )
        for number in (1, 2, 4, 8)
    ]
    assert all(after > 0.99 * before for before, after in itertools.pairwise(speeds))
    assert speeds[-1] > 1.2 * speeds[0]


def test_the_same_seed_gives_the_same_run_and_another_gives_another() -> None:
    made = rates(1.0, lengths=UNLIKE)
    assert simulate(made, shape(2)) == simulate(made, shape(2))
    assert simulate(made, shape(2)) != simulate(made, shape(2), seed=2)


def test_an_engine_slows_down_with_its_sequences_and_speeds_up_when_one_ends() -> None:
    decode = Decode(sequence_seconds=0.01)
    replica = SimulatedReplica(decode, prompt_tokens=0.0, prompt_seconds=0.0, max_groups=2)
    group = Group(0, (100, 200))
    replica.begin(group, 5.0, version=3)
    # 100 tokens of both at 20 ms, then 100 of one at 10 ms.
    assert replica.next_end() == pytest.approx(5.0 + 2.0)
    assert replica.end_next(7.0) is None
    assert replica.next_end() == pytest.approx(5.0 + 2.0 + 1.0)
    replica.pause(7.5, 4.0)
    assert replica.next_end() == pytest.approx(12.0)
    assert replica.end_next(12.0) is group
    assert (group.version, replica.num_free) == (3, 2)
    assert replica.busy_seconds == pytest.approx(7.0)


def test_reading_the_context_costs_what_is_held_in_the_middle_of_the_way() -> None:
    decode = Decode(memory_seconds=0.1, context_seconds=0.001)
    replica = SimulatedReplica(decode, prompt_tokens=50.0, prompt_seconds=2.0, max_groups=1)
    replica.begin(Group(0, (100,)), 0.0, version=0)
    # Every token i reads 50 + i tokens: 100 x 0.1 s + (100 x 50 + 100 x 100 / 2) x 1 ms.
    assert replica.next_end() == pytest.approx(2.0 + 10.0 + 10.0)
    for _ in range(3):
        began = replica.next_end()
        assert began is not None
        replica.end_next(began)
        replica.begin(Group(0, (100,)), began, version=0)
        assert replica.next_end() == pytest.approx(began + 2.0 + 10.0 + 10.0)


def compared(made: Rates, some: Shape) -> Candidate:
    return candidate(made, some, Gpus(2, 1), Effort(num_steps=20, num_seeds=2))


def test_what_a_fleet_waits_for_is_named() -> None:
    made = rates(2.0)
    assert compared(made, shape(4, max_staleness=2)).bound_by == "learner"
    assert compared(made, shape(1, max_concurrent_groups=1)).bound_by == "replicas"
    assert compared(made, shape(8, max_staleness=0)).bound_by == "max_staleness"
    slow = replace(made, verify_seconds=9.0)
    assert compared(slow, shape(4)).bound_by == "verifiers"


def test_the_fleet_whose_steps_cost_least_is_recommended() -> None:
    # A place each: one replica samples a batch in 4 s, the learner trains it in 2 s.
    made = rates(2.0)
    found = [
        compared(made, shape(number, max_staleness=2, max_concurrent_groups=1))
        for number in (1, 2, 3, 4)
    ]
    assert recommended(found).num_replicas == 2
    assert 2 in replicas_around_balance(made, shape(max_concurrent_groups=1))


def test_the_95th_percentile_of_the_staleness_is_the_least_that_covers_95_of_100() -> None:
    made = compared(rates(1.0), shape())
    some = replace(made, staleness={0: 0.5, 1: 0.45, 3: 0.05})
    assert some.staleness_mean == pytest.approx(0.6)
    assert some.staleness_p95 == 1
    assert replace(made, staleness={0: 0.5, 1: 0.44, 3: 0.06}).staleness_p95 == 3
