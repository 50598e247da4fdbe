"""From scored groups to packed micro-batches: a row a completion, a share of the rows a rank.

A batch is R rows. Values per token are matrices [R, C] with C the longest completion, `mask` True
on sampled tokens. Rows are cut by whole groups into optimiser mini-batches, and each of those
into micro-batches over the ranks. Every rank knows of all rows and makes the same plan, so nothing
about it has to be sent; tokens it has of its own rows alone (`services.learner.shares`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from services.learner.advantages import estimate_advantages
from services.learner.balance import Load, PassCost, Plan, plan_passes
from services.learner.packing import Packing
from shared.config import RunConfig
from shared.records import Completion, GroupUid, ScoredGroup
from shared.rl.covariance import token_keys
from shared.rl.staleness import staleness


@dataclass(frozen=True, slots=True)
class Row:
    """A completion to be trained on.

    Attributes:
        group: position of its group in the batch.
        token_ids: prompt and completion; None where the row is another rank's.
        uid_hash: signed 64 bits that tell completions apart, the same in every process.
        num_versions: policy versions that sampled it.
    """

    group: int
    num_prompt_tokens: int
    num_completion_tokens: int
    token_ids: array[int] | None
    reward: float
    advantage: float
    uid_hash: int
    staleness: int
    num_versions: int

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return self.num_prompt_tokens + self.num_completion_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one training step and their values per token.

    Attributes:
        groups: none on a rank that has only its own rows' tokens; then the values per token are
            there for its own rows, and 0 elsewhere.
        minibatches: ranges of row numbers, in order, none empty; they cover all rows.
        mask: [R, C] bool.
        advantages, behaviour_logprobs: [R, C] float32, 0 outside mask.
        staleness: [R, C] int32, of the version that sampled the token; 0 outside mask.
        uid_hashes: [R] int64.
    """

    groups: tuple[ScoredGroup, ...]
    rows: tuple[Row, ...]
    minibatches: tuple[range, ...]
    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    staleness: Tensor
    uid_hashes: Tensor

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        minibatches: Sequence[range],
        groups: Sequence[ScoredGroup] = (),
    ) -> Batch:
        """All but what was reported of single tokens, which is 0 still."""
        lengths = torch.tensor([row.num_completion_tokens for row in rows], dtype=torch.int64)
        width = int(lengths.max()) if rows else 0
        mask = torch.arange(width) < lengths.unsqueeze(1)
        of_rows = torch.tensor([row.advantage for row in rows])
        return cls(
            groups=tuple(groups),
            rows=tuple(rows),
            minibatches=tuple(minibatches),
            mask=mask,
            advantages=torch.where(mask, of_rows.unsqueeze(1), 0.0),
            behaviour_logprobs=torch.zeros(mask.shape),
            staleness=torch.zeros(mask.shape, dtype=torch.int32),
            uid_hashes=torch.tensor([row.uid_hash for row in rows], dtype=torch.int64),
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass: S sequences, one after another, T tokens in all.

    Attributes:
        rows: their numbers in the batch; none in a micro-batch that only keeps ranks in step,
            whose single prediction must not reach a loss.
        input_ids: [T].
        packing: where the sequences lie in it.
        predictors: [N], positions in it that predict a completion token.
        targets: [N], those tokens, row by row.
        mask: [S, C], N True.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    packing: Packing
    predictors: Tensor
    targets: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return MicroBatch(
            rows=self.rows,
            input_ids=self.input_ids.to(device),
            packing=self.packing.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            mask=self.mask.to(device),
        )

    def spread(self, values: Tensor) -> Tensor:
        """[N] to [S, C], 0 outside mask; differentiable."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def build_batch(groups: Sequence[ScoredGroup], config: RunConfig, *, policy_version: int) -> Batch:
    """The rows of all usable completions, cut into mini-batches for the optimiser.

    Groups are dealt to the mini-batches in order, the first ones a group longer where it does
    not come out even; a mini-batch without a usable completion is left out.

    Args:
        policy_version: the learner's, from which staleness is counted.
    Raises:
        ValueError: a prompt without tokens.
    """
    advantages = estimate_advantages(
        groups, config.advantage, max_completion_tokens=config.rollout.max_completion_tokens
    )
    rows_by_group = [
        _group_rows(number, group, advantages[number], policy_version)
        for number, group in enumerate(groups)
    ]
    rows = tuple(chain.from_iterable(rows_by_group))
    num_minibatches = config.learner.optimizer_steps_per_batch
    cuts = [len(groups) * i // num_minibatches for i in range(num_minibatches + 1)]
    starts = [sum(len(each) for each in rows_by_group[:cut]) for cut in cuts]
    minibatches = tuple(range(start, end) for start, end in pairwise(starts) if end > start)
    batch = Batch.of(rows, minibatches, groups)
    for number, completion in enumerate(_usable(groups)):
        logprobs = completion.behaviour_logprobs
        batch.behaviour_logprobs[number, : len(logprobs)] = torch.frombuffer(
            logprobs, dtype=torch.float32
        )
        start = 0
        for run in completion.version_runs:
            age = staleness(policy_version, [run.policy_version])
            batch.staleness[number, start : start + run.num_tokens] = age
            start += run.num_tokens
    return batch


def plan_micro_batches(
    batch: Batch, rows: Sequence[int], *, num_ranks: int, micro_batch_tokens: int, cost: PassCost
) -> Plan:
    """The rows, each once, in micro-batches of like cost; as many on every rank.

    A micro-batch has at most micro_batch_tokens, except that a longer row is one by itself.
    """
    loads = {}
    for row in rows:
        num_tokens = batch.rows[row].num_tokens
        num_predictions = batch.rows[row].num_completion_tokens
        loads[row] = Load(num_tokens, cost.of(num_tokens, num_predictions))
    return plan_passes(
        loads, num_ranks=num_ranks, max_tokens=micro_batch_tokens, is_padded=cost.is_padded
    )


def selection_keys(batch: Batch, *, seed: int, step: int) -> Tensor:
    """[R, C] int64: a uniform number for each token, from what it is and not from where it lies."""
    positions = torch.arange(batch.mask.shape[1])
    keys = [
        token_keys(seed, step, number, batch.uid_hashes[list(rows)].unsqueeze(1), positions)
        for number, rows in enumerate(batch.minibatches)
    ]
    return torch.cat(keys) if keys else torch.zeros(batch.mask.shape, dtype=torch.int64)


def collate(batch: Batch, rows: Sequence[int]) -> MicroBatch:
    """The micro-batch of these rows, whose tokens this rank has."""
    if not rows:
        # A pass of no completion, which meets every weight all the same.
        empty = collate_sequences([torch.zeros(2, dtype=torch.int64)])
        return replace(empty, mask=torch.zeros_like(empty.mask))
    chosen = [batch.rows[row] for row in rows]
    sequences = [_token_ids(row.token_ids) for row in chosen if row.token_ids is not None]
    assert len(sequences) == len(chosen), "a row of another rank"
    micro_batch = _pack(sequences, [row.num_prompt_tokens for row in chosen])
    longest = max(row.num_completion_tokens for row in chosen)
    return replace(micro_batch, rows=tuple(rows), mask=batch.mask[list(rows), :longest])


def collate_sequences(sequences: Sequence[Tensor]) -> MicroBatch:
    """Sequences of no batch, which predict each of their tokens but the first.

    Args:
        sequences: [T] int64 each, T at least 2.
    """
    return _pack(sequences, [1] * len(sequences))


def hash_completion(uid: GroupUid, number: int) -> int:
    """64 bits of the completion's place in the seeded order, whichever attempt sampled it."""
    name = f"{uid.epoch}/{uid.index}/{number}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big", signed=True)


def _pack(sequences: Sequence[Tensor], starts: Sequence[int]) -> MicroBatch:
    """The sequences one after another, each of which predicts its tokens from `starts` on."""
    lengths = [len(each) for each in sequences]
    ends = list(accumulate(lengths))
    predictors = [
        torch.arange(end - length + start - 1, end - 1)
        for end, length, start in zip(ends, lengths, starts, strict=True)
    ]
    counts = torch.tensor([len(each) for each in predictors])
    input_ids = torch.cat(list(sequences)).long()
    return MicroBatch(
        rows=(),
        input_ids=input_ids,
        packing=Packing.of(lengths),
        predictors=torch.cat(predictors),
        targets=input_ids[torch.cat(predictors) + 1],
        mask=torch.arange(int(counts.max())) < counts.unsqueeze(1),
    )


def _group_rows(
    number: int, group: ScoredGroup, advantages: Sequence[float], policy_version: int
) -> list[Row]:
    prompt = group.rollout.prompt
    if not prompt.prompt_token_ids:
        raise ValueError(f"group {prompt.uid} has a prompt without tokens")
    rows = []
    for place, completion in enumerate(group.rollout.completions):
        if not group.scores[place].is_usable:
            continue
        versions = [run.policy_version for run in completion.version_runs]
        rows.append(
            Row(
                group=number,
                num_prompt_tokens=len(prompt.prompt_token_ids),
                num_completion_tokens=len(completion.token_ids),
                token_ids=prompt.prompt_token_ids + completion.token_ids,
                reward=group.scores[place].reward,
                advantage=advantages[place],
                uid_hash=hash_completion(prompt.uid, place),
                staleness=staleness(policy_version, versions),
                num_versions=len(set(versions)),
            )
        )
    return rows


def _usable(groups: Sequence[ScoredGroup]) -> Iterator[Completion]:
    for group in groups:
        for completion, score in zip(group.rollout.completions, group.scores, strict=True):
            if score.is_usable:
                yield completion


def _token_ids(values: array[int]) -> Tensor:
    """The array's own memory as a tensor."""
    return torch.frombuffer(values, dtype=torch.uint32)
