"""The output embedding and the statistics of its logits in one, forward and backward.

Logits exist for one chunk of tokens at a time, [C, V]. The backward pass computes them again,
tile by tile, [C, B], except those of the last chunk, which are still there; beside them a handful
of numbers a token is kept. A tile is the same product in both passes, so that its logits have the
same bits, and the clamp keeps the same tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.rl.head_gradient import HeadRows, head_gradients
from shared.rl.head_product import HeadOptions, HeadProduct
from shared.rl.smallest import SAMPLE_STRIDE
from shared.rl.softmax_sums import LogitRows, RowSums, row_sums


class HeadStatistics(NamedTuple):
    """Of each token, [T]; empty where they were not asked for."""

    logprob: Tensor
    entropy: Tensor
    clamped_entropy: Tensor
    removed_mass: Tensor
    mean_pull: Tensor


def head_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions
) -> HeadStatistics:
    """From hidden [T, D], weight [V, D] and targets [T]; the first three have gradients to both."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return HeadStatistics(*_FusedHead.apply(hidden, weight, targets, options))  # type: ignore[no-untyped-call]
    return _forward(HeadProduct(hidden, weight, options), targets, options)[0]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions
    ) -> HeadStatistics:
        statistics, rows, logits = _forward(HeadProduct(hidden, weight, options), targets, options)
        ctx.options = options
        ctx.save_for_backward(hidden, weight, targets, logits, *rows)
        ctx.mark_non_differentiable(statistics.removed_mass, statistics.mean_pull)
        ctx.set_materialize_grads(False)
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logits, *rows = ctx.saved_tensors
        grad_hidden, grad_weight = head_gradients(
            HeadProduct(hidden, weight, ctx.options),
            targets,
            HeadRows(*rows),
            grads[:3],
            last_logits=logits,
            needs_grad=ctx.needs_input_grad[:2],
        )
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None


def _forward(
    product: HeadProduct, targets: Tensor, options: HeadOptions
) -> tuple[HeadStatistics, HeadRows, Tensor]:
    """Also what the backward pass must know, and the logits of the last chunk."""
    logits, scratch = product.new_logits(), product.scratch()
    parts = []
    for chunk in product.chunks:
        rows = _fill(product, chunk, logits[: chunk.stop - chunk.start])
        sums, part = row_sums(
            rows,
            num_removed=options.num_removed or 0,
            with_squares=options.with_mean_pull,
            scratch=scratch,
        )
        centred = rows.values.gather(-1, targets[chunk].unsqueeze(-1)).double() - rows.peak
        parts.append((*_moments(sums, centred), rows.peak, *part))
    joined = [torch.cat(each) for each in zip(*parts, strict=True)]
    logprob, log_total, entropy, log_kept, clamped, removed_mass, pull, peak, *cut = joined
    if options.num_removed is None:
        clamped, removed_mass = clamped[:0], removed_mass[:0]
    if not options.with_mean_pull:
        pull = pull[:0]
    asked = (logprob, entropy, clamped, removed_mass, pull)
    statistics = HeadStatistics(*(each.squeeze(-1).to(product.wide) for each in asked))
    return statistics, HeadRows(peak, log_total, entropy, log_kept, clamped, *cut), logits


def _fill(product: HeadProduct, chunk: slice, logits: Tensor) -> LogitRows:
    """Write the logits of a chunk."""
    vocabulary = len(product.weight)
    peak = logits.new_full((len(logits), 1), -torch.inf)
    sample = logits.new_empty(len(logits), -(-vocabulary // SAMPLE_STRIDE))
    for block in product.blocks:
        tile = product.write(logits[:, block], chunk, product.block_weight(block))
        peak = torch.maximum(peak, tile.amax(-1, keepdim=True))
        part = tile[:, ::SAMPLE_STRIDE]
        first = block.start // SAMPLE_STRIDE
        sample[:, first : first + part.shape[1]] = part
    return LogitRows(logits, vocabulary, peak, sample, product.blocks)


def _moments(sums: RowSums, centred: Tensor) -> tuple[Tensor, ...]:
    """(logprob, log_total, entropy, log_kept, clamped entropy, removed mass, mean pull).

    `centred` is the target's logit less the highest.
    """
    log_total = sums.total.log()
    entropy = log_total - sums.centred / sums.total
    kept = sums.total - sums.removed
    log_kept = kept.log()
    clamped = log_kept - (sums.centred - sums.removed_centred) / kept
    # p^2 (log p + H) = (e^2x x + e^2x (H - log_total)) / total^2
    pull = (sums.centred_squares + sums.squares * (entropy - log_total)) / sums.total**2
    removed_mass = sums.removed / sums.total
    return centred - log_total, log_total, entropy, log_kept, clamped, removed_mass, pull
