"""What the trainer asks of the model, and the passes over a batch that only measure.

Each rank passes over its own micro-batches; what comes back is whole, [R, C], on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


class Passes:
    """Passes without gradient over micro-batches, at the training temperature unless named."""

    def __init__(self, model: TrainedModel, ranks: Ranks, *, temperature: float) -> None:
        """As `TrainedModel.forward` takes them."""
        self._model = model
        self._ranks = ranks
        self._temperature = temperature

    def before(
        self, micro_batches: Sequence[MicroBatch], shape: torch.Size, *, with_mean_pull: bool
    ) -> dict[str, Tensor]:
        """Statistics of the weights before an update, and `natural_entropy`, at temperature 1.

        Not the clamped entropy: it is dear, and the training passes have it anyway.

        Give it the micro-batches of the training passes: on policy the ratio is then exactly 1.
        """
        names = ["logprob", "entropy", *(["mean_pull"] if with_mean_pull else [])]
        measured = self.statistics(names, micro_batches, shape)
        natural = measured
        if self._temperature != 1.0:
            natural = self.statistics(["entropy"], micro_batches, shape, temperature=1.0)
        return {**measured, "natural_entropy": natural["entropy"]}

    def statistics(
        self,
        names: Sequence[str],
        micro_batches: Iterable[MicroBatch],
        shape: torch.Size,
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

        return self._share(names, micro_batches, shape, measure)

    def reference_logprobs(self, micro_batches: Iterable[MicroBatch], shape: torch.Size) -> Tensor:
        """Of the frozen reference model."""

        def measure(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
            logprobs = self._model.reference_logprobs(micro_batch, temperature=self._temperature)
            return {"logprob": logprobs}

        return self._share(["logprob"], micro_batches, shape, measure)["logprob"]

    def _share(
        self,
        names: Sequence[str],
        micro_batches: Iterable[MicroBatch],
        shape: torch.Size,
        measure: Callable[[MicroBatch], dict[str, Tensor | None]],
    ) -> dict[str, Tensor]:
        table = TokenTable(names, shape, self._ranks)
        with torch.no_grad():
            for micro_batch in micro_batches:
                values = measure(micro_batch)
                if micro_batch.rows:
                    for name in names:
                        value = values[name]
                        assert value is not None, f"{name} was not measured"
                        table.put(name, micro_batch, value)
        return table.share()
