"""What each service of a run needs to know about itself and about the others.

What the learner trains and keeps is in `shared.config.learner`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Count, GroupSize, Index, Port, Seconds, Section
from shared.stream import Bounds

Dtype = Literal["float32", "bfloat16"]


class NetworkConfig(Section):
    """Where services listen and how long they wait for each other."""

    host: str = "127.0.0.1"
    """Address that gRPC and metrics servers bind, and peers are told to use."""

    rollout_port: Port = 0
    """gRPC port of a rollout replica; 0 takes a free one, which its lease announces."""

    verifier_port: Port = 0
    """gRPC port of a verifier replica."""

    learner_port: Port = 0
    """gRPC port of the learner."""

    metrics_port: Port = 0
    """Port of `/metrics`; fix it only where each service has an address of its own."""

    lease_seconds: Seconds = 10.0
    """A service that has not been heard of for this long is gone."""

    call_timeout_seconds: Seconds = 30.0
    """Deadline of a control call."""

    start_timeout_seconds: Seconds = 300.0
    """How long services wait for each other at the start."""


class RedisConfig(Section):
    """The streams. `REDIS_URL` in the environment wins over `url`."""

    url: str | None = None
    """`redis://` address; without it `isentrope up` starts a server of its own."""

    max_prompts: Count = 4096
    """Groups that may wait on `prompts`; the feeder waits beyond."""

    max_prompts_mib: Count = 256
    """Payload at which `prompts` is full as well, in MiB."""

    max_groups: Count = 4096
    """Groups that may wait on `rollouts` and on `scored`; producers wait beyond."""

    max_groups_mib: Count = 1024
    """Payload at which each of `rollouts`, `scored` and `dead_letter` is full as well, in MiB.
    Give the server 1.3 times this, three times over, and `max_prompts_mib`; and, for
    `rollout.partial_tokens`, 8 bytes for each token of the groups in work."""

    max_attempts: Count = 5
    """Deliveries of one entry, but for those given back, before it goes to `dead_letter`."""

    reclaim_seconds: Seconds = 30.0
    """An entry claimed this long ago by a consumer whose lease ended is given to another. A replica
    that lives, and for this long had no confirmed weights for a group, gives it back itself."""

    outage_seconds: Seconds = 600.0
    """The learner waits this long for a server that is away or refuses, then it ends with an error
    and the run can be resumed."""

    reconcile_seconds: Seconds = 10.0
    """While no group comes, the learner compares this often what is out with what the streams
    hold, and issues again what they lost."""

    @property
    def prompt_bounds(self) -> Bounds:
        """Of the stream `prompts`."""
        return Bounds(self.max_prompts, self.max_prompts_mib << 20)

    @property
    def group_bounds(self) -> Bounds:
        """Of each of the other streams."""
        return Bounds(self.max_groups, self.max_groups_mib << 20)


class ModelConfig(Section):
    """The policy."""

    path: str | None = None
    """Folder in Hugging Face form, or a hub name. Without it `[warmup]` must be there."""

    dtype: Dtype = "float32"
    """Of the weights, in the learner and on the wire."""

    max_length: Count = 4096
    """Prompt and completion together, in tokens."""

    use_chat_template: bool = False
    """Wrap each prompt as a user's message in the tokenizer's chat template."""


class WarmupConfig(Section):
    """A small model trained from scratch on the task's demonstrations before the run."""

    num_steps: Count = 900
    """Optimiser steps."""

    batch_size: Count = 64
    """Demonstrations per step."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak of a linear warm-up and decay."""

    hidden_size: Count = 128
    """Width of the residual stream."""

    num_layers: Count = 3
    """Transformer blocks."""

    num_heads: Count = 4
    """Attention heads."""

    intermediate_size: Count = 256
    """Width of the feed-forward layers."""

    @model_validator(mode="after")
    def _heads_are_of_a_size_that_vllm_has(self) -> Self:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"warmup.num_heads = {self.num_heads}: a head must be a multiple of 32 wide for"
                f" vLLM on a CPU, and hidden_size = {self.hidden_size}; change one of them"
            )
        return self


class TaskConfig(Section):
    """Where prompts come from and how completions are scored."""

    name: str = "countdown"
    """A name of `shared/tasks`, or `package.module:Class` of your own."""

    params: dict[str, str | int | float | bool] = {}
    """Keyword arguments of the task."""


class RolloutConfig(Section):
    """The vLLM fleet."""

    num_replicas: Index = 2
    """Replicas that `isentrope up` starts; a cluster may run any number."""

    group_size: GroupSize = 8
    """Completions per prompt."""

    max_completion_tokens: Count = 1024
    """A completion that reaches this is truncated."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of training samples; the learner divides its logits by the same."""

    max_concurrent_groups: Count = 32
    """Groups one replica samples at a time, at most. It begins with as many as surely fit into its
    KV cache, takes more while there is room, and fewer when vLLM puts requests back."""

    partial_tokens: Index = 256
    """A group's completions are saved in Redis each time one of them has so many new tokens, so
    that another replica can go on from them: 8 bytes a token, of groups in work only. 0 saves
    nothing, and a completion that was cut off is sampled from its start."""

    drain_seconds: Seconds = 90.0
    """How long a replica that was told to end goes on with its groups; then it saves them and
    leaves them to others. A cluster's grace period is longer."""

    tensor_parallel_size: Count = 1
    """GPUs of one replica."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU that vLLM may take."""

    kv_cache_mib: Count = 256
    """KV cache of one replica on a CPU."""

    threads: Count = 1
    """CPU threads of one engine."""

    enforce_eager: bool = False
    """Do not compile or capture graphs; a CPU replica never does."""


class VerifierConfig(Section):
    """The scorers."""

    num_replicas: Count = 1
    """Replicas that `isentrope up` starts; a cluster may run any number."""

    num_workers: Count = 1
    """Scoring processes of one replica."""

    timeout_seconds: Seconds = 10.0
    """A completion whose scoring takes longer is killed and counted as a timeout."""

    memory_mib: Count = 2048
    """Address space of one scoring process."""

    max_concurrent_groups: Count = 16
    """Groups one replica scores at a time."""


class WeightsConfig(Section):
    """How a policy version reaches the replicas."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """`auto`: nccl where the learner has a GPU, else gloo."""

    bucket_mib: Count = 64
    """Parameters travel packed in buckets of this size."""

    timeout_seconds: Seconds = 60.0
    """Bounds each call of a publication, and each bucket. A replica that is silent for longer is
    dropped, and so is one that most others have waited for, over all buckets, for longer."""

    min_mib_per_second: Annotated[float, Field(ge=1)] = 100.0
    """Of the learner's network; a transfer may take twice timeout_seconds, and as long as its
    bytes need at this rate: with gloo the model's times the workers of all replicas, with nccl the
    model's. Who does not have everything by then is dropped. The default is what 1 Gbit/s does;
    below it, lower this."""

    republish_seconds: Seconds = 120.0
    """A publication that did not reach a living replica is tried again with those it did not
    reach, in a new epoch; but no further time once this long has passed since it began, and with
    what is left of it for the transfer. So one takes at most this, eleven times timeout_seconds and
    the transfer at min_mib_per_second; the learner's gathering of its weights not counted."""

    catch_up: Literal["stream", "group"] = "stream"
    """How a replica that came late or was left behind gets the published version: at once, from a
    copy that the learner keeps in host memory (one model's size); or in a group, when the learner
    waits for data or publishes next, without a copy."""

    canary_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest difference of a canary log-prob between learner and replica, in nats. Not set: 1e-3,
    or 0.2 with `model.dtype = "bfloat16"`, whose rounding alone makes 0.01 on average and a
    fraction of a nat at most (deploy/MISMATCH.md)."""


class EvaluationConfig(Section):
    """Held-out problems, through the same streams."""

    every_steps: Index = 10
    """0 turns evaluation off."""

    num_problems: Count = 100
    """First problems of the task's evaluation split."""

    group_size: GroupSize = 4
    """Completions per problem."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of evaluation samples."""


class WatchdogConfig(Section):
    """When nothing happening is a fault."""

    stall_seconds: Annotated[float, Field(ge=0)] = 300.0
    """A run without a step for this long is stalled, and says who is waited for; a process that
    ends nothing of its own work for this long is unhealthy, and a cluster restarts it. Above the
    longest step, checkpoint and completion; 0: never."""
