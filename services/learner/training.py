"""One training step, from scored groups to moved weights and measured quantities.

1. Measure: a pass without gradient over the batch gives proximal log-probs and entropies, and
   one of the reference model its log-probs where the loss needs them. Micro-batches are packed
   in a thread beside it, the next ones while it passes over the first.
2. For each optimiser mini-batch (`services.learner.minibatch`): choose tokens over all ranks,
   accumulate the gradient of its micro-batches, take the optimiser step.
3. Share the values per token, let the entropy controller move, report. Now and then measure once
   more, to compare the entropy's change with the predicted one.

Every rank runs this with the same rows, works on its own micro-batches, whose tokens it has, and
knows at the end what was measured on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

from torch import Tensor

from services.learner.advantages import shape_advantages
from services.learner.ahead import made_ahead
from services.learner.balance import Plan
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
from services.learner.minibatch import Minibatches, StepState, seen_names
from services.learner.objective import Objective
from services.learner.passes import Passes, TokenTable, TrainedModel, as_matrix
from services.learner.ranks import Ranks
from shared.config import RunConfig
from shared.records import ScoredGroup


class Trainer:
    """Takes training steps; keeps the entropy coefficient."""

    def __init__(self, config: RunConfig, model: TrainedModel, ranks: Ranks) -> None:
        """Nothing moves yet."""
        self._config = config
        self._model = model
        self._ranks = ranks
        self._objective = Objective(config)
        self._passes = Passes(model, ranks, temperature=config.rollout.temperature)
        self.coefficient = EntropyCoefficient(config)
        self._minibatches = Minibatches(
            config, model, ranks, self._objective, self._passes, self.coefficient
        )

    def train(self, groups: Sequence[ScoredGroup], *, step: int, policy_version: int) -> StepReport:
        """As `LearnerEngine.train`, on every rank with the same groups."""
        batch = build_batch(groups, self._config, policy_version=policy_version)
        return self.train_batch(batch, self.plan(batch), step=step)

    def plan(self, batch: Batch) -> tuple[Plan, ...]:
        """Who passes over what, by mini-batch; the same on every rank, in any thread."""
        return tuple(
            plan_micro_batches(
                batch,
                rows,
                num_ranks=self._ranks.world_size,
                micro_batch_tokens=self._config.learner.micro_batch_tokens,
                cost=self._model.cost,
            )
            for rows in batch.minibatches
        )

    def train_batch(self, batch: Batch, plans: tuple[Plan, ...], *, step: int) -> StepReport:
        """The step on every rank, each with at least the tokens of its rows.

        Returns:
            what was measured, where the batch is whole; elsewhere nothing.
        """
        if not batch.rows:
            return self._report(batch, None, [])
        mine = [rows for plan in plans for rows in plan[self._ranks.rank]]
        compares, mask = self._compares_entropy(step), batch.mask.to(self._ranks.device)
        with made_ahead(partial(self._collate, batch), mine, name="packing") as every:
            before = self._passes.before(every, mask, with_mean_pull=compares)
        ends = accumulate((len(plan[self._ranks.rank]) for plan in plans), initial=0)
        state = StepState(
            number=step,
            batch=batch,
            plans=plans,
            micro_batches=tuple(tuple(every[start:end]) for start, end in pairwise(ends)),
            inputs=self._inputs(batch, mask, every, before, step),
            table=TokenTable(seen_names(self._objective), mask, self._ranks),
        )
        updates = [self._minibatches.update(state, number) for number in range(len(plans))]
        during = state.table.share()
        after = None
        if compares:
            after = self._passes.statistics(["entropy"], every, mask)["entropy"]
        self._control(during)
        record = self._record(state, before, during, after) if batch.groups else None
        return self._report(batch, record, updates)

    def _report(
        self, batch: Batch, record: TokenRecord | None, updates: Sequence[Update]
    ) -> StepReport:
        if not batch.groups:
            return StepReport({}, {}, {})
        return step_report(batch, record, updates, self._config.policy_loss)

    def _collate(self, batch: Batch, rows: Sequence[int]) -> MicroBatch:
        return collate(batch, rows).to(self._ranks.device)

    def _inputs(
        self,
        batch: Batch,
        mask: Tensor,
        micro_batches: Sequence[MicroBatch],
        before: dict[str, Tensor],
        step: int,
    ) -> TokenInputs:
        logprobs = before["logprob"]
        advantages = shape_advantages(
            batch.advantages.to(self._ranks.device),
            mask,
            logprobs,
            [row.group for row in batch.rows],
            config=self._config.advantage,
        )
        reference = None
        if self._objective.has_reference:
            reference = self._passes.reference_logprobs(micro_batches, mask)
        sampled = self._sampled(batch, mask, micro_batches)
        return TokenInputs(
            mask=mask,
            advantages=advantages,
            behaviour_logprobs=sampled["behaviour"],
            proximal_logprobs=logprobs,
            proximal_entropy=before["entropy"],
            staleness=sampled["staleness"].int(),
            keys=self._keys(batch, step),
            reference_logprobs=reference,
        )

    def _keys(self, batch: Batch, step: int) -> Tensor | None:
        if not self._objective.selects:
            return None
        return selection_keys(batch, seed=self._config.run.seed, step=step).to(self._ranks.device)

    def _sampled(
        self, batch: Batch, mask: Tensor, micro_batches: Sequence[MicroBatch]
    ) -> dict[str, Tensor]:
        """Whole on every rank, [R, C], from what each has of its own rows."""
        device = self._ranks.device
        held = {
            "behaviour": batch.behaviour_logprobs.to(device),
            "staleness": batch.staleness.to(device),
        }
        if self._ranks.world_size == 1:
            return held
        table = TokenTable(tuple(held), mask, self._ranks)
        for micro_batch in micro_batches:
            rows, width = list(micro_batch.rows), micro_batch.mask.shape[1]
            if rows:
                mine = {
                    name: values[rows, :width][micro_batch.mask] for name, values in held.items()
                }
                table.put(micro_batch, mine)
        return {name: as_matrix(each, mask) for name, each in table.share().items()}

    def _compares_entropy(self, step: int) -> bool:
        every = self._config.diagnostics.entropy_change_every_steps
        return every > 0 and step % every == 0

    def _control(self, during: Mapping[str, Tensor]) -> None:
        """Show the controller the entropies of all tokens of the step."""
        entropy, clamped = (
            float(during[name].double().mean()) if name in during else math.nan
            for name in ("entropy", "clamped_entropy")
        )
        self.coefficient.observe(entropy=entropy, clamped_entropy=clamped)

    def _quota(self, state: StepState) -> int:
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
        state: StepState,
        before: dict[str, Tensor],
        flat: Mapping[str, Tensor],
        entropy_after: Tensor | None,
    ) -> TokenRecord:
        during = {name: as_matrix(each, state.inputs.mask) for name, each in flat.items()}
        objective, target = self._objective, during["target"]
        inputs = objective.anchored(target, state.inputs)
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
            clamped_entropy=during.get("clamped_entropy"),
            removed_mass=during.get("removed_mass"),
            reference_logprobs=inputs.reference_logprobs,
            weights=objective.weights(inputs) if objective.is_weighted else None,
            clipped=objective.clipped(target, inputs) if objective.is_clipped else None,
            selected=during["selected"].bool() if objective.selects else None,
            kept=during["kept"].bool() if objective.keeps_top else None,
            entropy_ratio_kept=ratio_kept,
            quota=self._quota(state),
        )
