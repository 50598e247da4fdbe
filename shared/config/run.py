"""The whole run file, and the rules that join its sections."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.config.algorithm import (
    AdaptiveEntropyConfig,
    AdvantageConfig,
    DiagnosticsConfig,
    EntropyConfig,
    LawConfig,
    OffPolicyConfig,
    PiEntropyConfig,
    PolicyLossConfig,
    ReferenceKLConfig,
    TargetEntropyConfig,
)
from shared.config.entropy import SECTION_OF_METHOD
from shared.config.learner import CheckpointConfig, LearnerConfig
from shared.config.section import Count, Index, Section
from shared.config.services import (
    Dtype,
    EvaluationConfig,
    ModelConfig,
    NetworkConfig,
    RedisConfig,
    RolloutConfig,
    TaskConfig,
    VerifierConfig,
    WarmupConfig,
    WatchdogConfig,
    WeightsConfig,
)

_PROMPT_TOKEN_BYTES = 4
_COMPLETION_TOKEN_BYTES = 10
"""A token on the wire: its id; with a log-probability and the versions that sampled it."""

_MESSAGE_BYTES = 1024
"""What a message holds beside its tokens."""

_CANARY_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.2}
"""Above what rounding makes of a canary's few tokens, below what weights that are not the learner's
make; of the bytes that arrived the checksum is sure."""


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
    target_entropy: TargetEntropyConfig = TargetEntropyConfig()
    pi_entropy: PiEntropyConfig = PiEntropyConfig()
    reference_kl: ReferenceKLConfig = ReferenceKLConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    redis: RedisConfig = RedisConfig()
    network: NetworkConfig = NetworkConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    law: LawConfig = LawConfig()

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
    def canary_tolerance(self) -> float:
        """In nats: `weights.canary_tolerance`, or what the rounding of the model's dtype asks."""
        given = self.weights.canary_tolerance
        return _CANARY_TOLERANCE[self.model.dtype] if given is None else given

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

    @property
    def _max_prompt_bytes(self) -> int:
        """What a prompt group takes at most on the wire, an ordinary answer included."""
        return self.model.max_length * _PROMPT_TOKEN_BYTES + _MESSAGE_BYTES

    @property
    def _max_group_bytes(self) -> int:
        """What a scored group takes at most on the wire."""
        size = max(self.rollout.group_size, self.evaluation.group_size)
        completion = self.rollout.max_completion_tokens * _COMPLETION_TOKEN_BYTES + _MESSAGE_BYTES
        return self._max_prompt_bytes + size * completion

    @model_validator(mode="after")
    def _there_is_a_model(self) -> Self:
        if self.model.path is None and self.warmup is None:
            raise ValueError(
                "model.path is not set and there is no [warmup]: name a model folder, or add"
                " [warmup] to train a small one first"
            )
        return self

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> Self:
        if self.rollout.group_size > 1:
            return self
        advantage = self.advantage
        chosen: str = advantage.estimator
        if advantage.dynamic_sampling:
            chosen = "dynamic_sampling"
        elif advantage.ppl_alpha > 0:
            chosen = "ppl_alpha"
        elif advantage.estimator == "reinforce_plus_plus":
            return self
        raise ValueError(
            f"rollout.group_size = 1: {chosen} compares completions of one prompt; use at least 2"
        )

    @model_validator(mode="after")
    def _a_prompt_has_room(self) -> Self:
        if self.rollout.max_completion_tokens >= self.model.max_length:
            raise ValueError(
                f"rollout.max_completion_tokens = {self.rollout.max_completion_tokens}: leaves no"
                f" room for a prompt in model.max_length = {self.model.max_length}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _the_overlong_buffer_leaves_room(self) -> Self:
        buffer, most = self.advantage.overlong_buffer_len, self.rollout.max_completion_tokens
        if buffer >= most:
            raise ValueError(
                f"advantage.overlong_buffer_len = {buffer}: must be below"
                f" rollout.max_completion_tokens = {most}, or every completion is too long; lower"
                " it"
            )
        return self

    @model_validator(mode="after")
    def _the_streams_have_room(self) -> Self:
        redis, problems = self.redis, self.evaluation.num_problems
        if self.max_outstanding + problems > redis.max_prompts:
            raise ValueError(
                f"redis.max_prompts = {redis.max_prompts}: needs room for"
                f" {self.max_outstanding} groups ((max_staleness + 1) x groups_per_batch) and"
                f" evaluation.num_problems = {problems}; raise it"
            )
        if self._held_until_checkpoint > redis.max_groups:
            raise ValueError(
                f"redis.max_groups = {redis.max_groups}: `scored` holds up to"
                f" {self._held_until_checkpoint} groups between checkpoints; raise it, or lower"
                " checkpoint.every_steps"
            )
        return self

    @model_validator(mode="after")
    def _the_streams_have_room_in_bytes(self) -> Self:
        """Nobody but the learner empties `scored`, and it needs a batch there, all at once.

        Beyond that it checkpoints early when the stream is full; the feeder must never wait.
        """
        redis, num_prompts = self.redis, self.max_outstanding + self.evaluation.num_problems
        num_groups = self.learner.groups_per_batch
        prompts_mib = _in_mib(num_prompts * self._max_prompt_bytes)
        groups_mib = _in_mib(num_groups * self._max_group_bytes)
        if prompts_mib > redis.max_prompts_mib:
            raise ValueError(
                f"redis.max_prompts_mib = {redis.max_prompts_mib}: {num_prompts} prompts of"
                f" model.max_length = {self.model.max_length} tokens may take {prompts_mib};"
                " raise it"
            )
        if groups_mib > redis.max_groups_mib:
            raise ValueError(
                f"redis.max_groups_mib = {redis.max_groups_mib}: one batch of {num_groups} groups"
                f" may take {groups_mib}; raise it, or lower rollout.max_completion_tokens"
            )
        return self

    @model_validator(mode="after")
    def _every_controller_controls(self) -> Self:
        for method, section in SECTION_OF_METHOD.items():
            if section in self.model_fields_set and self.entropy.method != method:
                raise ValueError(
                    f'entropy.method = "{self.entropy.method}": [{section}] has no effect with it;'
                    f' set method = "{method}" or leave the section out'
                )
        return self

    @model_validator(mode="after")
    def _the_coefficient_starts_inside_its_box(self) -> Self:
        coefficient = self.entropy.entropy_coeff
        band, target = self.adaptive_entropy, self.target_entropy
        boxes = {
            "aent": ("AEnt", "adaptive_entropy.clip_low, clip_high", band.clip_low, band.clip_high),
            "target": (
                "the controller",
                "target_entropy.coeff_min, coeff_max",
                target.coeff_min,
                target.coeff_max,
            ),
        }
        if self.entropy.method not in boxes:
            return self
        who, keys, low, high = boxes[self.entropy.method]
        if not low <= coefficient <= high:
            raise ValueError(
                f"entropy.entropy_coeff = {coefficient}: {who} starts inside"
                f" [{keys}] = [{low}, {high}]"
            )
        return self


def _in_mib(num_bytes: int) -> int:
    return -(-num_bytes >> 20)
