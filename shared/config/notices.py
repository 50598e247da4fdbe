"""What is allowed in a run file and still worth a line before the run starts."""

from __future__ import annotations

from collections.abc import Iterator

from shared.config.algorithm import SELECTING_MODES
from shared.config.run import RunConfig
from shared.config.section import spelled

_LARGE_GSPO_CLIP = 0.05

_READ_BY = {
    "clip_ratio_low": ("vanilla", "clip_cov", "gspo", "cispo"),
    "clip_ratio_high": ("vanilla", "clip_cov", "gspo", "cispo"),
    "clip_ratio_c": ("vanilla",),
    "clip_cov_ratio": ("clip_cov",),
    "clip_cov_lb": ("clip_cov",),
    "clip_cov_ub": ("clip_cov",),
    "kl_cov_ratio": ("kl_cov",),
    "ppo_kl_coef": ("kl_cov",),
    "kl_cov_penalty": ("kl_cov",),
    "scope": SELECTING_MODES,
    "allow_large_ratio": SELECTING_MODES,
}
"""Loss modes that read a key. Recipes carry the keys of several, so an idle one is no error."""


def notices(config: RunConfig) -> tuple[str, ...]:
    """One line for each choice that is allowed and easily meant otherwise."""
    return tuple(_loss(config)) + tuple(_one_step(config)) + tuple(_reference(config))


def _loss(config: RunConfig) -> Iterator[str]:
    loss, given = config.policy_loss, config.policy_loss.model_fields_set
    for key, modes in _READ_BY.items():
        if key in given and loss.loss_mode not in modes:
            value = spelled(getattr(loss, key))
            yield f'policy_loss.{key} = {value}: has no effect with loss_mode = "{loss.loss_mode}"'
    if loss.loss_mode == "clip_cov":
        for key in ("clip_ratio_low", "clip_ratio_high"):
            if getattr(loss, key) < 1:
                yield (
                    f"policy_loss.{key} = {getattr(loss, key)}: Clip-Cov's authors ran 1 for"
                    " clip_ratio_low and clip_ratio_high (and 10 for clip_ratio_c, unused)"
                )
        advantage = config.advantage
        if advantage.estimator != "grpo" or not advantage.normalise_std:
            yield (
                f"policy_loss.clip_cov_lb = {loss.clip_cov_lb}, clip_cov_ub = {loss.clip_cov_ub}:"
                " the authors' bounds are for advantages divided by their standard deviation"
            )
    if loss.loss_mode == "kl_cov" and "ppo_kl_coef" not in given:
        yield f"policy_loss.ppo_kl_coef = {loss.ppo_kl_coef}: not set; verl's file has 0.1"
    if loss.loss_mode == "gspo":
        for key, paper in (("clip_ratio_low", "0.0003"), ("clip_ratio_high", "0.0004")):
            if getattr(loss, key) > _LARGE_GSPO_CLIP:
                yield (
                    f"policy_loss.{key} = {getattr(loss, key)}: hardly ever binds on a completion's"
                    f" ratio; GSPO's authors ran {paper}"
                )


def _one_step(config: RunConfig) -> Iterator[str]:
    """What compares the weights with those at the batch's start needs a second step."""
    loss, steps = config.policy_loss, config.learner.optimizer_steps_per_batch
    if steps > 1 or config.off_policy.proximal != "exact":
        return
    if loss.loss_mode == "kl_cov":
        idle = "KL-Cov's penalty"
    elif loss.entropy_ratio_clip_low is not None:
        idle = "entropy-ratio clipping"
    else:
        return
    yield (
        f"learner.optimizer_steps_per_batch = {steps}: {idle} has no effect on the first step of a"
        " batch, and there is no other"
    )


def _reference(config: RunConfig) -> Iterator[str]:
    reference = config.reference_kl
    chosen = f'reference_kl.estimator = "{reference.estimator}"'
    if reference.coef == 0 and "estimator" in reference.model_fields_set:
        yield f"{chosen}: has no effect with coef = 0"
    if reference.coef > 0 and reference.estimator == "k1":
        yield f"{chosen}: its gradient is noise around 0 on-policy; use k2 or k3"
