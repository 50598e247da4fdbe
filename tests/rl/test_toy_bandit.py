"""The methods do what they are for: in a contextual bandit they keep entropy (T23, short form).

64 states, 30 arms of which 5 are good, 8 samples a state, 4 epochs a rollout. Each method is
compared with the same surrogate without its selection; PPO's clip alone keeps entropy too, so
another control would measure the clip.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.rl.advantage import group_relative
from shared.rl.covariance import select_clip_cov, select_kl_cov, token_covariance, token_keys
from shared.rl.entropy import entropy_from_logits
from shared.rl.loss import aggregate, clip_cov_surrogate, kl_cov_surrogate, ppo_clipped

NUM_STATES, NUM_ARMS, GROUP_SIZE, NUM_EPOCHS, NUM_ROLLOUTS = 64, 30, 8, 4, 60
SEEDS = range(8)
EVERYWHERE = torch.ones(NUM_STATES, GROUP_SIZE, dtype=torch.bool)
UIDS = torch.arange(NUM_STATES * GROUP_SIZE).view(NUM_STATES, GROUP_SIZE)

Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def final_entropies(surrogate: Surrogate) -> list[float]:
    return [final_entropy(surrogate, seed) for seed in SEEDS]


def final_entropy(surrogate: Surrogate, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    is_good = torch.rand(NUM_STATES, NUM_ARMS, generator=generator).argsort(-1) < 5
    logits = torch.zeros(NUM_STATES, NUM_ARMS, requires_grad=True)
    for step in range(NUM_ROLLOUTS):
        log_probs = logits.detach().log_softmax(-1)
        arms = torch.multinomial(log_probs.exp(), GROUP_SIZE, True, generator=generator)
        advantages = group_relative(is_good.gather(1, arms).float(), normalise_std=True)
        old = log_probs.gather(1, arms)
        for epoch in range(NUM_EPOCHS):
            logprobs = logits.log_softmax(-1).gather(1, arms)
            keys = token_keys(seed, step, epoch, UIDS, torch.zeros_like(UIDS))
            losses = surrogate(logprobs, old, advantages, keys)
            # A learning rate of 1 on the sum over states of the mean over their samples.
            loss = aggregate(losses, EVERYWHERE, mode="token-mean", denominator=GROUP_SIZE)
            (grad,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                logits -= grad
    return float(entropy_from_logits(logits.detach()).mean())


def clip_cov(ratio: float) -> Surrogate:
    def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, keys: Tensor) -> Tensor:
        low, high = ppo_clipped(logprobs, old, advantages, EVERYWHERE, clip_low=1.0, clip_high=1.0)
        selected = select_clip_cov(
            token_covariance(logprobs, advantages, EVERYWHERE),
            EVERYWHERE,
            ratio=ratio,
            lower=1.0,
            upper=5.0,
            excluded=low | high,
            keys=keys,
            floor_one=False,
        )
        return clip_cov_surrogate(
            logprobs, old, advantages, selected=selected, clip_low=1.0, clip_high=1.0
        )

    return surrogate


def kl_cov(ratio: float, kl_coef: float) -> Surrogate:
    def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, keys: Tensor) -> Tensor:
        covariance = token_covariance(logprobs, advantages, EVERYWHERE)
        selected = select_kl_cov(covariance, EVERYWHERE, ratio=ratio, keys=keys)
        return kl_cov_surrogate(
            logprobs, old, advantages, selected=selected, kl_coef=kl_coef, penalty="abs"
        )

    return surrogate


def num_raised(treated: list[float], control: list[float]) -> int:
    return sum(t > c for t, c in zip(treated, control, strict=True))


def test_clip_cov_keeps_more_entropy_than_the_same_clip_without_it() -> None:
    assert num_raised(final_entropies(clip_cov(0.2)), final_entropies(clip_cov(0.0))) >= 7


def test_kl_cov_keeps_more_entropy_the_more_tokens_and_the_more_weight() -> None:
    control = final_entropies(kl_cov(0.1, 0.0))
    arms = {arm: final_entropies(kl_cov(*arm)) for arm in ((0.1, 1.0), (0.3, 1.0), (0.1, 5.0))}
    assert num_raised(arms[0.1, 1.0], control) >= 7
    assert num_raised(arms[0.3, 1.0], arms[0.1, 1.0]) >= 7
    assert num_raised(arms[0.1, 5.0], arms[0.1, 1.0]) >= 7
