"""Entropy of the next-token distribution: whole, clamped, and how an update will change it.

Logits are [..., V] with the temperature already divided in, unless a function takes it. Results
drop the last axis and are in nats, in float32 or wider. A logit of -inf is a token that cannot
occur: probability 0, gradient 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.rl.fused_head import head_statistics
from shared.rl.head_product import HeadOptions
from shared.rl.shapes import check_same_shape
from shared.rl.smallest import exact_cut


class TokenStatistics(NamedTuple):
    """What the loss and the metrics need of each position's distribution; each [T]."""

    logprob: Tensor
    entropy: Tensor
    clamped_entropy: Tensor | None
    """None unless a clamp_p was given."""
    removed_mass: Tensor | None
    """None unless a clamp_p was given; carries no gradient."""
    mean_pull: Tensor | None = None
    """sum over v of p_v^2 (log p_v + H), for `entropy_influence`; None unless it was asked for,
    and without a gradient."""


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy over the full vocabulary.

    H = -sum over v of p_v log p_v,    dH/dz_v = -p_v (log p_v + H)
    """
    return _entropy(_log_softmax(logits))


def clamped_entropy(logits: Tensor, *, clamp_p: float) -> tuple[Tensor, Tensor]:
    """Entropy of the distribution without its int(V * clamp_p) smallest logits.

        H~ = -sum over kept v of q_v log q_v,    q = softmax over the kept logits

    AEnt (https://arxiv.org/abs/2509.03493): as a bonus it does not push up the tail of the
    vocabulary, because the gradient of a removed logit is exactly 0. clamp_p is a share of the
    vocabulary's count, not of its probability. Of equal logits, those of lower index are
    removed first.

    Args:
        logits: [..., V]; V counts padding, and padding of -inf is removed first.
        clamp_p: in [0, 1), with V - int(V * clamp_p) >= 2.
    Returns:
        (clamped entropy, probability of the removed tokens); the second has no gradient.
    Raises:
        ValueError: clamp_p is out of range, or keeps fewer than two tokens.
    """
    num_removed = _num_removed(logits.shape[-1], clamp_p)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    removed = exact_cut(rows, num_removed).removed(rows).view_as(logits)
    wide = _at_least_float32(logits)
    with torch.no_grad():
        tail = wide.masked_fill(~removed, -torch.inf).logsumexp(-1)
        removed_mass = (tail - wide.logsumexp(-1)).exp()
    return entropy_from_logits(wide.masked_fill(removed, -torch.inf)), removed_mass


def fused_logprob_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    clamp_p: float | None = None,
    chunk: int,
    with_mean_pull: bool = False,
    product_dtype: torch.dtype | None = None,
    is_compiled: bool | None = None,
) -> TokenStatistics:
    """Log-probability of the targets and entropies, without ever holding the [T, V] logits.

        z = hidden head_weight^T / temperature,    logprob = z_target - logsumexp(z)

    Logits exist for `chunk` tokens at a time: chunk * V of them from the forward pass to the end
    of the backward pass, which computes the others again. Log-prob, entropy and clamped entropy
    have gradients, to hidden and to head_weight, but no second ones.

    Args:
        hidden: [T, D]. head_weight: [V, D], same dtype. targets: [T] int64 in [0, V), also
            where a mask will later hide the token.
        temperature: > 0, that of the sampler.
        clamp_p: as in clamped_entropy; None leaves the clamped entropy out.
        chunk: tokens at a time, >= 1; changes memory, not results.
        with_mean_pull: for the diagnostics of a step.
        product_dtype: of the products with head_weight, that of hidden if None; everything after
            them is float32 or wider.
        is_compiled: by kernels that torch compiles; None, everywhere but on a CPU.
    Raises:
        ValueError: the shapes disagree, or a number is out of range.
    """
    _check_head_shapes(hidden, head_weight, targets)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    options = HeadOptions(
        temperature=temperature,
        num_removed=None if clamp_p is None else _num_removed(head_weight.shape[0], clamp_p),
        chunk=chunk,
        with_mean_pull=with_mean_pull,
        product=product_dtype or hidden.dtype,
        is_compiled=hidden.device.type != "cpu" if is_compiled is None else is_compiled,
    )
    logprob, entropy, clamped, removed_mass, mean_pull = head_statistics(
        hidden, head_weight, targets, options
    )
    return TokenStatistics(
        logprob,
        entropy,
        clamped if clamp_p is not None else None,
        removed_mass if clamp_p is not None else None,
        mean_pull if with_mean_pull else None,
    )


def predicted_entropy_change_policy_gradient(
    logits: Tensor, advantages: Tensor, *, learning_rate: float
) -> Tensor:
    """First-order change of the entropy by one exact policy-gradient step.

        dH = -learning_rate * Cov over a ~ p of (log p_a, p_a (A_a - E_p[A]))

    Theorem 1 of https://arxiv.org/abs/2505.22617, for a softmax over free logits. Without the
    centring, which the gradient does by itself, the covariance is a different number.

    Args:
        logits, advantages: [..., V], one value per action.
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(logits=logits, advantages=advantages)
    log_probs = _log_softmax(logits)
    probs = log_probs.exp()
    centred = advantages - (probs * advantages).sum(-1, keepdim=True)
    return -learning_rate * _policy_covariance(log_probs, probs * centred)


def predicted_entropy_change_natural_gradient(
    logits: Tensor, advantages: Tensor, *, learning_rate: float
) -> Tensor:
    """First-order change of the entropy by one natural-policy-gradient step.

        dH = -learning_rate * Cov over a ~ p of (log p_a, A_a)

    Theorem 2 of https://arxiv.org/abs/2505.22617; a constant added to A changes nothing.

    Args:
        logits, advantages: [..., V], one value per action.
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(logits=logits, advantages=advantages)
    return -learning_rate * _policy_covariance(_log_softmax(logits), advantages)


def predicted_entropy_change_sampled(
    logits: Tensor, actions: Tensor, advantages: Tensor, *, learning_rate: float
) -> Tensor:
    """First-order change of the entropy by the sampled gradient A * grad log p_a.

        dH = -learning_rate * A * (p_a (log p_a + H) - sum over v of p_v^2 (log p_v + H))

    Unlike the token covariance it is exact to first order for a softmax over free logits. Where
    a step averages over several samples of one position, so does the change. No gradient.

    Args:
        logits: [..., V]. actions: [...] int64, the sampled ones. advantages: [...].
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(actions=actions, advantages=advantages, positions=logits[..., 0])
    log_probs = _log_softmax(logits)
    logprob = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    entropy = _entropy(log_probs)
    pull = _mean_pull(log_probs, entropy)
    return learning_rate * entropy_influence(logprob, entropy, pull, advantages)


def entropy_influence(
    logprobs: Tensor, entropy: Tensor, mean_pull: Tensor, advantages: Tensor
) -> Tensor:
    """First-order change of the entropy per unit of learning rate, from token quantities alone.

        -A * (p (log p + H) - sum over v of p_v^2 (log p_v + H)),    p = exp(logprob)

    `predicted_entropy_change_sampled` where the logits are gone: likely and good tokens are
    below 0, rare and good ones above it. No gradient.

    Args:
        logprobs, entropy, mean_pull: [...], of the sampled token and its position, as
            `fused_logprob_entropy` gives them. advantages: [...].
    Raises:
        ValueError: the shapes disagree.
    """
    check_same_shape(logprobs=logprobs, entropy=entropy, mean_pull=mean_pull, advantages=advantages)
    pull = _pull(logprobs.detach(), entropy.detach())
    return -advantages.detach() * (pull - mean_pull.detach())


def _check_head_shapes(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            "need hidden [T, D] and head_weight [V, D], got "
            f"{tuple(hidden.shape)} and {tuple(head_weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need a target per token, got {tuple(targets.shape)} for {len(hidden)}")


def _num_removed(vocabulary: int, clamp_p: float) -> int:
    if not 0 <= clamp_p < 1:
        raise ValueError(f"clamp_p is a share of the vocabulary, in [0, 1), got {clamp_p}")
    num_removed = int(vocabulary * clamp_p)
    if vocabulary - num_removed < 2:
        raise ValueError(
            f"clamp_p {clamp_p} keeps {vocabulary - num_removed} of {vocabulary} tokens; "
            "an entropy needs two"
        )
    return num_removed


def _policy_covariance(log_probs: Tensor, values: Tensor) -> Tensor:
    """Cov over a ~ p of (log p_a, values_a)."""
    probs = log_probs.exp()
    centred = values - (probs * values).sum(-1, keepdim=True)
    return (probs * log_probs.masked_fill(probs == 0, 0.0) * centred).sum(-1)


@torch.no_grad()
def _mean_pull(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """sum over v of p_v^2 (log p_v + H): what the policy's average token pulls at the entropy."""
    return (log_probs.exp() * _pull(log_probs, entropy.unsqueeze(-1))).sum(-1)


def _pull(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """p (log p + H): minus the derivative of the entropy by the logit; 0 where p is 0."""
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return log_probs.exp() * (finite + entropy)


def _entropy(log_probs: Tensor) -> Tensor:
    # 0 log 0 = 0: with -inf left in, the product is NaN, and so is its gradient.
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * finite).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return _at_least_float32(logits).log_softmax(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
