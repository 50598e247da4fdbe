"""`isentrope check`: what a run file comes to."""

from __future__ import annotations

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
        ("evaluation", _evaluation(config)),
        ("redis", config.redis.url or "REDIS_URL, else a server of its own"),
    ]
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" for name, text in facts]


def _model(config: RunConfig) -> str:
    origin = "" if config.model.path else " (small warm-up model, trained first)"
    return f"{config.model_path}{origin}, {config.model.dtype}, {config.model.max_length} tokens"


def _learning(config: RunConfig) -> str:
    loss = config.policy_loss
    details = {
        "vanilla": f"clip {1 - loss.clip_ratio_low:g} to {1 + loss.clip_ratio_high:g}",
        "clip_cov": f"share {loss.clip_cov_ratio:g} in ({loss.clip_cov_lb:g},"
        f" {loss.clip_cov_ub:g})",
        "kl_cov": f"share {loss.kl_cov_ratio:g}, coefficient {loss.ppo_kl_coef:g}",
    }
    advantage, off_policy = config.advantage.estimator, config.off_policy.method
    return (
        f"{advantage}, {loss.loss_mode} ({details[loss.loss_mode]}), {loss.loss_agg_mode},"
        f" off-policy {off_policy}"
    )


def _entropy(config: RunConfig) -> str:
    entropy, band = config.entropy, config.adaptive_entropy
    match entropy.method:
        case "none":
            return "no entropy term"
        case "bonus":
            return f"bonus, coefficient {entropy.entropy_coeff:g}"
        case "aent":
            return (
                f"aent, clamped entropy kept in {band.entropy_low:g} to {band.entropy_high:g}"
                f" nats, coefficient {band.clip_low:g} to {band.clip_high:g}"
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


def _evaluation(config: RunConfig) -> str:
    evaluation = config.evaluation
    if evaluation.every_steps == 0:
        return "off"
    return (
        f"{evaluation.num_problems} problems x {evaluation.group_size} every"
        f" {evaluation.every_steps} steps"
    )
