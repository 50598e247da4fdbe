"""Rates from a model of the hardware, where nothing was measured: a roofline with stated factors.

    decode    one token of n sequences: max(weights + KV cache read, 2 P n operations) + overhead
    prompt    2 P operations a token, once a group: its completions share the prefix
    train     8 P operations a token: forward, backward, activations computed again
    publish   the weights over the network once, and a swap in device memory
    checkpoint  weights and optimiser state: a copy to host memory, then to storage beside training

P is the number of parameters, all of them active: a mixture of experts is reckoned as if dense.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from services.cli.plan.gpus import gpu_called
from services.cli.plan.rates import Decode, Lengths, Publishing, Rates
from shared.errors import ConfigError

WEIGHT_BYTES = 2
OPTIMIZER_BYTES = 16
"""A parameter in training: bfloat16 weights and gradients, float32 weights and two moments."""

CHECKPOINT_BYTES = 14
"""Of a parameter on disk: all of that but the gradients."""

TRAINED_SHARE = 0.8
"""Of the learner's memory, for what is there throughout; the rest is for activations."""

ROOMY = 0.8
"""Share of the KV cache up to which a replica takes more groups: `services.rollout.concurrency`."""

PARALLEL_SECONDS = 1.5e-3
"""Added to a token for the exchange between the GPUs of one engine, where it has several."""

_REFERENCE_PARAMETERS, _REFERENCE_KV_BYTES, _KV_POWER = 8e9, 131_072, 0.42
"""Of Llama 3 8B, whose KV cache takes 128 KiB a token; the power is that of the family to 70B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """How much of a peak is reached; guesses of experience, to be replaced by what was measured.

    Attributes:
        bandwidth: of memory bandwidth, in decoding.
        compute: of bf16 operations, in decoding and reading prompts.
        training: of bf16 operations, in training (MFU).
        memory: of a replica's GPUs, for weights and KV cache (`rollout.gpu_memory_utilization`).
        engine_seconds: of scheduling and sampling, for each token.
        network_gb_per_second: at which all replicas receive; 12.5 is 100 Gbit/s.
        copy_gb_per_second: at which a rank copies its part of a checkpoint to host memory.
        storage_gb_per_second: at which all ranks together write it from there.
        publish_seconds: of control, for each publication.
    """

    bandwidth: float = 0.7
    compute: float = 0.5
    training: float = 0.35
    memory: float = 0.85
    engine_seconds: float = 2e-3
    network_gb_per_second: float = 12.5
    copy_gb_per_second: float = 4.0
    storage_gb_per_second: float = 2.0
    publish_seconds: float = 0.5


class ModelSize(NamedTuple):
    """Parameters, and bytes that the KV cache takes for a token (bfloat16)."""

    parameters: float
    kv_bytes: float

    @classmethod
    def of_parameters(cls, parameters: float) -> ModelSize:
        """With the KV cache that dense models of this size tend to have."""
        share = (parameters / _REFERENCE_PARAMETERS) ** _KV_POWER
        return cls(parameters, _REFERENCE_KV_BYTES * share)

    @classmethod
    def of_folder(cls, folder: Path) -> ModelSize:
        """Of a model in Hugging Face form; only its config.json is read.

        Raises:
            ConfigError: there is none, or it lacks a size.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text("utf8"))
            return cls(_parameters(config), _kv_bytes(config))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--model {folder}: {path.name} cannot be used ({error!r}); name a folder in"
                " Hugging Face form, or give --parameters"
            ) from None


class Hardware(NamedTuple):
    """GPUs of the learner and of one replica."""

    gpu: str
    learner_gpus: int
    replica_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoning:
    """Rates of a model on hardware, and what follows from its memory.

    Attributes:
        kv_tokens: that fit into the KV cache of one replica.
    """

    rates: Rates
    kv_tokens: float

    def concurrent_groups(self, *, group_size: int, at_most: int) -> int:
        """Groups that fill a replica's KV cache as far as the service lets them."""
        tokens = self.rates.prompt_tokens + self.rates.lengths.resident(group_size)
        return max(1, min(at_most, int(ROOMY * self.kv_tokens / tokens)))


def reckon(
    size: ModelSize,
    hardware: Hardware,
    lengths: Lengths,
    *,
    prompt_tokens: float,
    group_size: int,
    verify_seconds: float,
    factors: Factors,
) -> Reckoning:
    """Rates by the roofline.

    Raises:
        ConfigError: the model does not fit into a replica, or into the learner.
    """
    gpu = gpu_called(hardware.gpu)
    kv_tokens = _kv_tokens(size, hardware, prompt_tokens + lengths.maximum, factors)
    _check_learner(size, hardware)
    weights = WEIGHT_BYTES * size.parameters
    read = gpu.memory_tb_per_second * 1e12 * hardware.replica_gpus * factors.bandwidth
    operations = gpu.bf16_tflops * 1e12
    decoded = operations * hardware.replica_gpus * factors.compute
    trained = operations * hardware.learner_gpus * factors.training
    parallel = PARALLEL_SECONDS if hardware.replica_gpus > 1 else 0.0
    checkpoint_bytes = CHECKPOINT_BYTES * size.parameters
    copied = factors.copy_gb_per_second * 1e9 * hardware.learner_gpus
    wire_seconds = weights / (factors.network_gb_per_second * 1e9)
    pause_seconds = 2 * weights / read  # reads what came and writes it into place
    return Reckoning(
        kv_tokens=kv_tokens,
        rates=Rates(
            lengths=lengths,
            decode=Decode(
                fixed_seconds=factors.engine_seconds + parallel,
                memory_seconds=weights / read,
                context_seconds=size.kv_bytes / read,
                compute_seconds=2 * size.parameters / decoded,
            ),
            train_seconds_per_token=(
                8 * size.parameters / trained * (1 + prompt_tokens / lengths.mean),
            ),
            publishing=(
                Publishing(factors.publish_seconds + wire_seconds + pause_seconds, pause_seconds),
            ),
            prompt_tokens=prompt_tokens,
            prompt_seconds=2 * size.parameters * prompt_tokens / decoded,
            verify_seconds=verify_seconds * group_size,
            checkpoint_seconds=checkpoint_bytes / copied,
            checkpoint_write_seconds=checkpoint_bytes / (factors.storage_gb_per_second * 1e9),
        ),
    )


def _kv_tokens(size: ModelSize, hardware: Hardware, longest: float, factors: Factors) -> float:
    """Tokens in the KV cache; one sequence of the longest kind must fit.

    Raises:
        ConfigError: it does not, or not even the weights do.
    """
    usable = gpu_called(hardware.gpu).memory_gb * 1e9 * factors.memory
    weights, sequence = WEIGHT_BYTES * size.parameters, size.kv_bytes * longest
    needed = weights + sequence
    if needed > usable * hardware.replica_gpus:
        raise ConfigError(
            f"--replica-gpus {hardware.replica_gpus}: weights of {weights / 1e9:.0f} GB and"
            f" {sequence / 1e9:.1f} GB of KV cache for one sequence of {longest:.0f} tokens do not"
            f" fit into {usable * hardware.replica_gpus / 1e9:.0f} GB of {hardware.gpu}; an engine"
            f" needs --replica-gpus {_power_of_two(needed / usable)}"
        )
    return (usable * hardware.replica_gpus - weights) / size.kv_bytes


def _check_learner(size: ModelSize, hardware: Hardware) -> None:
    usable = gpu_called(hardware.gpu).memory_gb * 1e9 * TRAINED_SHARE
    needed = OPTIMIZER_BYTES * size.parameters
    if needed > usable * hardware.learner_gpus:
        raise ConfigError(
            f"--learner-gpus {hardware.learner_gpus}: weights, gradients and optimiser state of"
            f" {needed / 1e9:.0f} GB do not fit into {usable * hardware.learner_gpus / 1e9:.0f} GB"
            f" of {hardware.gpu}; the learner needs --learner-gpus {math.ceil(needed / usable)}"
            " (ZeRO-3)"
        )


def _power_of_two(least: float) -> int:
    """Tensor parallelism divides heads, so that engines have 1, 2, 4, 8 ... GPUs."""
    return 1 << max(0, math.ceil(math.log2(least)))


def _kv_bytes(config: dict[str, Any]) -> float:
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return float(2 * WEIGHT_BYTES * config["num_hidden_layers"] * heads * _head_size(config))


def _head_size(config: dict[str, Any]) -> int:
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def _parameters(config: dict[str, Any]) -> float:
    """Of a dense decoder: attention, gated feed-forward, embeddings."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * _head_size(config) * (heads + kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    tables = 1 if config.get("tie_word_embeddings") else 2
    return float(config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden)
