"""The output embedding and the statistics of its logits in one, forward and backward.

Logits exist tile by tile, [C, B], and are summed as they come. Those of a whole chunk of tokens,
[C, V], exist for two reasons: a clamp must have seen all of a token's logits to know which it
removes; and the last chunk's are there still when the backward pass begins, which computes the
others again. Beside them a handful of numbers a token is kept. A tile is the same product in both
passes, so that its logits have the same bits, and the clamp keeps the same tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.rl.head_gradient import HeadRows, head_gradients
from shared.rl.head_product import HeadOptions, HeadProduct
from shared.rl.smallest import no_cut
from shared.rl.softmax_sums import LogitRows, RunningSums, removed_sums
from shared.rl.tile_work import TileWork


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
    product = HeadProduct(hidden, weight, options)
    return _forward(product, targets, options, keeps_last=False)[0]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions
    ) -> HeadStatistics:
        product = HeadProduct(hidden, weight, options)
        statistics, rows, logits = _forward(product, targets, options, keeps_last=True)
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
    product: HeadProduct, targets: Tensor, options: HeadOptions, *, keeps_last: bool
) -> tuple[HeadStatistics, HeadRows, Tensor | None]:
    """Also what the backward pass must know, and if it `keeps_last` the last chunk's logits."""
    matrix = product.new_logits() if keeps_last or options.num_removed else None
    work = product.work()
    parts = []
    for place, chunk in enumerate(product.chunks, start=1):
        is_last = place == len(product.chunks)
        logits = matrix if options.num_removed or is_last else None
        parts.append(_of_chunk(product, chunk, targets[chunk], options, logits, work))
    joined = [torch.cat(each) for each in zip(*parts, strict=True)]
    logprob, log_total, entropy, log_kept, clamped, removed_mass, pull, peak, *cut = joined
    if options.num_removed is None:
        clamped, removed_mass = clamped[:0], removed_mass[:0]
    if not options.with_mean_pull:
        pull = pull[:0]
    asked = (logprob, entropy, clamped, removed_mass, pull)
    statistics = HeadStatistics(*(each.squeeze(-1).to(product.wide) for each in asked))
    rows = HeadRows(peak, log_total, entropy, log_kept, clamped, *cut)
    return statistics, rows, matrix if keeps_last else None


def _of_chunk(
    product: HeadProduct,
    chunk: slice,
    targets: Tensor,
    options: HeadOptions,
    matrix: Tensor | None,
    work: TileWork,
) -> tuple[Tensor, ...]:
    """`_moments`, peak and cut of its tokens; their logits are written to `matrix`, if any."""
    num_rows = chunk.stop - chunk.start
    logits = None if matrix is None else matrix[:num_rows]
    sums = RunningSums(product.column(num_rows), with_squares=options.with_mean_pull)
    target = product.column(num_rows)
    for block in product.blocks:
        width = block.stop - block.start
        out = work.room("x", num_rows, width) if logits is None else logits[:, block]
        tile = product.write(out, chunk, product.block_weight(block))
        column = targets.unsqueeze(-1) - block.start
        is_here = (column >= 0) & (column < width)
        target = torch.where(is_here, tile.gather(-1, column.clamp(0, width - 1)), target)
        sums.add(tile, work)
    removed, cut = sums.total.new_zeros(2, num_rows, 1), no_cut(sums.peak)
    if options.num_removed and logits is not None:
        rows = LogitRows(logits, len(product.weight), sums.peak, product.blocks)
        removed, cut = removed_sums(rows, options.num_removed, work)
    return *_moments(sums, removed, target.double() - sums.peak), sums.peak, *cut


def _moments(sums: RunningSums, removed: Tensor, centred: Tensor) -> tuple[Tensor, ...]:
    """(logprob, log_total, entropy, log_kept, clamped entropy, removed mass, mean pull).

    `removed` are the sums over what the clamp removes; `centred` is the target's logit less the
    highest.
    """
    log_total = sums.total.log()
    entropy = log_total - sums.centred / sums.total
    kept = sums.total - removed[0]
    log_kept = kept.log()
    clamped = log_kept - (sums.centred - removed[1]) / kept
    # p^2 (log p + H) = (e^2x x + e^2x (H - log_total)) / total^2
    pull = (sums.centred_squares + sums.squares * (entropy - log_total)) / sums.total**2
    removed_mass = removed[0] / sums.total
    return centred - log_total, log_total, entropy, log_kept, clamped, removed_mass, pull
