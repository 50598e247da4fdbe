"""Gradients of the fused head: from those of its statistics to hidden states and weight.

Every tile of logits becomes the gradient of the logits in place, and then two products. With x a
logit less the highest of its row, the gradients of log-prob, entropy and clamped entropy are all
of the form e^x (b x + a), the last on the tokens that the clamp keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from shared.rl.head_product import HeadProduct
from shared.rl.tile_work import Slopes, TileWork


class HeadRows(NamedTuple):
    """What the backward pass must know of each token's logits, [T, 1] each.

    `log_total` and `log_kept` are logarithms of sums of e^(z - peak): over all tokens, and over
    those that the clamp keeps.
    """

    peak: Tensor
    log_total: Tensor
    entropy: Tensor
    log_kept: Tensor
    clamped_entropy: Tensor
    cut_value: Tensor
    cut_column: Tensor


def _slopes(
    rows: HeadRows, grads: Sequence[Tensor | None], temperature: float
) -> tuple[Slopes, Tensor | None]:
    """From the gradients of log-prob, entropy and clamped entropy, to that of the product.

    Returns:
        with what the target's logit has besides, [T, 1], if anything.
    """
    logprob, entropy, clamped = (
        grad.double().unsqueeze(-1) / temperature if _is_there(grad) else None for grad in grads
    )
    wide = rows.peak.dtype
    offset = torch.zeros_like(rows.log_total)
    bend = kept = None
    if logprob is not None:
        offset = -logprob * (-rows.log_total).exp()
    if entropy is not None:
        bend = -entropy * (-rows.log_total).exp()
        offset = offset + bend * (rows.entropy - rows.log_total)
        bend = bend.to(wide)
    if clamped is not None:
        kept_bend = -clamped * (-rows.log_kept).exp()
        kept_offset = kept_bend * (rows.clamped_entropy - rows.log_kept)
        kept = torch.cat([kept_bend, kept_offset], -1).to(wide)
    return Slopes(offset.to(wide), bend, kept), None if logprob is None else logprob.to(wide)


def _is_there(grad: Tensor | None) -> TypeGuard[Tensor]:
    return grad is not None and bool(grad.any())


class _Chunk(NamedTuple):
    """Some tokens; `logits` are there of the last chunk only."""

    tokens: slice
    targets: Tensor
    rows: HeadRows
    slopes: Slopes
    of_target: Tensor | None
    has_ties: bool
    logits: Tensor | None


def head_gradients(
    product: HeadProduct,
    targets: Tensor,
    rows: HeadRows,
    grads: Sequence[Tensor | None],
    *,
    last_logits: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden and weight.

    Args:
        grads: of log-prob, entropy and clamped entropy, [T] each.
        last_logits: of the last of the product's chunks.
        needs_grad: of hidden and weight; None stands for the gradient of the other.
    """
    slopes, of_target = _slopes(rows, grads, product.temperature)
    chunks = [
        _chunk(
            targets,
            rows,
            slopes,
            of_target,
            tokens,
            last_logits if place == len(product.chunks) else None,
        )
        for place, tokens in enumerate(product.chunks, start=1)
    ]
    hidden, wide = product.hidden, product.wide
    grad_hidden = torch.empty_like(hidden, dtype=wide) if needs_grad[0] else None
    grad_weight = torch.empty_like(product.weight) if needs_grad[1] else None
    work = product.work()
    for block in product.blocks:
        block_weight = product.block_weight(block)
        total = _total(grad_weight, block, wide)
        for chunk in chunks:
            tile = _tile_gradient(product, block, block_weight, chunk, work)
            if grad_hidden is not None:
                part = grad_hidden[chunk.tokens]
                _accumulate(part, tile, block_weight, is_first=block.start == 0)
            if total is not None:
                part = hidden[chunk.tokens]
                _accumulate(total, tile.T, part, is_first=chunk is chunks[0])
        if grad_weight is not None and total is not None and total.dtype != grad_weight.dtype:
            grad_weight[block] = total
    return grad_hidden, grad_weight


def _chunk(
    targets: Tensor,
    rows: HeadRows,
    slopes: Slopes,
    of_target: Tensor | None,
    tokens: slice,
    logits: Tensor | None,
) -> _Chunk:
    mine = HeadRows(*(each[tokens] for each in rows))
    return _Chunk(
        tokens=tokens,
        targets=targets[tokens].unsqueeze(-1),
        rows=mine,
        slopes=slopes.at(tokens),
        of_target=None if of_target is None else of_target[tokens],
        has_ties=bool((mine.cut_column >= 0).any()),
        logits=logits,
    )


def _total(grad_weight: Tensor | None, block: slice, wide: torch.dtype) -> Tensor | None:
    """Where a block of the weight's gradient is summed: in place, if its type is wide."""
    if grad_weight is None or grad_weight.dtype == wide:
        return grad_weight if grad_weight is None else grad_weight[block]
    return torch.empty_like(grad_weight[block], dtype=wide)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Add a product to `total`, whose type is wide."""
    # A partial sum that is rounded to bfloat16 biases the whole; elsewhere than on a CPU a
    # product in float32 costs too much.
    dtype = total.dtype if total.device.type == "cpu" else right.dtype
    left, right = left.to(dtype), right.to(dtype)
    if total.dtype == dtype:
        total.addmm_(left, right, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _tile_gradient(
    product: HeadProduct, block: slice, block_weight: Tensor, chunk: _Chunk, work: TileWork
) -> Tensor:
    """Of a tile of products."""
    if chunk.logits is None:
        room = work.room("x", len(chunk.targets), len(block_weight))
        logits = product.write(room, chunk.tokens, block_weight)
    else:
        logits = chunk.logits[:, block]
    mask = None if chunk.slopes.kept is None else _kept(logits, block, chunk, work)
    gradient = work.gradient(logits, chunk.rows.peak, chunk.slopes, mask)
    if chunk.of_target is not None:
        column = chunk.targets - block.start
        is_here = (column >= 0) & (column < len(block_weight))
        gradient.scatter_add_(-1, column.clamp(0, len(block_weight) - 1), chunk.of_target * is_here)
    return gradient


def _kept(logits: Tensor, block: slice, chunk: _Chunk, work: TileWork) -> Tensor:
    """1 where the clamp keeps the token, 0 elsewhere."""
    value, column = chunk.rows.cut_value, chunk.rows.cut_column
    kept = torch.ge(logits, value, out=work.room("mask", *logits.shape))
    if chunk.has_ties:
        columns = torch.arange(block.start, block.stop, device=logits.device).to(logits.dtype)
        tied = torch.eq(logits, value, out=work.room("line", *logits.shape))
        is_removed = torch.le(columns, column.to(logits.dtype), out=work.room("exp", *logits.shape))
        kept.sub_(tied.mul_(is_removed))
    return kept
