"""One optimiser mini-batch of a training step: tokens chosen, gradient accumulated, weights moved.

A choice is made over the mini-batch of all ranks, or by each micro-batch for itself
(`policy_loss.scope`); either way the same numbers choose whatever the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.balance import Plan
from services.learner.batch import Batch, MicroBatch
from services.learner.coefficient import EntropyCoefficient
from services.learner.loss_modes import TokenInputs
from services.learner.measures import Update
from services.learner.objective import Choice, Loss, Objective, Totals
from services.learner.passes import Passes, TokenTable, TrainedModel
from services.learner.ranks import Ranks
from shared.config import RunConfig
from shared.rl.entropy import TokenStatistics


@dataclass(frozen=True, slots=True)
class StepState:
    """A step under way; `micro_batches` are this rank's, by mini-batch.

    `table` holds what the training passes saw, under the names of `seen_names`.
    """

    number: int
    batch: Batch
    plans: tuple[Plan, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    inputs: TokenInputs
    table: TokenTable


class Minibatches:
    """Takes the mini-batches of a step, one after another."""

    def __init__(
        self,
        config: RunConfig,
        model: TrainedModel,
        ranks: Ranks,
        objective: Objective,
        passes: Passes,
        coefficient: EntropyCoefficient,
    ) -> None:
        """For a trainer, whose parts it is given."""
        self._temperature = config.rollout.temperature
        self._model = model
        self._ranks = ranks
        self._objective = objective
        self._passes = passes
        self._coefficient = coefficient

    def update(self, state: StepState, number: int) -> Update:
        """One optimiser mini-batch: choose, accumulate over micro-batches and ranks, step."""
        first = self._forward_early(state, number)
        choice = self._choose(state, number, first)
        totals = Totals.of(state.inputs.mask[list(state.batch.minibatches[number])])
        sums = torch.zeros(4, dtype=torch.float64, device=self._ranks.device)
        micro_batches = state.micro_batches[number]
        for place, micro_batch in enumerate(micro_batches, start=1):
            statistics = self._forward(micro_batch) if first is None else first
            loss = self._micro_loss(state, micro_batch, statistics, choice, totals, sums)
            self._model.accumulate(loss, is_last=place == len(micro_batches))
        self._ranks.sum_in_place(sums)
        policy_loss, entropy_loss, reference_loss, num_broken = sums.tolist()
        taken = self._model.step()
        has_term = self._objective.has_entropy_term
        return Update(
            policy_loss=policy_loss if num_broken == 0 else math.nan,
            entropy_loss=entropy_loss if has_term else None,
            entropy_coefficient=self._coefficient.at(state.number) if has_term else None,
            reference_loss=reference_loss if self._objective.has_reference else None,
            grad_norm=taken.grad_norm,
            learning_rate=taken.learning_rate,
            has_finite_loss=num_broken == 0,
            is_applied=taken.is_applied,
        )

    def _forward(self, micro_batch: MicroBatch) -> TokenStatistics:
        """The training pass."""
        return self._model.forward(
            micro_batch, temperature=self._temperature, clamp_p=self._objective.clamp_p
        )

    def _forward_early(self, state: StepState, number: int) -> TokenStatistics | None:
        """The training pass before the choice, where that spares a pass of its own.

        A choice over the whole mini-batch by the current weights needs every log-prob before the
        first loss. Where each rank holds its share in one micro-batch, the training pass can
        give them.
        """
        needed = number > 0 and self._chooses_by_new_weights
        micro_batches = state.micro_batches[number]
        return self._forward(micro_batches[0]) if needed and len(micro_batches) == 1 else None

    @property
    def _chooses_by_new_weights(self) -> bool:
        return self._objective.chooses_globally and self._objective.chooses_by_current

    def _choose(
        self, state: StepState, number: int, first: TokenStatistics | None
    ) -> Choice | None:
        """[R, C], within the mini-batch; None where micro-batches choose by themselves.

        The first mini-batch meets the weights that were measured before; for the others they
        have moved, and are measured again.
        """
        if not self._objective.chooses_globally:
            return None
        rows, mask = list(state.batch.minibatches[number]), state.inputs.mask
        inputs = state.inputs.rows(rows, mask.shape[1])
        logprobs, entropy = inputs.proximal_logprobs, inputs.proximal_entropy
        if number > 0 and self._chooses_by_new_weights:
            measured = self._passes.statistics(
                ["logprob", "entropy"], state.micro_batches[number], mask, known=first
            )
            logprobs, entropy = measured["logprob"][rows], measured["entropy"][rows]
        choice = self._objective.choose(logprobs, entropy, inputs)
        return Choice(*(None if each is None else _placed(each, rows, mask) for each in choice))

    def _micro_loss(
        self,
        state: StepState,
        micro_batch: MicroBatch,
        statistics: TokenStatistics,
        choice: Choice | None,
        totals: Totals,
        sums: Tensor,
    ) -> Tensor:
        """The micro-batch's share of the loss; adds to sums (policy, entropy, reference, broken).

        A loss that is not finite is replaced by one whose every gradient is NaN: whatever the
        ZeRO stage, and on whichever rank it was, the step is then refused on all of them.
        """
        if not micro_batch.rows:
            return self._objective.stand_in(statistics, 0.0)
        loss = self._loss(state, micro_batch, statistics, choice, totals)
        if not bool(loss.total.isfinite()):
            sums[3] += 1
            return self._objective.stand_in(statistics, math.nan)
        for place, part in enumerate((loss.policy, loss.entropy, loss.reference)):
            if part is not None:
                sums[place] += part
        return loss.total

    def _loss(
        self,
        state: StepState,
        micro_batch: MicroBatch,
        statistics: TokenStatistics,
        choice: Choice | None,
        totals: Totals,
    ) -> Loss:
        """The objective on a micro-batch; what the training pass saw goes to the table."""
        rows, width = list(micro_batch.rows), micro_batch.mask.shape[1]
        inputs = state.inputs.rows(rows, width)
        spread = _spread(micro_batch, statistics)
        if choice is not None:
            mine = choice.rows(rows, width)
        elif self._objective.chooses_by_current:
            mine = self._objective.choose(spread.logprob, spread.entropy, inputs)
        else:
            mine = self._objective.choose(inputs.proximal_logprobs, inputs.proximal_entropy, inputs)
        state.table.put(micro_batch, _seen(statistics, mine, micro_batch.mask))
        return self._objective.loss(
            spread, inputs, mine, totals=totals, coefficient=self._coefficient.at(state.number)
        )


def _placed(values: Tensor, rows: list[int], mask: Tensor) -> Tensor:
    """The values at these rows of [R, C], False elsewhere."""
    placed = torch.zeros_like(mask)
    placed[rows] = values
    return placed


def _spread(micro_batch: MicroBatch, statistics: TokenStatistics) -> TokenStatistics:
    """[N] to [S, C] each."""
    return TokenStatistics(
        *(None if each is None else micro_batch.spread(each) for each in statistics)  # type: ignore[arg-type]
    )


def _seen(statistics: TokenStatistics, choice: Choice, mask: Tensor) -> dict[str, Tensor]:
    """What a step's table holds of the weights that each token's gradient was taken at, [N] each.

    Args:
        choice: [S, C], as mask.
    """
    every = {
        "target": statistics.logprob,
        "entropy": statistics.entropy,
        "clamped_entropy": statistics.clamped_entropy,
        "removed_mass": statistics.removed_mass,
        "selected": None if choice.selected is None else choice.selected[mask],
        "kept": None if choice.kept is None else choice.kept[mask],
    }
    return {name: values for name, values in every.items() if values is not None}


def seen_names(objective: Objective) -> list[str]:
    """Of what `StepState.table` holds under an objective."""
    clamped = ["clamped_entropy", "removed_mass"] if objective.clamp_p is not None else []
    selected = ["selected"] if objective.selects else []
    return ["target", "entropy", *clamped, *selected, *(["kept"] if objective.keeps_top else [])]
