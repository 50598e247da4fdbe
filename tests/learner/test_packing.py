"""Packed sequences: each is computed as if it were alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.learner import packing as packed
from services.learner.batch import MicroBatch, collate_sequences
from services.learner.packing import LANE_FILL, Packing
from services.learner.policy import Policy
from shared.errors import ConfigError

VOCABULARY = 40
LENGTHS = (9, 23, 2, 17, 24, 3)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], object]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    # Each token sees itself and four before it.
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
}


@pytest.fixture(params=MODELS)
def policy(request: pytest.FixtureRequest) -> Policy:
    """In float64, so that a difference is a difference of meaning."""
    torch.manual_seed(0)
    model: object = MODELS[request.param]()
    return Policy(model.double(), chunk=16)  # type: ignore[attr-defined]


def sequences(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def measured(policy: Policy, tokens: list[Tensor]) -> list[Tensor]:
    """By sequence: log-probs and entropies [T - 1, 2] of its tokens but the first."""
    batch: MicroBatch = collate_sequences(tokens)
    logprobs, entropy = policy(
        batch.input_ids, batch.packing, batch.predictors, batch.targets, temperature=0.9
    )
    sizes = [len(each) - 1 for each in tokens]
    return list(torch.split(torch.stack([logprobs, entropy], -1), sizes))


def gradient(policy: Policy, values: list[Tensor]) -> Tensor:
    """Of a sum in which each token has a weight of its own, to all weights."""
    flat = torch.cat(values)
    weights = torch.randn(flat.shape, dtype=flat.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(
        (flat * weights).sum(), list(policy.parameters()), allow_unused=True
    )
    return torch.cat([each.flatten() for each in found if each is not None])


def test_packed_sequences_have_the_log_probs_and_gradients_of_each_alone(policy: Policy) -> None:
    alone = [measured(policy, [each])[0] for each in sequences()]
    expected = gradient(policy, alone)
    padded = measured(policy, sequences())
    assert policy.pack(True)
    together = measured(policy, sequences())
    for left, middle, right in zip(alone, padded, together, strict=True):
        torch.testing.assert_close(middle, left, rtol=0, atol=1e-12)
        torch.testing.assert_close(right, left, rtol=0, atol=1e-12)
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(gradient(policy, together), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_sequence_s_tokens_move_nothing_of_another(policy: Policy, changed: int) -> None:
    tokens = sequences()
    policy.pack(True)
    before = measured(policy, tokens)
    tokens[changed] = (tokens[changed] + 1 + torch.arange(LENGTHS[changed]) % 7) % VOCABULARY
    after = measured(policy, tokens)
    others = [number for number in range(len(LENGTHS)) if number != changed]
    assert not torch.equal(before[changed], after[changed])
    for number in others:
        torch.testing.assert_close(after[number], before[number], rtol=0, atol=1e-13)
    torch.testing.assert_close(
        gradient(policy, [after[number] for number in others]),
        gradient(policy, [before[number] for number in others]),
        rtol=0,
        atol=1e-11,
    )


def test_unpacking_gives_the_model_its_own_attention_back(policy: Policy) -> None:
    before = measured(policy, sequences())
    assert not policy.is_packed
    assert policy.pack(True) and policy.is_packed and not policy.cost.is_padded
    assert policy.pack(False) and not policy.is_packed and policy.cost.is_padded
    assert all(map(torch.equal, measured(policy, sequences()), before))


def test_a_pass_costs_what_its_matrices_do() -> None:
    policy = Policy(MODELS["qwen3"](), chunk=16)
    layer = 32 * 8 * (4 + 2 + 2) + 8 * 4 * 32 + 3 * 32 * 48
    assert policy.cost.per_token == 2 * 2 * layer
    assert policy.cost.per_prediction == 2 * 32 * VOCABULARY
    assert policy.cost.per_pair == 4 * 2 * 4 * 8
    assert policy.cost.of(3, 1) == 3 * policy.cost.per_token + 64 * VOCABULARY + 6 * 256


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_lanes_hold_each_token_once_and_little_padding(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    total = sum(lengths)
    assert packing.position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert packing.boundaries.tolist() == [0, *accumulate(lengths)]
    assert packing.places[packing.returns].tolist() == list(range(total))
    area = sum(lane.num_sequences * lane.width for lane in packing.lanes)
    assert len(packing.places) == area <= total / LANE_FILL
    assert sum(lane.num_sequences for lane in packing.lanes) == len(lengths)
    tokens, places = packing.padded()
    assert tokens.shape == (len(lengths), max(lengths))
    assert tokens.flatten()[places].tolist() == list(range(total))


@pytest.mark.parametrize("window", [None, 4])
def test_lane_attention_is_attention_within_each_sequence(window: int | None) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 12) for _ in range(9)]
    shape = (1, 4, sum(lengths), 8)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    found, _ = packed.packed_attention(
        torch.nn.Module(),
        query,
        key[:, :2],
        value[:, :2],
        None,
        packing=Packing.of(lengths),
        scaling=0.3,
        sliding_window=window,
    )
    start = 0
    for length in lengths:
        for place, head in ((place, head) for place in range(length) for head in range(4)):
            first = 0 if window is None else max(0, place - window + 1)
            seen = slice(start + first, start + place + 1)
            scores = key[0, head // 2, seen] @ query[0, head, start + place] * 0.3
            expected = scores.softmax(-1) @ value[0, head // 2, seen]
            torch.testing.assert_close(found[0, start + place, head], expected)
        start += length


@pytest.mark.parametrize("window", [None, 4])
def test_the_flash_kernel_is_called_as_torch_declares_it(window: int | None) -> None:
    """On the meta device: its shapes and arguments, not its numbers, which need a GPU."""
    packing = Packing.of(LENGTHS).to(torch.device("meta"))
    tokens = sum(LENGTHS)
    query = torch.empty(1, 4, tokens, 8, dtype=torch.bfloat16, device="meta")
    key, value = query[:, :2], query[:, :2]
    attended = packed._flash_attention(query, key, value, packing, 0.3, window)
    assert attended.shape == (1, tokens, 4, 8)
    assert not packed.takes_flash(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients_from_layers_computed_twice(
    policy: Policy, is_reentrant: bool
) -> None:
    policy.pack(True)
    runs: list[str] = []
    layer = policy.model.base_model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: runs.append("attention"))
    expected = backward(policy)
    assert len(runs) == 1
    policy.checkpoint_activations(is_reentrant=is_reentrant)
    assert torch.equal(backward(policy), expected)
    assert len(runs) == 3


def backward(policy: Policy) -> Tensor:
    policy.zero_grad()
    torch.autograd.backward([torch.cat(measured(policy, sequences())).sin().sum()])
    return torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None])


def test_dropout_refuses_checkpointed_activations_which_would_turn_it_on() -> None:
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**SHAPE, attention_dropout=0.1)), chunk=16)
    with pytest.raises(ConfigError, match=r"attention_dropout = 0.1 would be on"):
        policy.checkpoint_activations(is_reentrant=False)
