"""A Qwen2 so small that vLLM samples it fast, and that Hugging Face computes too."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 20
TOLERANCE = 1e-4
"""Nats, of one token's log-prob in float32."""


def random_model(seed: int) -> Qwen2ForCausalLM:
    """Tied embeddings, and weights so large that two models disagree everywhere."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,  # in heads of 32, the smallest that vLLM's CPU attention knows
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


@torch.no_grad()
def reference_logprobs(
    model: Qwen2ForCausalLM, token_ids: list[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of token_ids[1:] as Hugging Face computes them."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1] / temperature
    picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids[1:])[:, None])
    return [float(value) for value in picked[:, 0]]
