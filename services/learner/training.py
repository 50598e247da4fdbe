"""One training step, from scored groups to moved weights and measured quantities.

1. Measure: a pass without gradient over the batch gives proximal log-probs and entropies, and
   one of the reference model its log-probs where the loss needs them. Micro-batches are packed
   in a thread beside it, the next ones while it passes over the first.
2. For each optimiser mini-batch: choose tokens over all ranks, accumulate the gradient of its
   micro-batches, take the optimiser step.
3. Share the values per token, let the entropy controller move, report. Now and then measure once
   more, to compare the entropy's change with the predicted one.

Every rank runs this with the same rows, works on its own micro-batches, whose tokens it has, and
knows at the end what was measured on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from services.learner.advantages import shape_advantages
from services.learner.ahead import made_ahead
from services.learner.balance import Plan, rows_by_rank
from services.learner.batch import (
    Batch,
    MicroBatch,
    build_batch,
    collate,
    plan_micro_batches,
    selection_keys,
)
from services.learner.coefficient import EntropyCoefficient
from services.learner.diagnostics import TokenRecord
from services.learner.loss_modes import TokenInputs
from services.learner.measures import StepReport, Update, step_report
from services.learner.objective import Choice, Loss, Objective, Totals
from services.learner.passes import Passes, TokenTable, TrainedModel
from services.learner.ranks import Ranks
from shared.config import RunConfig
from shared.records import ScoredGroup
from shared.rl.entropy import TokenStatistics

DURING = ("target", "entropy", "clamped_entropy", "removed_mass", "selected", "kept")
"""What a step's table holds of the weights that each token's gradient was taken at."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way; `micro_batches` are this rank's, by mini-batch."""

    number: int
    batch: Batch
    plans: tuple[Plan, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    inputs: TokenInputs
    table: TokenTable


class Trainer:
    """Takes training steps; keeps the entropy coefficient."""

    def __init__(self, config: RunConfig, model: TrainedModel, ranks: Ranks) -> None:
        """Nothing moves yet."""
        self._config = config
        self._model = model
        self._ranks = ranks
        self._temperature = config.rollout.temperature
        self._objective = Objective(config)
        self._passes = Passes(model, ranks, temperature=self._temperature)
        self.coefficient = EntropyCoefficient(config)

    def train(self, groups: Sequence[ScoredGroup], *, step: int, policy_version: int) -> StepReport:
        """As `LearnerEngine.train`, on every rank with the same groups."""
        batch = build_batch(groups, self._config, policy_version=policy_version)
        return self.train_batch(batch, step=step)

    def shares(self, batch: Batch) -> list[list[int]]:
        """The rows that each rank passes over, ascending."""
        plans = [self._plan(batch, rows) for rows in batch.minibatches]
        return rows_by_rank(plans, self._ranks.world_size)

    def train_batch(self, batch: Batch, *, step: int) -> StepReport:
        """The step on every rank, each with at least its share's tokens.

        Returns:
            what was measured, where the batch is whole; elsewhere nothing.
        """
        if not batch.rows:
            return self._report(batch, None, [])
        plans = tuple(self._plan(batch, rows) for rows in batch.minibatches)
        mine = [rows for plan in plans for rows in plan[self._ranks.rank]]
        compares = self._compares_entropy(step)
        with made_ahead(partial(self._collate, batch), mine, name="packing") as every:
            before = self._passes.before(every, batch.mask.shape, with_mean_pull=compares)
        ends = accumulate((len(plan[self._ranks.rank]) for plan in plans), initial=0)
        state = _Step(
            number=step,
            batch=batch,
            plans=plans,
            micro_batches=tuple(tuple(every[start:end]) for start, end in pairwise(ends)),
            inputs=self._inputs(batch, every, before, step),
            table=TokenTable(DURING, batch.mask.shape, self._ranks),
        )
        updates = [self._update(state, number) for number in range(len(plans))]
        during = state.table.share()
        after = None
        if compares:
            after = self._passes.statistics(["entropy"], every, batch.mask.shape)["entropy"]
        record = self._record(state, before, during, after)
        self._control(during, state.inputs.mask)
        return self._report(batch, record, updates)

    def _report(
        self, batch: Batch, record: TokenRecord | None, updates: Sequence[Update]
    ) -> StepReport:
        if not batch.groups:
            return StepReport({}, {}, {})
        return step_report(batch, record, updates, self._config.policy_loss)

    def _plan(self, batch: Batch, rows: Sequence[int]) -> Plan:
        return plan_micro_batches(
            batch,
            rows,
            num_ranks=self._ranks.world_size,
            micro_batch_tokens=self._config.learner.micro_batch_tokens,
            cost=self._model.cost,
        )

    def _collate(self, batch: Batch, rows: Sequence[int]) -> MicroBatch:
        return collate(batch, rows).to(self._ranks.device)

    def _inputs(
        self,
        batch: Batch,
        micro_batches: Sequence[MicroBatch],
        before: dict[str, Tensor],
        step: int,
    ) -> TokenInputs:
        device = self._ranks.device
        mask, logprobs = batch.mask.to(device), before["logprob"]
        advantages = shape_advantages(
            batch.advantages.to(device),
            mask,
            logprobs,
            [row.group for row in batch.rows],
            config=self._config.advantage,
        )
        reference = None
        if self._objective.has_reference:
            reference = self._passes.reference_logprobs(micro_batches, mask.shape)
        sampled = self._sampled(batch, micro_batches)
        return TokenInputs(
            mask=mask,
            advantages=advantages,
            behaviour_logprobs=sampled["behaviour"],
            proximal_logprobs=logprobs,
            proximal_entropy=before["entropy"],
            staleness=sampled["staleness"].long(),
            keys=self._keys(batch, step),
            reference_logprobs=reference,
        )

    def _keys(self, batch: Batch, step: int) -> Tensor | None:
        if not self._objective.selects:
            return None
        return selection_keys(batch, seed=self._config.run.seed, step=step).to(self._ranks.device)

    def _sampled(self, batch: Batch, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Whole on every rank, [R, C], from what each has of its own rows."""
        device = self._ranks.device
        held = {
            "behaviour": batch.behaviour_logprobs.to(device),
            "staleness": batch.staleness.to(device),
        }
        if self._ranks.world_size == 1:
            return held
        table = TokenTable(tuple(held), batch.mask.shape, self._ranks)
        for micro_batch in micro_batches:
            if micro_batch.rows:
                rows, width = list(micro_batch.rows), micro_batch.mask.shape[1]
                for name, values in held.items():
                    table.put(name, micro_batch, values[rows, :width][micro_batch.mask])
        return table.share()

    def _compares_entropy(self, step: int) -> bool:
        every = self._config.diagnostics.entropy_change_every_steps
        return every > 0 and step % every == 0

    def _update(self, state: _Step, number: int) -> Update:
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
            entropy_coefficient=self.coefficient.at(state.number) if has_term else None,
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

    def _forward_early(self, state: _Step, number: int) -> TokenStatistics | None:
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

    def _choose(self, state: _Step, number: int, first: TokenStatistics | None) -> Choice | None:
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
                ["logprob", "entropy"], state.micro_batches[number], mask.shape, known=first
            )
            logprobs, entropy = measured["logprob"][rows], measured["entropy"][rows]
        choice = self._objective.choose(logprobs, entropy, inputs)
        return Choice(*(None if each is None else _placed(each, rows, mask) for each in choice))

    def _micro_loss(
        self,
        state: _Step,
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
        state: _Step,
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
        seen = {
            "target": spread.logprob,
            "entropy": spread.entropy,
            "clamped_entropy": spread.clamped_entropy,
            "removed_mass": spread.removed_mass,
            "selected": mine.selected,
            "kept": mine.kept,
        }
        for name, values in seen.items():
            if values is not None:
                state.table.put(name, micro_batch, values[micro_batch.mask])
        return self._objective.loss(
            spread, inputs, mine, totals=totals, coefficient=self.coefficient.at(state.number)
        )

    def _control(self, during: dict[str, Tensor], mask: Tensor) -> None:
        """Show the controller the entropies of all tokens of the step."""
        entropy, clamped = (
            float(during[name][mask].double().mean()) for name in ("entropy", "clamped_entropy")
        )
        self.coefficient.observe(entropy=entropy, clamped_entropy=clamped)

    def _quota(self, state: _Step) -> int:
        """Tokens that the selections of a step, on all ranks, may select together."""
        if not self._objective.selects:
            return 0
        scopes: list[Sequence[int]] = list(state.batch.minibatches)
        if not self._objective.chooses_globally:
            scopes = [rows for plan in state.plans for mine in plan for rows in mine if rows]
        mask = state.batch.mask
        return sum(self._objective.quota(int(mask[list(rows)].sum())) for rows in scopes)

    def _record(
        self,
        state: _Step,
        before: dict[str, Tensor],
        during: dict[str, Tensor],
        entropy_after: Tensor | None,
    ) -> TokenRecord:
        objective, target = self._objective, during["target"]
        inputs = objective.anchored(target, state.inputs)
        is_clamped = objective.clamp_p is not None
        ratio_kept = None
        if objective.clips_entropy_ratio:
            ratio_kept = objective.entropy_ratio_kept(during["entropy"], inputs)
        return TokenRecord(
            mask=inputs.mask,
            advantages=inputs.advantages,
            behaviour_logprobs=inputs.behaviour_logprobs,
            entropy=before["natural_entropy"],
            measured_logprobs=before["logprob"],
            proximal_logprobs=inputs.proximal_logprobs,
            target_logprobs=target,
            entropy_before=before["entropy"],
            entropy_after=entropy_after,
            mean_pull=before.get("mean_pull"),
            clamped_entropy=during["clamped_entropy"] if is_clamped else None,
            removed_mass=during["removed_mass"] if is_clamped else None,
            reference_logprobs=inputs.reference_logprobs,
            weights=objective.weights(inputs) if objective.is_weighted else None,
            clipped=objective.clipped(target, inputs) if objective.is_clipped else None,
            selected=during["selected"].bool() if objective.selects else None,
            kept=during["kept"].bool() if objective.keeps_top else None,
            entropy_ratio_kept=ratio_kept,
            quota=self._quota(state),
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
