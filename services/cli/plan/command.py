"""`isentrope plan`: how many replicas a learner needs, how stale and how idle it all will be.

Answers come from a simulation of the run, whose rates a real run measured (`--from`) or a model of
the hardware reckons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from services.cli.plan.arguments import MODEL_ONLY, RUN_ONLY
from services.cli.plan.candidates import (
    Candidate,
    Effort,
    Gpus,
    candidates,
    recommended,
    replicas_around_balance,
)
from services.cli.plan.measured import Measured, measured
from services.cli.plan.model import Factors, Hardware, ModelSize, reckon
from services.cli.plan.rates import Lengths, Rates, Shape, lengths_of
from services.cli.plan.text import print_plan
from services.cli.run_folder import existing_run
from shared.config import load_run
from shared.errors import ConfigError

_POSITIVE = (
    "parameters", "learner_gpus", "replica_gpus", "response_mean", "batch_groups", "group_size",
    "max_concurrent_groups", "verifiers", "response_p99", "response_max", "steps", "seeds", "mfu",
    "bandwidth_share", "compute_share", "network_gb_per_second",
)  # fmt: skip
_SHARES = ("mfu", "bandwidth_share", "compute_share", "batch_cost")


@dataclass(frozen=True, slots=True)
class Basis:
    """What the simulation is given, and what a person must know of where it comes from."""

    rates: Rates
    shape: Shape
    gpus: Gpus
    source: str
    notes: tuple[str, ...]


def plan(given: argparse.Namespace) -> int:
    """Simulate the fleets that were asked for, and say which is best value; the exit status.

    Raises:
        ConfigError: an option is wrong, a model does not fit, or a run says too little.
    """
    _check(given)
    basis = _of_run(given) if given.run is not None else _of_model(given)
    found = candidates(
        basis.rates,
        basis.shape,
        basis.gpus,
        Effort(given.steps, given.seeds),
        replicas=given.replicas or replicas_around_balance(basis.rates, basis.shape),
        staleness=given.max_staleness or [basis.shape.max_staleness],
    )
    if given.plot is not None:
        _draw(found, given)
    if given.json:
        print(json.dumps(_as_json(basis, found), indent=1))
    else:
        print_plan(found, recommended(found), source=basis.source, notes=basis.notes)
    return 0


def _draw(found: Sequence[Candidate], given: argparse.Namespace) -> None:
    from services.cli.plan.figure import draw_plan

    try:
        draw_plan(found, given.plot)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {given.plot}: cannot be written ({error}); name a .png, .svg or .pdf file in a"
            " folder that exists"
        ) from None


def _as_json(basis: Basis, found: Sequence[Candidate]) -> dict[str, Any]:
    best = recommended(found)
    return {
        "source": basis.source,
        "notes": basis.notes,
        "rates": asdict(basis.rates),
        "shape": asdict(basis.shape),
        "recommended": {"replicas": best.num_replicas, "max_staleness": best.max_staleness},
        "candidates": [
            {
                **asdict(each),
                "staleness_mean": each.staleness_mean,
                "staleness_p95": each.staleness_p95,
                "gpu_hours_per_step": each.gpu_hours_per_step,
            }
            for each in found
        ],
    }


def _check(given: argparse.Namespace) -> None:
    """Raises ConfigError for an option that cannot be, or that the source of rates has no use for.

    Those of a measured run would be ignored with a model, and the other way round.
    """
    for name in RUN_ONLY if given.run is None else MODEL_ONLY:
        if getattr(given, name) is not None:
            other = "--from" if given.run is None else "--parameters or --model"
            raise ConfigError(f"{_option(name)} goes with {other}; leave it out")
    for name in _POSITIVE:
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{_option(name)} {value}: must be above 0")
    for name in _SHARES:
        value = getattr(given, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{_option(name)} {value}: must be a share, 0 to 1")
    for name, least in (("replicas", 1), ("max_staleness", 0)):
        wrong = [value for value in getattr(given, name) or () if value < least]
        if wrong:
            raise ConfigError(f"{_option(name)} {wrong[0]}: must be at least {least}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reshaped(shape: Shape, given: argparse.Namespace) -> Shape:
    """With what was given on the command line."""
    chosen = {
        "groups_per_batch": given.batch_groups,
        "group_size": given.group_size,
        "max_concurrent_groups": given.max_concurrent_groups,
        "num_verifiers": given.verifiers,
    }
    return replace(shape, **{key: value for key, value in chosen.items() if value is not None})


# --- a run that was made ------------------------------------------------------------------------


def _of_run(given: argparse.Namespace) -> Basis:
    folder = existing_run(given.run)
    config = load_run(folder.run_file)
    run = measured(
        folder,
        batch_cost=given.batch_cost or 0.0,
        response_p99=given.response_p99,
        max_concurrent_groups=given.max_concurrent_groups,
    )
    gpus = Gpus(config.learner.num_ranks, config.rollout.tensor_parallel_size)
    source = f"measured: {run.num_steps} steps of {folder.run_id}"
    return Basis(run.rates, _reshaped(run.shape, given), gpus, source, tuple(_notes_of(run)))


def _notes_of(run: Measured) -> list[str]:
    shape, decode = run.shape, run.rates.decode
    places = shape.max_concurrent_groups * shape.group_size
    token_ms = 1000 * decode.token_seconds(places, 0)
    notes = [
        f"the run had {shape.num_replicas} replicas and took {run.seconds_per_step:.2f} s a step,"
        f" of which the learner waited {run.wait_seconds:.2f} s",
        f"an engine takes {token_ms:.3g} ms for a token of {places} sequences: the speed at which"
        " the simulated run waits as long",
        f"a replica is taken to hold {shape.max_concurrent_groups} groups at a time; where its KV"
        " cache held fewer (isentrope_rollout_concurrency_groups), give --max-concurrent-groups",
        "training, publishing and engines are taken to be as fast with another number of replicas:"
        " not so where they share cores",
    ]
    if run.is_bound:
        notes.append(
            "the learner hardly waited, so engines may be much faster than that, and fewer replicas"
            " do better than is said here: measure a run with fewer"
        )
    return notes


# --- a model of the hardware --------------------------------------------------------------------


def _of_model(given: argparse.Namespace) -> Basis:
    hardware = Hardware(_needed(given, "gpu"), given.learner_gpus or 8, given.replica_gpus or 1)
    size = (
        ModelSize.of_folder(given.model)
        if given.model is not None
        else ModelSize.of_parameters(given.parameters)
    )
    group_size = given.group_size or 8
    reckoned = reckon(
        size,
        hardware,
        _lengths(given),
        prompt_tokens=512.0 if given.prompt_tokens is None else given.prompt_tokens,
        group_size=group_size,
        verify_seconds=0.05 if given.verify_seconds is None else given.verify_seconds,
        factors=_factors(given),
    )
    usual = Shape(
        num_replicas=1,
        max_staleness=2,
        groups_per_batch=64,
        group_size=group_size,
        max_concurrent_groups=reckoned.concurrent_groups(group_size=group_size, at_most=32),
        num_verifiers=16,
        checkpoint_every=20,
    )
    shape = _reshaped(usual, given)
    source = (
        f"reckoned, not measured: {size.parameters / 1e9:.3g} B parameters, learner of"
        f" {hardware.learner_gpus} {hardware.gpu}, {hardware.replica_gpus} a replica"
    )
    gpus = Gpus(hardware.learner_gpus, hardware.replica_gpus)
    return Basis(reckoned.rates, shape, gpus, source, _notes_of_model(reckoned.rates, shape))


def _notes_of_model(rates: Rates, shape: Shape) -> tuple[str, ...]:
    sequences, mean = shape.max_concurrent_groups * shape.group_size, rates.lengths.mean
    context = sequences * (rates.prompt_tokens + mean / 2)
    token_seconds = rates.decode.token_seconds(sequences, context)
    tokens = shape.groups_per_batch * shape.group_size * mean
    return (
        f"a replica holds {shape.max_concurrent_groups} groups and then samples"
        f" {sequences / token_seconds:,.0f} tokens/s",
        f"the learner trains a batch in {tokens * rates.train_seconds_per_token[0]:.1f} s and"
        f" publishes in {rates.publishing[0].seconds:.1f} s",
        f"a checkpoint stops it for {rates.checkpoint_seconds:.1f} s, and is on the disk"
        f" {rates.checkpoint_write_seconds:.0f} s later",
        "these speeds follow from data sheets and assumed efficiencies (`isentrope plan --help`);"
        " measure a short run and use --from before you buy",
    )


def _lengths(given: argparse.Namespace) -> Lengths:
    mean = _needed(given, "response_mean")
    p99 = given.response_p99 or 4 * mean
    return lengths_of(mean, p99, given.response_max or round(2 * p99))


def _factors(given: argparse.Namespace) -> Factors:
    chosen = {
        "training": given.mfu,
        "bandwidth": given.bandwidth_share,
        "compute": given.compute_share,
        "engine_seconds": given.engine_seconds,
        "network_gb_per_second": given.network_gb_per_second,
    }
    return Factors(**{key: value for key, value in chosen.items() if value is not None})


def _needed(given: argparse.Namespace, name: str) -> Any:
    value = getattr(given, name)
    if value is None:
        raise ConfigError(f"{_option(name)} is needed without a run; or give --from")
    return value
