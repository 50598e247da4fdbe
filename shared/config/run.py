"""The whole run file, and the rules that join its sections."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.config.algorithm import (
    AdaptiveEntropyConfig,
    AdvantageConfig,
    EntropyConfig,
    OffPolicyConfig,
    PolicyLossConfig,
)
from shared.config.section import Count, Index, Section
from shared.config.services import (
    CheckpointConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    NetworkConfig,
    RedisConfig,
    RolloutConfig,
    TaskConfig,
    VerifierConfig,
    WarmupConfig,
    WeightsConfig,
)

LARGE_SELECTION = 0.05


class RunSection(Section):
    """The run itself."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Lower-case letters, digits and dashes; names the run folder and the Redis keys."""

    num_steps: Count
    """Training batches, each one or more optimiser steps and one published version."""

    seed: Index = 1
    """Of the prompt order, the sampling and the token selection."""

    directory: str = "runs"
    """Where run folders are made."""


class RunConfig(Section):
    """A validated run file."""

    run: RunSection
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig | None = None
    task: TaskConfig = TaskConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    entropy: EntropyConfig = EntropyConfig()
    adaptive_entropy: AdaptiveEntropyConfig = AdaptiveEntropyConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    redis: RedisConfig = RedisConfig()
    network: NetworkConfig = NetworkConfig()

    @property
    def model_path(self) -> str:
        """The model's folder or hub name; without one, the folder of this run's warm-up model."""
        if self.model.path is not None:
            return self.model.path
        parts = [self.warmup, self.task, self.model]
        text = json.dumps([part and part.model_dump() for part in parts] + [self.run.seed])
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.run.directory}/warmup-{key}"

    @property
    def max_outstanding(self) -> int:
        """Groups that may be issued and not yet trained."""
        return (self.learner.max_staleness + 1) * self.learner.groups_per_batch

    @property
    def _held_until_checkpoint(self) -> int:
        """Groups on `scored` at most: trained since the last checkpoint, outstanding, evaluated."""
        steps, evaluation = self.checkpoint.every_steps, self.evaluation
        evaluations = 0 if evaluation.every_steps == 0 else steps // evaluation.every_steps + 2
        trained = steps * self.learner.groups_per_batch
        return trained + self.max_outstanding + evaluations * evaluation.num_problems

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for broken, message in self._rules():
            if broken:
                raise ValueError(message)
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """Each impossible combination with `key = value: why; remedy`."""
        loss, entropy, band = self.policy_loss, self.entropy, self.adaptive_entropy
        learner, rollout = self.learner, self.rollout
        return [
            (
                self.model.path is None and self.warmup is None,
                "model.path is not set and there is no [warmup]: name a model folder, or add"
                " [warmup] to train a small one first",
            ),
            (
                rollout.group_size == 1,
                f"rollout.group_size = 1: {self.advantage.estimator} compares completions of one"
                " prompt; use at least 2",
            ),
            (
                rollout.max_completion_tokens >= self.model.max_length,
                f"rollout.max_completion_tokens = {rollout.max_completion_tokens}: leaves no room"
                f" for a prompt in model.max_length = {self.model.max_length}; lower it",
            ),
            (
                learner.groups_per_batch % learner.optimizer_steps_per_batch != 0,
                f"learner.optimizer_steps_per_batch = {learner.optimizer_steps_per_batch}: does"
                f" not divide groups_per_batch = {learner.groups_per_batch}; use a divisor",
            ),
            (
                self.max_outstanding + self.evaluation.num_problems > self.redis.max_prompts,
                f"redis.max_prompts = {self.redis.max_prompts}: needs room for"
                f" {self.max_outstanding} groups ((max_staleness + 1) x groups_per_batch) and"
                f" evaluation.num_problems = {self.evaluation.num_problems}; raise it",
            ),
            (
                self._held_until_checkpoint > self.redis.max_groups,
                f"redis.max_groups = {self.redis.max_groups}: `scored` holds up to"
                f" {self._held_until_checkpoint} groups between checkpoints; raise it, or lower"
                " checkpoint.every_steps",
            ),
            (
                loss.clip_cov_lb >= loss.clip_cov_ub,
                f"policy_loss.clip_cov_lb = {loss.clip_cov_lb}: must be below"
                f" clip_cov_ub = {loss.clip_cov_ub}",
            ),
            (
                loss.loss_mode == "clip_cov"
                and loss.clip_cov_ratio > LARGE_SELECTION
                and not loss.allow_large_ratio,
                f"policy_loss.clip_cov_ratio = {loss.clip_cov_ratio}: a share of tokens, the paper"
                " has 0.0002; set allow_large_ratio = true if you mean it",
            ),
            (
                loss.loss_mode == "kl_cov"
                and loss.kl_cov_ratio > LARGE_SELECTION
                and not loss.allow_large_ratio,
                f"policy_loss.kl_cov_ratio = {loss.kl_cov_ratio}: a share of tokens, the paper"
                " has 0.0002 to 0.002; set allow_large_ratio = true if you mean it",
            ),
            (
                entropy.method == "none" and entropy.entropy_coeff > 0,
                f"entropy.entropy_coeff = {entropy.entropy_coeff}: has no effect with"
                ' method = "none"; set method = "bonus" or "aent"',
            ),
            (
                entropy.method == "bonus" and entropy.entropy_coeff == 0,
                'entropy.method = "bonus": needs entropy_coeff above 0',
            ),
            (
                entropy.method == "aent" and band.entropy_low >= band.entropy_high,
                f"adaptive_entropy.entropy_low = {band.entropy_low}: must be below"
                f" entropy_high = {band.entropy_high}",
            ),
            (
                entropy.method == "aent"
                and not band.clip_low <= entropy.entropy_coeff <= band.clip_high,
                f"entropy.entropy_coeff = {entropy.entropy_coeff}: AEnt starts inside"
                f" [adaptive_entropy.clip_low, clip_high] = [{band.clip_low}, {band.clip_high}]",
            ),
            (
                self.off_policy.lower >= self.off_policy.upper,
                f"off_policy.lower = {self.off_policy.lower}: must be below"
                f" upper = {self.off_policy.upper}",
            ),
        ]
