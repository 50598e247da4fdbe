"""Models and batches for benchmarks of the learner: shapes, and groups of tokens with rewards."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared.records import (
    Completion,
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)

LOGIT_SPREAD = 4.0
"""Standard deviation, in nats: of 32,768 tokens the entropy is then a few nats."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and a batch of `groups` x `group_size` completions; bounds are of lengths."""

    model: Mapping[str, int]
    groups: int
    group_size: int
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]
    micro_batch_tokens: int = 16384
    dtype: str = "float32"
    steps: int = 3


def _shape(vocabulary: int, width: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
    }


CPU_SIZES = {
    # The built-in task's model and the demo's batch.
    "0.5M": Size(_shape(20, 128, 3, 4, 256), 32, 8, (10, 14), (10, 28), steps=15),
    "25M": Size(_shape(32_768, 384, 7, 6, 1024), 4, 4, (32, 96), (48, 384), 4096),
    "120M": Size(_shape(32_768, 768, 14, 12, 2048), 2, 4, (32, 96), (48, 384), 4096, steps=2),
}

# Of the shapes of Qwen2.5, whose key-value heads are fewer.
GPU_SIZES = {
    "0.5B": Size(
        _shape(151_936, 896, 24, 14, 4864) | {"num_key_value_heads": 2},
        *(16, 8, (64, 256), (256, 4096), 32768, "bfloat16", 5),
    ),
    "1.5B": Size(
        _shape(151_936, 1536, 28, 12, 8960) | {"num_key_value_heads": 2},
        *(16, 8, (64, 256), (256, 4096), 32768, "bfloat16", 5),
    ),
    "3B": Size(
        _shape(151_936, 2048, 36, 16, 11008) | {"num_key_value_heads": 2},
        *(16, 8, (64, 256), (256, 4096), 16384, "bfloat16", 4),
    ),
}


def save_model(size: Size, folder: Path) -> None:
    """An untrained model of that shape, about as sure of a token as a trained one."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(**size.model, tie_word_embeddings=True, max_position_embeddings=32768)
    model = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, size.dtype))
    spread = config.initializer_range * config.hidden_size**0.5  # that of its logits now
    with torch.no_grad():
        model.base_model.norm.weight.fill_(LOGIT_SPREAD / spread)
    model.save_pretrained(folder)


def random_groups(size: Size, *, skew: float = 2.0) -> list[ScoredGroup]:
    """Random tokens; about half of the completions pass.

    Args:
        skew: of the lengths: 1 is none, with 2 most are short and a few long, as in reasoning.
    """
    draw = random.Random(0)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        low, high = bounds
        count = low + round((high - low) * draw.random() ** skew)
        return [draw.randrange(size.model["vocab_size"]) for _ in range(count)]

    return [
        scored_group(
            index,
            tokens(size.prompt_tokens),
            [tokens(size.completion_tokens) for _ in range(size.group_size)],
            [float(draw.random() < 0.5) for _ in range(size.group_size)],
        )
        for index in range(size.groups)
    ]


def scored_group(
    index: int,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float],
) -> ScoredGroup:
    """A group as the verifier would give it, sampled by version 0 with log-probs of -1."""
    longest = max(len(each) for each in completions)
    head = PromptGroup(
        *(GroupUid("bench", 0, index, 0), Purpose.TRAIN, "bench", index, array("I", prompt), ""),
        *(len(completions), 1.0, longest, 0, 0.0),
    )
    sampled = tuple(
        Completion(
            array("I", each), array("f", [-1.0] * len(each)), (VersionRun(0, len(each)),), False
        )
        for each in completions
    )
    scores = tuple(
        Score(Outcome.PASS if reward > 0 else Outcome.FAIL, reward, "") for reward in rewards
    )
    return ScoredGroup(RolloutGroup(head, sampled, "bench", 0.0), scores, "bench", 0.0)
