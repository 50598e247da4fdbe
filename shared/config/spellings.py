"""What other projects call our keys: the table that `shared.config.aliases` reads.

Only spellings whose meaning is ours after the conversion stand here. Their sources: verl's YAML
(and the forks of it by PRIME-RL and of AEnt), AReaL's, SkyRL's and NeMo RL's configuration
classes, TRL's `GRPOConfig`, slime's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shared.config.foreign import (
    Alias,
    Switch,
    always,
    bonus,
    both_sides,
    one_of,
    percent,
    two_later,
    without_dual_clip,
)

_PLACES = {
    "ACTOR": ("actor_rollout_ref.actor", "actor"),
    "ROLLOUT": ("actor_rollout_ref.rollout",),
    "POLICY_LOSS": ("actor_rollout_ref.actor.policy_loss", "actor.policy_loss"),
    "AENT": ("actor.aent", "aent"),
    "SKYRL": ("trainer.algorithm", "algorithm"),
}
"""Tables that one key is found in, by the name that the rows below give them."""

_AENT = always("entropy.method", "aent")

VALUES: Mapping[str, Mapping[Any, Any]] = {
    "policy_loss.loss_mode": {"clip-cov": "clip_cov", "kl-cov": "kl_cov"},
    "advantage.estimator": {
        "reinforce++": "reinforce_plus_plus",
        "reinforce++_baseline": "reinforce_plus_plus_baseline",
    },
    "reference_kl.estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
}
"""Foreign spellings of values, by the key of ours that takes them."""

_SAME_MEANING: Mapping[str, str] = {
    "policy_loss.loss_mode": "POLICY_LOSS.loss_mode ACTOR.loss_mode",
    "policy_loss.clip_ratio_low": "ACTOR.clip_ratio_low SKYRL.eps_clip_low"
    " policy_loss.eps_clip_low loss_fn.ratio_clip_min policy_loss.ratio_clip_min",
    "policy_loss.clip_ratio_high": "ACTOR.clip_ratio_high SKYRL.eps_clip_high"
    " policy_loss.eps_clip_high eps_clip_high epsilon_high policy_loss.epsilon_high"
    " ACTOR.eps_clip_higher loss_fn.ratio_clip_max policy_loss.ratio_clip_max",
    "policy_loss.clip_ratio_c": "ACTOR.clip_ratio_c SKYRL.clip_ratio_c ACTOR.c_clip"
    " policy_loss.eps_clip_c delta policy_loss.delta loss_fn.ratio_clip_c",
    "policy_loss.clip_cov_ratio": "POLICY_LOSS.clip_cov_ratio ACTOR.clip_cov_ratio"
    " SKYRL.clip_cov.clip_ratio policy_loss.clip_cov.clip_ratio",
    "policy_loss.clip_cov_lb": "POLICY_LOSS.clip_cov_lb ACTOR.clip_cov_lb"
    " SKYRL.clip_cov.clip_cov_lb policy_loss.clip_cov.clip_cov_lb",
    "policy_loss.clip_cov_ub": "POLICY_LOSS.clip_cov_ub ACTOR.clip_cov_ub"
    " SKYRL.clip_cov.clip_cov_ub policy_loss.clip_cov.clip_cov_ub",
    "policy_loss.kl_cov_ratio": "POLICY_LOSS.kl_cov_ratio SKYRL.kl_cov.kl_cov_frac"
    " policy_loss.kl_cov.kl_cov_frac policy_loss.kl_cov_frac",
    "policy_loss.ppo_kl_coef": "POLICY_LOSS.ppo_kl_coef ACTOR.ppo_kl_coef"
    " SKYRL.kl_cov.ppo_kl_coef policy_loss.kl_cov.ppo_kl_coef",
    "policy_loss.loss_agg_mode": "ACTOR.loss_agg_mode",
    "policy_loss.loss_scale_factor": "ACTOR.loss_scale_factor",
    "policy_loss.top_entropy_quantile": "top_entropy_quantile",
    "advantage.estimator": "algorithm.adv_estimator SKYRL.advantage_estimator"
    " advantage.adv_estimator advantage.advantage_estimator",
    "advantage.normalise_std": "algorithm.norm_adv_by_std_in_grpo SKYRL.grpo_norm_by_std"
    " advantage.norm_adv_by_std_in_grpo",
    "advantage.overlong_buffer_len": "reward_model.overlong_buffer.len SKYRL.overlong_buffer.len",
    "advantage.overlong_penalty_factor": "reward_model.overlong_buffer.penalty_factor"
    " SKYRL.overlong_buffer.penalty_factor",
    "target_entropy.target": "entropy_target target_entropy.entropy_target",
    "target_entropy.delta": "entropy_coef_delta target_entropy.entropy_coef_delta",
    "target_entropy.coeff_min": "entropy_coef_min target_entropy.entropy_coef_min",
    "target_entropy.coeff_max": "entropy_coef_max target_entropy.entropy_coef_max",
    "reference_kl.coef": "ACTOR.kl_loss_coef SKYRL.kl_loss_coef reference_kl.kl_loss_coef"
    " beta reference_kl.beta loss_fn.reference_policy_kl_penalty",
    "reference_kl.estimator": "ACTOR.kl_loss_type SKYRL.kl_estimator_type"
    " reference_kl.kl_loss_type loss_fn.reference_policy_kl_type",
    "off_policy.cap": "algorithm.rollout_correction.rollout_is_threshold"
    " algorithm.rollout_is_threshold off_policy.rollout_is_threshold ACTOR.tis_imp_ratio_cap"
    " SKYRL.tis_imp_ratio_cap off_policy.tis_imp_ratio_cap"
    " SKYRL.off_policy_correction.token_tis_ratio_clip_high",
    "rollout.group_size": "ROLLOUT.n rollout.n num_generations rollout.num_generations"
    " grpo.num_generations_per_prompt generator.n_samples_per_prompt",
    "rollout.temperature": "ROLLOUT.temperature temperature generator.sampling_params.temperature",
    "rollout.max_completion_tokens": "data.max_response_length max_completion_length"
    " rollout.max_completion_length generator.sampling_params.max_generate_length",
    "learner.groups_per_batch": "data.train_batch_size trainer.train_batch_size"
    " grpo.num_prompts_per_step",
    "learner.learning_rate": "ACTOR.optim.lr",
    "learner.activation_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
    "learner.micro_batch_tokens": "ACTOR.ppo_max_token_len_per_gpu",
    "learner.weight_decay": "ACTOR.optim.weight_decay",
    "learner.max_grad_norm": "ACTOR.grad_clip",
    "model.path": "actor_rollout_ref.model.path",
    "run.num_steps": "trainer.total_training_steps",
}
"""Keys that differ from ours in name and place alone."""

_OF_AENT: Mapping[str, str] = {
    "entropy.clamp_p": "ACTOR.clamp_p AENT.entropy_clamp entropy.entropy_clamp",
    "adaptive_entropy.entropy_low": "ACTOR.adaptive_entropy.entropy_low AENT.entropy_low",
    "adaptive_entropy.entropy_high": "ACTOR.adaptive_entropy.entropy_high AENT.entropy_high",
    "adaptive_entropy.entropy_coeff_lr": "ACTOR.adaptive_entropy.entropy_coeff_lr AENT.coeff_lr"
    " adaptive_entropy.coeff_lr",
    "adaptive_entropy.entropy_coeff_reg": "ACTOR.adaptive_entropy.entropy_coeff_reg"
    " adaptive_entropy.reg",
    "adaptive_entropy.clip_low": "ACTOR.adaptive_entropy.entropy_coeff_clip_low"
    " adaptive_entropy.entropy_coeff_clip_low AENT.coeff_box_low adaptive_entropy.coeff_box_low",
    "adaptive_entropy.clip_high": "ACTOR.adaptive_entropy.entropy_coeff_clip_high"
    " adaptive_entropy.entropy_coeff_clip_high AENT.coeff_box_high adaptive_entropy.coeff_box_high",
    "adaptive_entropy.warmup": "ACTOR.adaptive_entropy.entropy_coeff_warmup"
    " adaptive_entropy.entropy_coeff_warmup",
}
"""Keys of AEnt's two releases, which mean AEnt wherever they stand."""

_CONVERTED: tuple[tuple[str, Alias], ...] = (
    (
        "epsilon policy_loss.epsilon eps_clip policy_loss.eps_clip ACTOR.eps_clip",
        Alias("policy_loss.clip_ratio_low", suggests=both_sides),
    ),
    (
        "POLICY_LOSS.k_percent ACTOR.k_percent policy_loss.k_percent",
        Alias("policy_loss.kl_cov_ratio", percent, "percent to fraction"),
    ),
    (
        "SKYRL.policy_loss_type policy_loss.policy_loss_type",
        Alias(
            "policy_loss.loss_mode",
            one_of({"regular": "vanilla", "dual_clip": "vanilla"}),
            implies=without_dual_clip,
        ),
    ),
    (
        "SKYRL.loss_reduction policy_loss.loss_reduction",
        Alias(
            "policy_loss.loss_agg_mode",
            one_of(
                {
                    "token_mean": "token-mean",
                    "sequence_mean": "seq-mean-token-mean",
                    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
                }
            ),
        ),
    ),
    (
        "loss_type policy_loss.loss_type",
        Alias(
            "policy_loss.loss_agg_mode",
            one_of(
                {
                    "dapo": "token-mean",
                    "grpo": "seq-mean-token-mean",
                    "dr_grpo": "seq-mean-token-sum-norm",
                },
                {
                    "bnpo": "divides by the tokens of one device, which has no counterpart; set"
                    ' policy_loss.loss_agg_mode = "token-mean" for the tokens of all',
                    "cispo": "bounds the ratio by epsilon_high itself; set policy_loss.loss_mode ="
                    ' "cispo", clip_ratio_low = 1.0 and clip_ratio_high = epsilon_high - 1',
                },
            ),
        ),
    ),
    (
        "scale_rewards advantage.scale_rewards",
        Alias(
            "advantage.normalise_std",
            one_of(
                {"group": True, "none": False},
                {
                    "batch": "divides by the batch's deviation, which has no counterpart; set"
                    " advantage.normalise_std = true for the group's, or false"
                },
            ),
        ),
    ),
    (
        "SKYRL.dynamic_sampling.type",
        Alias("advantage.dynamic_sampling", one_of({"filter": True})),
    ),
    (
        "algorithm.filter_groups.max_num_gen_batches SKYRL.dynamic_sampling.max_sample_batches",
        Alias(
            "advantage.max_degenerate_batches", note="theirs counts batches sampled, ours discarded"
        ),
    ),
    (
        "ACTOR.entropy_coeff ACTOR.entropy_coef AENT.entropy_coeff SKYRL.entropy_loss_coef"
        " entropy_coef entropy_coeff entropy.entropy_coef entropy.entropy_loss_coef"
        " entropy.entropy_bonus",
        Alias("entropy.entropy_coeff", suggests=bonus),
    ),
    (
        "AENT.warmup_steps adaptive_entropy.warmup_steps",
        Alias(
            "adaptive_entropy.warmup",
            two_later,
            "AReaL counts steps from 0 and adjusts after this one",
            implies=_AENT,
        ),
    ),
    (
        "algorithm.rollout_correction.rollout_is algorithm.rollout_is_level"
        " SKYRL.off_policy_correction.tis_ratio_type",
        Alias("off_policy.method", one_of({"token": "truncate", "sequence": "sequence_truncate"})),
    ),
    (
        "SKYRL.off_policy_correction.sequence_tis_ratio_clip_high",
        Alias("off_policy.cap", implies=always("off_policy.method", "sequence_truncate")),
    ),
    (
        "vllm_importance_sampling_mode off_policy.vllm_importance_sampling_mode",
        Alias(
            "off_policy.method",
            one_of(
                {"token_truncate": "truncate", "token_mask": "decoupled"},
                {
                    "sequence_mask": "has bounds of its own here; set off_policy.method ="
                    ' "sequence_mask", lower = 0.0 and upper = the cap'
                },
            ),
        ),
    ),
    (
        "vllm_importance_sampling_cap vllm_importance_sampling_clip_max"
        " off_policy.vllm_importance_sampling_cap off_policy.vllm_importance_sampling_clip_max",
        Alias("off_policy.cap", note="TRL's default mode is sequence_mask, ours truncate"),
    ),
    (
        "ACTOR.behav_imp_weight_cap off_policy.behav_imp_weight_cap",
        Alias("off_policy.cap", implies=always("off_policy.method", "decoupled")),
    ),
    (
        "ACTOR.prox_logp_method off_policy.prox_logp_method",
        Alias("off_policy.proximal", one_of({"recompute": "exact", "loglinear": "interpolated"})),
    ),
)
"""Keys whose values change on the way, or say more than one thing."""

_SWITCH_TABLE: tuple[tuple[str, Switch], ...] = (
    (
        "algorithm.filter_groups.enable grpo.use_dynamic_sampling",
        Switch(
            {"advantage.dynamic_sampling": True},
            {"advantage.dynamic_sampling": False},
            governs=("max_num_gen_batches",),
        ),
    ),
    ("ACTOR.use_dynamic_bsz", Switch(governs=("ppo_max_token_len_per_gpu",))),
    ("reward_model.overlong_buffer.enable", Switch(governs=("len", "penalty_factor"))),
    (
        "ACTOR.use_kl_loss SKYRL.use_kl_loss",
        Switch(
            governs=("kl_loss_coef", "kl_loss_type", "kl_estimator_type"),
            defaults={"reference_kl.coef": 0.001},
        ),
    ),
    (
        "SKYRL.use_entropy_loss",
        Switch(
            {"entropy.method": "bonus"},
            {"entropy.method": "none"},
            governs=("entropy_loss_coef",),
            defaults={"entropy.entropy_coeff": 0.01},
        ),
    ),
    (
        "ACTOR.clamp_entropy entropy.clamp_entropy",
        Switch(
            {"entropy.method": "aent"},
            remedy='set entropy.clamp_p = 0.0, or entropy.method = "bonus" for a fixed coefficient',
        ),
    ),
    (
        "AENT.adaptive_coeff",
        Switch(
            {"entropy.method": "aent"},
            remedy="a fixed coefficient of the clamped entropy has no counterpart; set"
            ' entropy.method = "bonus" for one of the full entropy',
        ),
    ),
    (
        "use_adaptive_entropy entropy.use_adaptive_entropy",
        Switch(
            {"entropy.method": "target"},
            governs=(
                "entropy_target",
                "entropy_coef_delta",
                "entropy_coef_min",
                "entropy_coef_max",
            ),
            defaults={
                "target_entropy.comparison": "inclusive",
                "target_entropy.target": 0.2,
                "target_entropy.delta": 0.005,
                "target_entropy.coeff_max": 1.0,
            },
        ),
    ),
    (
        "vllm_importance_sampling_correction",
        Switch(
            off={"off_policy.method": "none"},
            governs=(
                "vllm_importance_sampling_mode",
                "vllm_importance_sampling_cap",
                "vllm_importance_sampling_clip_max",
            ),
        ),
    ),
    (
        "ACTOR.use_decoupled_loss off_policy.use_decoupled_loss",
        Switch(
            {"off_policy.method": "decoupled"},
            {"off_policy.method": "none"},
            governs=("behav_imp_weight_cap",),
        ),
    ),
    (
        "SKYRL.use_tis",
        Switch(
            {"off_policy.method": "truncate"},
            {"off_policy.method": "none"},
            governs=("tis_imp_ratio_cap",),
        ),
    ),
)


def _spread(patterns: str) -> Iterator[str]:
    """Every path that a row's left side stands for."""
    for pattern in patterns.split():
        head, dot, rest = pattern.partition(".")
        for place in _PLACES.get(head, (head,)):
            yield place + dot + rest


def _table() -> dict[str, Alias]:
    plain = [(patterns, Alias(key)) for key, patterns in _SAME_MEANING.items()]
    aent = [(patterns, Alias(key, implies=_AENT)) for key, patterns in _OF_AENT.items()]
    rows = [*plain, *aent, *_CONVERTED]
    return {spelling: alias for patterns, alias in rows for spelling in _spread(patterns)}


ALIASES: Mapping[str, Alias] = _table()

SWITCHES: Mapping[str, Switch] = {
    spelling: switch for patterns, switch in _SWITCH_TABLE for spelling in _spread(patterns)
}
