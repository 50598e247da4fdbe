"""What the learner trains, how, and what it keeps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Count, Index, Section


class LoraConfig(Section):
    """Adapters, which take a learning rate some ten times that of full training. Published is the
    merged model; the run's end leaves the adapters too, in `model/adapter`."""

    rank: Count = 16
    """Of the product that each adapter adds to a weight."""

    alpha: Count = 32
    """The product is scaled by alpha / rank."""

    targets: list[str] = []
    """Last parts of the names of the layers that get one, `q_proj` say; empty: every linear layer
    but the head."""


class LearnerConfig(Section):
    """The DeepSpeed learner."""

    num_ranks: Count = 1
    """Data-parallel processes that `isentrope up` starts."""

    groups_per_batch: Count = 16
    """Prompt groups of one training batch."""

    optimizer_steps_per_batch: Count = 1
    """Optimiser mini-batches one batch is cut into."""

    max_staleness: Index = 2
    """Largest distance in versions between a token's policy and the learner's, queue included;
    0 is synchronous RL."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Of AdamW, after warm-up."""

    lr_schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to 0 at the run's last step."""

    lr_warmup_steps: Index = 0
    """Optimiser steps of linear warm-up."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second moment."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO: 1 shards optimiser state, 2 gradients too, 3 parameters too."""

    micro_batch_tokens: Count = 16384
    """Tokens, prompts included, of one forward and backward pass per rank; completions are packed
    one after another without padding, and a longer one is a pass by itself."""

    activation_checkpointing: bool = False
    """Keep what goes from layer to layer, and compute the rest again in the backward pass: less
    memory, about a third more time."""

    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps the optimiser's state and the float32 master weights in host memory and steps
    there: 12 bytes a parameter of device memory less, over all ranks, for a slower step. Wants
    `zero_stage` 1 or more. With bfloat16 the gradients of micro-batches are then added in
    bfloat16, as they are with `zero_stage` 3."""

    lora: LoraConfig | None = None
    """Train adapters in place of the weights; without the table all weights are trained."""

    logit_chunk_tokens: Count = 384
    """Tokens whose logits are held at a time, from the forward pass to the end of the backward
    pass; those of the other tokens are computed twice. A logit takes 4 bytes: of a vocabulary of
    151,936, 384 tokens take 223 MiB. Fewer than 256 make the products slower."""

    head_dtype: Literal["model", "float32"] = "model"
    """Of the products with the output embedding. `float32` spares a bfloat16 model the rounding of
    its logits, for slower products; let vLLM sample in the same way, by `"head_dtype": "float32"`
    in the model's config.json. A float32 model has it in any case."""

    head_work: Literal["auto", "in_place", "compiled"] = "auto"
    """How the output embedding's logits become log-probs, entropies and gradients: by kernels that
    torch compiles when the learner starts, for which it needs a C++ compiler, or in place. `auto`
    compiles on a GPU, where it spares passes over memory; a CPU's cache spares them as well."""

    threads: Count = 1
    """CPU threads of one rank."""

    @model_validator(mode="after")
    def _mini_batches_are_equal(self) -> Self:
        if self.groups_per_batch % self.optimizer_steps_per_batch != 0:
            raise ValueError(
                f"learner.optimizer_steps_per_batch = {self.optimizer_steps_per_batch}: does not"
                f" divide groups_per_batch = {self.groups_per_batch}; use a divisor"
            )
        return self

    @model_validator(mode="after")
    def _what_is_offloaded_is_zero_s(self) -> Self:
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError(
                'learner.offload = "cpu": DeepSpeed offloads what ZeRO holds, and zero_stage = 0;'
                " set zero_stage to 1, 2 or 3"
            )
        return self


class CheckpointConfig(Section):
    """What survives a crash."""

    every_steps: Count = 20
    """Steps between checkpoints; work since the last one is redone after a crash."""

    keep: Count = 2
    """Newest steps whose checkpoint is kept."""

    keep_best: Index = 1
    """Checkpoints with the highest evaluation score that are kept besides, for `isentrope export`.
    One has a score if the version of its step was evaluated: make every_steps a multiple of
    evaluation.every_steps."""

    asynchronous: bool = True
    """Write a checkpoint while training goes on. Each rank then keeps what it writes in host memory
    meanwhile; false: training waits for the disk."""
