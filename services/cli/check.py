"""`isentrope check`: what a run file comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.cli.launch import check_ports
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.tasks import BUILT_IN_TASKS


def check_task(config: RunConfig) -> None:
    """Refuse a task that is neither built in nor spelled as a plug-in.

    Raises:
        ConfigError: names the known ones.
    """
    name = config.task.name
    if name not in BUILT_IN_TASKS and ":" not in name:
        known = ", ".join([*BUILT_IN_TASKS, "or package.module:Class"])
        raise ConfigError(f"task.name = {name!r}: no such task; known: {known}")


def notice_lines(notices: Sequence[str]) -> list[str]:
    """What a person should be told about the run file, as lines that stand out."""
    return [f"notice: {notice}" for notice in notices]


def describe(config: RunConfig) -> list[str]:
    """The main choices, one a line, for a file that passed.

    Raises:
        ConfigError: ports that clash on one machine, or an unknown task.
    """
    check_ports(config)
    check_task(config)
    facts = [
        ("run", f"{config.run.name}, {config.run.num_steps} steps, seed {config.run.seed}"),
        ("model", _model(config)),
        ("task", config.task.name),
        ("learning", _learning(config)),
        ("entropy", _entropy(config)),
        ("rollouts", _rollouts(config)),
        ("learner", _learner(config)),
        ("weights", _weights(config)),
        ("evaluation", _evaluation(config)),
        ("redis", config.redis.url or "REDIS_URL, else a server of its own"),
    ]
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" for name, text in facts]


def _model(config: RunConfig) -> str:
    origin = "" if config.model.path else " (small warm-up model, trained first)"
    return f"{config.model_path}{origin}, {config.model.dtype}, {config.model.max_length} tokens"


def _learning(config: RunConfig) -> str:
    loss, advantage, off_policy = config.policy_loss, config.advantage, config.off_policy
    clip = f"clip {1 - loss.clip_ratio_low:g} to {1 + loss.clip_ratio_high:g}"
    details = {
        "vanilla": clip,
        "clip_cov": f"share {loss.clip_cov_ratio:g} in ({loss.clip_cov_lb:g},"
        f" {loss.clip_cov_ub:g})",
        "kl_cov": f"share {loss.kl_cov_ratio:g}, coefficient {loss.ppo_kl_coef:g}",
        "gspo": clip,
        "cispo": clip,
        "unclipped": "no clip",
    }
    parts = [
        advantage.estimator,
        f"{loss.loss_mode} ({details[loss.loss_mode]})",
        loss.loss_agg_mode,
        f"off-policy {off_policy.method}",
    ]
    if off_policy.proximal != "exact":
        parts.append(f"proximal {off_policy.proximal}")
    return ", ".join([*parts, *_additions(config)])


def _additions(config: RunConfig) -> Iterator[str]:
    """What is off unless the run file asks for it."""
    loss, advantage, reference = config.policy_loss, config.advantage, config.reference_kl
    if advantage.dynamic_sampling:
        yield "dynamic sampling"
    if advantage.overlong_buffer_len > 0:
        yield f"overlong buffer {advantage.overlong_buffer_len} tokens"
    if advantage.ppl_alpha > 0:
        yield f"perplexity shaping {advantage.ppl_alpha:g}"
    if advantage.position_gamma > 0:
        yield f"position shaping {advantage.position_gamma:g}"
    if loss.top_entropy_quantile < 1:
        yield f"top {loss.top_entropy_quantile:g} of tokens by entropy"
    if loss.entropy_ratio_clip_low is not None and loss.entropy_ratio_clip_high is not None:
        low, high = 1 - loss.entropy_ratio_clip_low, 1 + loss.entropy_ratio_clip_high
        yield f"entropy ratio {low:g} to {high:g}"
    if reference.coef > 0:
        yield f"reference KL {reference.coef:g} ({reference.estimator})"


def _entropy(config: RunConfig) -> str:
    entropy, band = config.entropy, config.adaptive_entropy
    target, held = config.target_entropy, config.pi_entropy
    match entropy.method:
        case "none":
            return "no entropy term"
        case "bonus":
            return f"bonus, coefficient {_schedule(config)}"
        case "aent":
            return (
                f"aent, clamped entropy kept in {band.entropy_low:g} to {band.entropy_high:g}"
                f" nats, coefficient {band.clip_low:g} to {band.clip_high:g}"
            )
        case "target":
            return (
                f"target {target.target:g} nats, coefficient {target.coeff_min:g} to"
                f" {target.coeff_max:g} in steps of {target.delta:g}"
            )
        case "pi":
            return (
                f"pi, entropy held at {held.target:g} nats, gains {held.proportional:g} and"
                f" {held.integral:g}"
            )


def _schedule(config: RunConfig) -> str:
    entropy = config.entropy
    if entropy.schedule == "constant":
        return f"{entropy.entropy_coeff:g}"
    steps = entropy.schedule_steps or config.run.num_steps
    return (
        f"{entropy.entropy_coeff:g} to {entropy.entropy_coeff_end:g}, {entropy.schedule} over"
        f" {steps} steps"
    )


def _rollouts(config: RunConfig) -> str:
    rollout = config.rollout
    return (
        f"{rollout.num_replicas} replicas, groups of {rollout.group_size}, at most"
        f" {rollout.max_completion_tokens} tokens, temperature {rollout.temperature:g};"
        f" {config.verifier.num_replicas} verifiers"
    )


def _learner(config: RunConfig) -> str:
    learner = config.learner
    return (
        f"{learner.num_ranks} ranks, {learner.groups_per_batch} groups a batch in"
        f" {learner.optimizer_steps_per_batch} optimiser steps, staleness at most"
        f" {learner.max_staleness}, checkpoint every {config.checkpoint.every_steps} steps"
    )


def _weights(config: RunConfig) -> str:
    origin = f"for {config.model.dtype}" if config.weights.canary_tolerance is None else "as set"
    return (
        f"backend {config.weights.backend}, a replica's canary within"
        f" {config.canary_tolerance:g} nats ({origin})"
    )


def _evaluation(config: RunConfig) -> str:
    evaluation = config.evaluation
    if evaluation.every_steps == 0:
        return "off"
    return (
        f"{evaluation.num_problems} problems x {evaluation.group_size} every"
        f" {evaluation.every_steps} steps"
    )
