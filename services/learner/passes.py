"""What the trainer asks of the model, and the passes over a batch that only measure.

Each rank passes over its own micro-batches; what comes back is whole, [R, C], on all of them, for
the tokens of a mask [R, C] on the training device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from services.learner.balance import PassCost
from services.learner.batch import MicroBatch
from services.learner.ranks import Ranks
from shared.rl.entropy import TokenStatistics


class OptimizerStep(NamedTuple):
    """The gradient's norm before clipping, and whether the weights moved."""

    grad_norm: float
    learning_rate: float
    is_applied: bool


class TrainedModel(Protocol):
    """The policy and its optimiser; `services.learner.zero` has the one on DeepSpeed."""

    @property
    def cost(self) -> PassCost:
        """Of a pass, by which micro-batches are balanced; the same on every rank."""

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> TokenStatistics:
        """Statistics of the tokens, [N] each."""

    def reference_logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
        """Log-probs [N] of the tokens under the frozen reference model, without gradient."""

    def accumulate(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a loss whose sum over ranks and calls is minimised."""

    def step(self) -> OptimizerStep:
        """Move the weights along what was accumulated, unless it is not finite."""


class TokenTable:
    """Named values of every token of a batch; each rank fills its rows, `share` makes them whole.

    Until then they lie one after another, so that neither memory nor what ranks exchange grows
    with the longest completion.
    """

    def __init__(self, names: Sequence[str], mask: Tensor, ranks: Ranks) -> None:
        """All zeros; mask [R, C] is True on the batch's tokens."""
        lengths = mask.sum(-1)
        self._names = tuple(names)
        self._mask = mask
        self._starts = lengths.cumsum(0) - lengths
        self._values = torch.zeros(len(names), int(lengths.sum()), device=ranks.device)
        self._ranks = ranks

    def put(self, micro_batch: MicroBatch, values: Mapping[str, Tensor]) -> None:
        """By name, the values [N] of a micro-batch's tokens."""
        row, column = micro_batch.mask.nonzero(as_tuple=True)
        places = self._starts[list(micro_batch.rows)][row] + column
        for name, each in values.items():
            self._values[self._names.index(name), places] = each.detach().float()

    def share(self) -> dict[str, Tensor]:
        """Those of all ranks, [N] in the mask's order; exact, because each is added to zeros."""
        self._ranks.sum_in_place(self._values)
        return dict(zip(self._names, self._values, strict=True))


def as_matrix(values: Tensor, mask: Tensor) -> Tensor:
    """[N] to [R, C], 0 outside mask."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class Passes:
    """Passes without gradient over micro-batches, at the training temperature unless named."""

    def __init__(self, model: TrainedModel, ranks: Ranks, *, temperature: float) -> None:
        """As `TrainedModel.forward` takes them."""
        self._model = model
        self._ranks = ranks
        self._temperature = temperature

    def before(
        self, micro_batches: Sequence[MicroBatch], mask: Tensor, *, with_mean_pull: bool
    ) -> dict[str, Tensor]:
        """Statistics of the weights before an update, and `natural_entropy`, at temperature 1.

        Not the clamped entropy: it is dear, and the training passes have it anyway.

        Give it the micro-batches of the training passes: on policy the ratio is then exactly 1.
        """
        names = ["logprob", "entropy", *(["mean_pull"] if with_mean_pull else [])]
        measured = self.statistics(names, micro_batches, mask)
        natural = measured
        if self._temperature != 1.0:
            natural = self.statistics(["entropy"], micro_batches, mask, temperature=1.0)
        return {**measured, "natural_entropy": natural["entropy"]}

    def statistics(
        self,
        names: Sequence[str],
        micro_batches: Iterable[MicroBatch],
        mask: Tensor,
        *,
        temperature: float | None = None,
        known: TokenStatistics | None = None,
    ) -> dict[str, Tensor]:
        """The named fields of TokenStatistics under the current weights.

        Args:
            known: of the only micro-batch, where a training pass has been made already.
        """

        def measure(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
            statistics = known or self._model.forward(
                micro_batch,
                temperature=temperature or self._temperature,
                with_mean_pull="mean_pull" in names,
            )
            return statistics._asdict()

        return self._share(names, micro_batches, mask, measure)

    def reference_logprobs(self, micro_batches: Iterable[MicroBatch], mask: Tensor) -> Tensor:
        """Of the frozen reference model."""

        def measure(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
            logprobs = self._model.reference_logprobs(micro_batch, temperature=self._temperature)
            return {"logprob": logprobs}

        return self._share(["logprob"], micro_batches, mask, measure)["logprob"]

    def _share(
        self,
        names: Sequence[str],
        micro_batches: Iterable[MicroBatch],
        mask: Tensor,
        measure: Callable[[MicroBatch], dict[str, Tensor | None]],
    ) -> dict[str, Tensor]:
        table = TokenTable(names, mask, self._ranks)
        with torch.no_grad():
            for micro_batch in micro_batches:
                values = measure(micro_batch)
                if micro_batch.rows:
                    table.put(micro_batch, {name: _measured(values, name) for name in names})
        return {name: as_matrix(each, mask) for name, each in table.share().items()}


def _measured(values: Mapping[str, Tensor | None], name: str) -> Tensor:
    value = values[name]
    assert value is not None, f"{name} was not measured"
    return value
