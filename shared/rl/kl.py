"""The divergence from the frozen reference policy, estimated token by token.

A token's estimate knows no mask and keeps `shared.rl.loss`'s convention: an input that is not
finite gives NaN without a gradient. `aggregate` applies the mask.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from shared.rl.loss import MAX_LOG_RATIO
from shared.rl.shapes import check_same_shape

MAX_K3 = 10.0
"""k3 is cut off here, as in verl: a token that the reference finds e^2.6 times as likely is
already there, and an uncut exp would let one token outweigh a whole batch."""

KLEstimator = Literal["k1", "k2", "k3"]


def reference_kl(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(current || reference), a value per token, in nats.

        x = logp - ref        k1 = x        k2 = x^2 / 2        k3 = min(exp(-x) - 1 + x, 10)

    http://joschu.net/blog/kl-approx.html. Over tokens sampled from the current policy k1 and
    (uncut) k3 have the divergence as their mean. Their gradients, as those of a loss, are other
    things: k1's has mean 0, so that k1 as a loss is noise; k2's is that of KL(current ||
    reference); k3's, 1 - exp(-x), is that of KL(reference || current). At x = 0 only k1 has one.

    As in verl, x is clamped to +-20 inside k3; a token beyond this or the cut of 10 has no
    gradient there. k1 and k2 are not clamped.

    Args:
        logprobs, reference_logprobs: one shape; the gradient reaches logprobs only.
    Raises:
        ValueError: the shapes disagree or estimator is none of the three.
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"estimator must be one of {get_args(KLEstimator)}, got {estimator!r}")
    check_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    reference_logprobs = reference_logprobs.detach()
    defined = logprobs.isfinite() & reference_logprobs.isfinite()
    # Zeros stand in before any arithmetic: the gradient of a NaN masked afterwards is NaN.
    log_ratio = torch.where(defined, logprobs - reference_logprobs, 0.0)
    if estimator == "k1":
        values = log_ratio
    elif estimator == "k2":
        values = log_ratio.square() / 2
    else:
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        values = ((-bounded).expm1() + bounded).clamp(max=MAX_K3)
    return torch.where(defined, values, torch.nan)
