"""A model small enough to train in milliseconds, and batches for it."""

from __future__ import annotations

import copy
import random
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.learner.balance import PassCost
from services.learner.batch import MicroBatch
from services.learner.diagnostics import TokenRecord
from services.learner.measures import StepReport
from services.learner.packing import Packing
from services.learner.passes import OptimizerStep
from services.learner.policy import read_statistics
from services.learner.ranks import Ranks
from services.learner.training import Trainer
from shared.config import RunConfig
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
from shared.rl.entropy import TokenStatistics, fused_logprob_entropy

VOCABULARY = 20
ONE_RANK = Ranks(0, 1, torch.device("cpu"), None)


def run_config(**sections: dict[str, Any]) -> RunConfig:
    run = {"run": {"name": "t", "num_steps": 9}, "model": {"path": "x"}}
    return RunConfig.model_validate({**run, **sections})


def scored_group(
    index: int,
    outcomes: list[Outcome],
    *,
    prompt: tuple[int, ...] = (7, 8),
    lengths: list[int] | None = None,
    rewards: list[float] | None = None,
    versions: tuple[tuple[int, int], ...] | None = None,
) -> ScoredGroup:
    """Completions of tokens 10 index, 10 index + 1, ... with log-probs -0.5, -1.0, ..."""
    lengths = lengths or [3] * len(outcomes)
    rewards = rewards or [float(outcome is Outcome.PASS) for outcome in outcomes]
    completions = tuple(
        Completion(
            token_ids=array("I", range(10 * index, 10 * index + length)),
            behaviour_logprobs=array("f", [-0.5 * (i + 1) for i in range(length)]),
            version_runs=tuple(VersionRun(*run) for run in versions or ((0, length),)),
            is_truncated=False,
        )
        for length in lengths
    )
    scores = tuple(Score(*pair, "") for pair in zip(outcomes, rewards, strict=True))
    return _scored(GroupUid("run", 0, index, 0), prompt, completions, scores)


def sampled_groups(
    seed: int, *, num_groups: int = 4, group_size: int = 6, versions: Sequence[int] = (0,)
) -> list[ScoredGroup]:
    """Random prompts and completions; about half of them pass, the first was never judged."""
    draw = random.Random(seed)
    groups = []
    for index in range(num_groups):
        completions, scores = [], []
        for _ in range(group_size):
            length = draw.randint(3, 14)
            token_ids = array("I", [draw.randrange(VOCABULARY) for _ in range(length)])
            logprobs = array("f", [-draw.random() * 4 for _ in range(length)])
            runs = (VersionRun(draw.choice(versions), length),)
            completions.append(Completion(token_ids, logprobs, runs, False))
            passed = draw.random() < 0.5
            scores.append(Score(Outcome.PASS if passed else Outcome.FAIL, float(passed), ""))
        if index == 0:
            scores[0] = Score(Outcome.ERROR, 0.0, "the scorer died")
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 9)))
        uid = GroupUid("t", seed, index, 0)
        groups.append(_scored(uid, prompt, tuple(completions), tuple(scores)))
    return groups


def _scored(
    uid: GroupUid,
    prompt: tuple[int, ...],
    completions: tuple[Completion, ...],
    scores: tuple[Score, ...],
) -> ScoredGroup:
    head = PromptGroup(
        uid,
        Purpose.TRAIN,
        "t",
        uid.index,
        array("I", prompt),
        "",
        len(completions),
        1.0,
        64,
        0,
        0.0,
    )
    return ScoredGroup(RolloutGroup(head, completions, "replica", 0.0), scores, "verifier", 0.0)


class Bigram(nn.Module):
    """Logits from the token before alone; called as `services.learner.policy.Policy`.

    In float64: tokens after one token tie in entropy, whatever micro-batch they are in.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape, dtype = (VOCABULARY, 8), torch.float64
        self.embedding = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        self.head = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * 0.5)

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        predictors: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> tuple[Tensor, ...]:
        hidden = self.embedding[input_ids[predictors]]
        measured = fused_logprob_entropy(
            hidden,
            self.head,
            targets,
            temperature=temperature,
            clamp_p=clamp_p,
            chunk=64,
            with_mean_pull=with_mean_pull,
        )
        return tuple(each for each in measured if each is not None)


class PlainModel:
    """The `TrainedModel` of a module in plain torch; counts the calls of its passes."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: Ranks = ONE_RANK,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.module = module
        self.num_forwards = self.num_clamped = 0
        self._reference = copy.deepcopy(module).requires_grad_(False)
        self._optimizer = optimizer
        self._ranks = ranks
        self._max_grad_norm = max_grad_norm

    @property
    def cost(self) -> PassCost:
        return PassCost(per_token=1)

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> TokenStatistics:
        self.num_forwards += 1
        self.num_clamped += clamp_p is not None
        return read_statistics(
            self.module,
            micro_batch,
            temperature=temperature,
            clamp_p=clamp_p,
            with_mean_pull=with_mean_pull,
        )

    def reference_logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
        return read_statistics(self._reference, micro_batch, temperature=temperature).logprob

    def accumulate(self, loss: Tensor, *, is_last: bool) -> None:
        torch.autograd.backward([loss])

    def step(self) -> OptimizerStep:
        weights = list(self.module.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if self._ranks.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
        norm = float(nn.utils.clip_grad_norm_(weights, self._max_grad_norm))
        is_applied = norm == norm and norm < float("inf")
        rate = float(self._optimizer.param_groups[0]["lr"])
        if is_applied:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return OptimizerStep(norm, rate, is_applied)


class RecordingTrainer(Trainer):
    """Keeps what each step knew of its tokens; the rows' hashes tell which they were."""

    def __init__(self, config: RunConfig, model: PlainModel, ranks: Ranks = ONE_RANK) -> None:
        super().__init__(config, model, ranks)
        self.plain = model
        self.records: list[TokenRecord] = []
        self.uid_hashes: list[Tensor] = []

    def _record(self, state: Any, *measured: Any) -> TokenRecord:
        record = super()._record(state, *measured)
        self.records.append(record)
        self.uid_hashes.append(state.batch.uid_hashes)
        return record


def make_trainer(
    config: RunConfig, *, ranks: Ranks = ONE_RANK, sgd: float | None = None
) -> RecordingTrainer:
    """A bigram model with AdamW at the run's learning rate, or with plain gradient descent."""
    module = Bigram()
    weights = list(module.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        weights, lr=config.learner.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    if sgd is not None:
        optimizer = torch.optim.SGD(weights, lr=sgd)
    bound = config.learner.max_grad_norm if sgd is None else 1e9
    return RecordingTrainer(
        config, PlainModel(module, optimizer, ranks=ranks, max_grad_norm=bound), ranks
    )


def train_steps(
    trainer: RecordingTrainer, batches: Sequence[list[ScoredGroup]], *, first_step: int = 1
) -> list[StepReport]:
    return [
        trainer.train(groups, step=step, policy_version=step - 1)
        for step, groups in enumerate(batches, start=first_step)
    ]


def weights_of(trainer: RecordingTrainer) -> Tensor:
    """All weights in one vector."""
    return torch.cat([each.detach().flatten() for each in trainer.plain.module.parameters()])
