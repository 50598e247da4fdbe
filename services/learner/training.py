"""One training step, from scored groups to moved weights and measured quantities.

1. Measure: a pass without gradient over the batch gives proximal log-probs and entropies.
2. For each optimiser mini-batch: select tokens over all ranks, accumulate the gradient of its
   micro-batches, take the optimiser step.
3. Share the values per token, let the entropy controller move, report.

Every rank runs this with the same groups, works on its own micro-batches, and knows at the end
what was measured on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from services.learner.batch import (
    Batch,
    MicroBatch,
    Plan,
    build_batch,
    collate,
    plan_micro_batches,
    selection_keys,
)
from services.learner.measures import StepReport, TokenRecord, Update, step_report
from services.learner.objective import Loss, Objective, TokenInputs, Totals
from services.learner.ranks import Ranks
from shared.config import RunConfig
from shared.records import ScoredGroup
from shared.rl.entropy import TokenStatistics
from shared.rl.entropy_control import AEntController

WHOLE = ("logprob", "entropy")
"""The fields of TokenStatistics that are there without a clamp."""


class OptimizerStep(NamedTuple):
    """The gradient's norm before clipping, and whether the weights moved."""

    grad_norm: float
    learning_rate: float
    is_applied: bool


class TrainedModel(Protocol):
    """The policy and its optimiser; `services.learner.engine` has the one on DeepSpeed."""

    def forward(
        self, micro_batch: MicroBatch, *, temperature: float, clamp_p: float | None
    ) -> TokenStatistics:
        """Statistics of the tokens, [N] each."""

    def accumulate(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a loss whose sum over ranks and calls is minimised."""

    def step(self) -> OptimizerStep:
        """Move the weights along what was accumulated, unless it is not finite."""


class TokenTable:
    """Named matrices [R, C]; each rank fills the rows it has, `share` makes them whole."""

    def __init__(self, names: Sequence[str], shape: torch.Size, ranks: Ranks) -> None:
        """All zeros."""
        self._names = tuple(names)
        self._values = torch.zeros(len(names), *shape, device=ranks.device)
        self._ranks = ranks

    def put(self, name: str, micro_batch: MicroBatch, values: Tensor) -> None:
        """The values [N] of a micro-batch's tokens."""
        spread = micro_batch.spread(values.detach().float())
        matrix = self._values[self._names.index(name)]
        matrix[list(micro_batch.rows), : spread.shape[1]] = spread

    def share(self) -> dict[str, Tensor]:
        """The matrices of all ranks; exact, because every value is added to zeros."""
        self._ranks.sum_in_place(self._values)
        return dict(zip(self._names, self._values, strict=True))


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way; `micro_batches` are this rank's, by mini-batch."""

    batch: Batch
    plans: tuple[Plan, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    inputs: TokenInputs
    table: TokenTable


class Trainer:
    """Takes training steps; keeps the entropy controller."""

    def __init__(self, config: RunConfig, model: TrainedModel, ranks: Ranks) -> None:
        """Nothing moves yet."""
        self._config = config
        self._model = model
        self._ranks = ranks
        self._temperature = config.rollout.temperature
        self._objective = Objective(config.policy_loss, config.entropy, config.off_policy)
        self.controller = _controller(config)

    def train(self, groups: Sequence[ScoredGroup], *, step: int, policy_version: int) -> StepReport:
        """As `LearnerEngine.train`, on every rank."""
        batch = build_batch(
            groups,
            self._config.advantage,
            num_minibatches=self._config.learner.optimizer_steps_per_batch,
            policy_version=policy_version,
        )
        if not batch.rows:
            return step_report(batch, None, [], self._config.policy_loss)
        plans = tuple(self._plan(batch, rows) for rows in batch.minibatches)
        micro_batches = tuple(self._mine(batch, plan) for plan in plans)
        before = self._measure_all(batch, micro_batches)
        state = _Step(
            batch=batch,
            plans=plans,
            micro_batches=micro_batches,
            inputs=self._inputs(batch, before["logprob"], step),
            table=TokenTable(("target", "selected", "clamped"), batch.mask.shape, self._ranks),
        )
        updates = [self._update(state, number) for number in range(len(plans))]
        during = state.table.share()
        record = self._record(state, before, during)
        self._control(during["clamped"], state.inputs.mask)
        return step_report(batch, record, updates, self._config.policy_loss)

    def _plan(self, batch: Batch, rows: Sequence[int]) -> Plan:
        return plan_micro_batches(
            batch,
            rows,
            num_ranks=self._ranks.world_size,
            micro_batch_tokens=self._config.learner.micro_batch_tokens,
        )

    def _mine(self, batch: Batch, plan: Plan) -> tuple[MicroBatch, ...]:
        mine = plan[self._ranks.rank]
        return tuple(collate(batch, rows).to(self._ranks.device) for rows in mine)

    def _inputs(self, batch: Batch, proximal_logprobs: Tensor, step: int) -> TokenInputs:
        device = self._ranks.device
        keys = selection_keys(batch, seed=self._config.run.seed, step=step)
        return TokenInputs(
            mask=batch.mask.to(device),
            advantages=batch.advantages.to(device),
            behaviour_logprobs=batch.behaviour_logprobs.to(device),
            proximal_logprobs=proximal_logprobs,
            keys=keys.to(device),
        )

    def _measure(
        self,
        shape: torch.Size,
        micro_batches: Iterable[MicroBatch],
        *,
        temperature: float,
        clamp_p: float | None = None,
    ) -> dict[str, Tensor]:
        """Statistics of the current weights, [R, C] each, of all ranks, without gradient."""
        names = WHOLE if clamp_p is None else TokenStatistics._fields
        table = TokenTable(names, shape, self._ranks)
        with torch.no_grad():
            for micro_batch in micro_batches:
                statistics = self._model.forward(
                    micro_batch, temperature=temperature, clamp_p=clamp_p
                )
                if micro_batch.rows:
                    for name in names:
                        table.put(name, micro_batch, getattr(statistics, name))
        return table.share()

    def _measure_all(
        self, batch: Batch, micro_batches: Sequence[Sequence[MicroBatch]]
    ) -> dict[str, Tensor]:
        """Statistics before the update, and `natural_entropy`, that at temperature 1.

        In the micro-batches of the training passes, so that on policy the ratio is exactly 1.
        """
        every = [each for minibatch in micro_batches for each in minibatch]
        clamp_p = self._objective.clamp_p
        shape, temperature = batch.mask.shape, self._temperature
        measured = self._measure(shape, every, temperature=temperature, clamp_p=clamp_p)
        natural = measured
        if temperature != 1.0:
            natural = self._measure(shape, every, temperature=1.0)
        return {**measured, "natural_entropy": natural["entropy"]}

    def _update(self, state: _Step, number: int) -> Update:
        """One optimiser mini-batch: select, accumulate over micro-batches and ranks, step."""
        chosen = self._select(state, number)
        totals = Totals.of(state.inputs.mask[list(state.batch.minibatches[number])])
        sums = torch.zeros(3, dtype=torch.float64, device=self._ranks.device)
        micro_batches = state.micro_batches[number]
        for place, micro_batch in enumerate(micro_batches, start=1):
            loss = self._micro_loss(state, micro_batch, chosen, totals, sums)
            self._model.accumulate(loss, is_last=place == len(micro_batches))
        self._ranks.sum_in_place(sums)
        policy_loss, entropy_loss, num_broken = sums.tolist()
        taken = self._model.step()
        has_term = self._objective.has_entropy_term
        return Update(
            policy_loss=policy_loss if num_broken == 0 else math.nan,
            entropy_loss=entropy_loss if has_term else None,
            entropy_coefficient=self._coefficient() if has_term else None,
            grad_norm=taken.grad_norm,
            learning_rate=taken.learning_rate,
            has_finite_loss=num_broken == 0,
            is_applied=taken.is_applied,
        )

    def _select(self, state: _Step, number: int) -> Tensor | None:
        """[R, C] bool, within the mini-batch; None where micro-batches select by themselves.

        The first mini-batch meets the weights that were measured before; for the others they
        have moved, and are measured again.
        """
        if not self._objective.selects_globally:
            return None
        rows, mask = list(state.batch.minibatches[number]), state.inputs.mask
        logprobs = state.inputs.proximal_logprobs
        if number > 0:
            micro_batches = state.micro_batches[number]
            measured = self._measure(mask.shape, micro_batches, temperature=self._temperature)
            logprobs = measured["logprob"]
        chosen = torch.zeros_like(mask)
        inputs = state.inputs.rows(rows, mask.shape[1])
        chosen[rows] = self._objective.select(logprobs[rows], inputs)
        return chosen

    def _micro_loss(
        self,
        state: _Step,
        micro_batch: MicroBatch,
        chosen: Tensor | None,
        totals: Totals,
        sums: Tensor,
    ) -> Tensor:
        """The micro-batch's share of the loss; adds to sums (policy, entropy, broken).

        A loss that is not finite is replaced by one whose every gradient is NaN: whatever the
        ZeRO stage, and on whichever rank it was, the step is then refused on all of them.
        """
        statistics = self._model.forward(
            micro_batch, temperature=self._temperature, clamp_p=self._objective.clamp_p
        )
        if not micro_batch.rows:
            return self._objective.stand_in(statistics, 0.0)
        loss = self._loss(state, micro_batch, statistics, chosen, totals)
        if not bool(loss.total.isfinite()):
            sums[2] += 1
            return self._objective.stand_in(statistics, math.nan)
        sums[0] += loss.policy
        if loss.entropy is not None:
            sums[1] += loss.entropy
        return loss.total

    def _loss(
        self,
        state: _Step,
        micro_batch: MicroBatch,
        statistics: TokenStatistics,
        chosen: Tensor | None,
        totals: Totals,
    ) -> Loss:
        """The objective on a micro-batch; what the training pass saw goes to the table."""
        rows, width = list(micro_batch.rows), micro_batch.mask.shape[1]
        inputs = state.inputs.rows(rows, width)
        spread = _spread(micro_batch, statistics)
        selected = None if chosen is None else chosen[rows, :width]
        if self._objective.selects and selected is None:
            selected = self._objective.select(spread.logprob, inputs)
        if selected is not None:
            state.table.put("selected", micro_batch, selected[micro_batch.mask])
        state.table.put("target", micro_batch, statistics.logprob)
        if statistics.clamped_entropy is not None:
            state.table.put("clamped", micro_batch, statistics.clamped_entropy)
        return self._objective.loss(
            spread, inputs, selected, totals=totals, coefficient=self._coefficient()
        )

    def _coefficient(self) -> float:
        if self.controller is None:
            return self._config.entropy.entropy_coeff
        return self.controller.coefficient

    def _control(self, clamped_entropy: Tensor, mask: Tensor) -> None:
        """Show the controller the clamped entropy of all tokens of the step."""
        if self.controller is None:
            return
        entropy = float(clamped_entropy[mask].double().mean())
        if math.isfinite(entropy):
            self.controller.update(entropy)

    def _quota(self, state: _Step) -> int:
        """Tokens that the selections of a step, on all ranks, may select together."""
        if not self._objective.selects:
            return 0
        scopes: list[Sequence[int]] = list(state.batch.minibatches)
        if not self._objective.selects_globally:
            scopes = [rows for plan in state.plans for mine in plan for rows in mine if rows]
        mask = state.batch.mask
        return sum(self._objective.quota(int(mask[list(rows)].sum())) for rows in scopes)

    def _record(
        self, state: _Step, before: dict[str, Tensor], during: dict[str, Tensor]
    ) -> TokenRecord:
        objective, inputs = self._objective, state.inputs
        clipped = objective.clipped(during["target"], inputs) if objective.is_clipped else None
        return TokenRecord(
            mask=inputs.mask,
            advantages=inputs.advantages,
            behaviour_logprobs=inputs.behaviour_logprobs,
            entropy=before["natural_entropy"],
            proximal_logprobs=inputs.proximal_logprobs,
            target_logprobs=during["target"],
            clamped_entropy=before.get("clamped_entropy"),
            removed_mass=before.get("removed_mass"),
            weights=objective.weights(inputs) if objective.is_weighted else None,
            clipped=clipped,
            selected=during["selected"].bool() if objective.selects else None,
            quota=self._quota(state),
        )


def _spread(micro_batch: MicroBatch, statistics: TokenStatistics) -> TokenStatistics:
    """[N] to [B, C] each."""
    logprob, entropy, clamped, removed = statistics
    return TokenStatistics(
        logprob=micro_batch.spread(logprob),
        entropy=micro_batch.spread(entropy),
        clamped_entropy=None if clamped is None else micro_batch.spread(clamped),
        removed_mass=None if removed is None else micro_batch.spread(removed),
    )


def _controller(config: RunConfig) -> AEntController | None:
    if config.entropy.method != "aent":
        return None
    band = config.adaptive_entropy
    return AEntController(
        initial=config.entropy.entropy_coeff,
        step_size=band.entropy_coeff_lr,
        entropy_low=band.entropy_low,
        entropy_high=band.entropy_high,
        coefficient_min=band.clip_low,
        coefficient_max=band.clip_high,
        warmup_steps=band.warmup,
    )
