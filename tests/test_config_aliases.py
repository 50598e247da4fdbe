"""Run files in other projects' spelling: every row of the table, and what two rows do together."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from shared.config import RunConfig, parse_run, parse_run_with_notices
from shared.config.aliases import read_aliases
from shared.config.section import spelled
from shared.config.spellings import ALIASES, SWITCHES, VALUES
from shared.errors import ConfigError

RUN = '[run]\nname = "a"\nnum_steps = 3\n'
TWO_STEPS = "[learner]\noptimizer_steps_per_batch = 2\n"
SECTIONS = frozenset(RunConfig.model_fields)
RUN_FILES = sorted(Path("deploy/config").glob("*.toml"))

FOREIGN: dict[str, Any] = {
    "policy_loss.loss_mode": "clip_cov",
    "policy_loss.clip_ratio_low": 0.1,
    "policy_loss.clip_ratio_high": 0.28,
    "policy_loss.clip_ratio_c": 10.0,
    "policy_loss.clip_cov_ratio": 4e-4,
    "policy_loss.clip_cov_lb": 0.5,
    "policy_loss.clip_cov_ub": 6.0,
    "policy_loss.kl_cov_ratio": 0.002,
    "policy_loss.ppo_kl_coef": 0.5,
    "policy_loss.loss_agg_mode": "token-sum",
    "policy_loss.loss_scale_factor": 512.0,
    "policy_loss.top_entropy_quantile": 0.2,
    "advantage.estimator": "opo",
    "advantage.normalise_std": False,
    "advantage.max_degenerate_batches": 5,
    "advantage.overlong_buffer_len": 64,
    "advantage.overlong_penalty_factor": 0.5,
    "entropy.entropy_coeff": 0.001,
    "entropy.clamp_p": 0.25,
    "adaptive_entropy.entropy_low": 0.1,
    "adaptive_entropy.entropy_high": 0.3,
    "adaptive_entropy.entropy_coeff_lr": 0.003,
    "adaptive_entropy.entropy_coeff_reg": 0.1,
    "adaptive_entropy.clip_low": 1e-4,
    "adaptive_entropy.clip_high": 0.02,
    "adaptive_entropy.warmup": 30,
    "target_entropy.target": 0.3,
    "target_entropy.delta": 2e-4,
    "target_entropy.coeff_min": 1e-4,
    "target_entropy.coeff_max": 0.01,
    "reference_kl.coef": 0.01,
    "reference_kl.estimator": "k2",
    "off_policy.cap": 3.0,
    "rollout.group_size": 16,
    "rollout.temperature": 0.9,
    "rollout.max_completion_tokens": 512,
    "learner.groups_per_batch": 64,
    "learner.learning_rate": 5e-7,
    "learner.weight_decay": 0.1,
    "learner.max_grad_norm": 0.5,
    "learner.micro_batch_tokens": 8192,
    "learner.activation_checkpointing": True,
    "model.path": "some/model",
    "run.num_steps": 7,
}
"""A value that differs from the default, for each of our keys that has an alias of equal values."""

CONVERTED: dict[str, list[tuple[Any, Any]]] = {
    "k_percent": [(0.2, 0.002), (0.02, 0.0002), (1, 0.01)],
    "policy_loss_type": [("regular", "vanilla"), ("dual_clip", "vanilla"), ("kl_cov", "kl_cov")],
    "loss_reduction": [
        ("token_mean", "token-mean"),
        ("sequence_mean", "seq-mean-token-mean"),
        ("seq_mean_token_sum_norm", "seq-mean-token-sum-norm"),
    ],
    "loss_type": [
        ("dapo", "token-mean"),
        ("grpo", "seq-mean-token-mean"),
        ("dr_grpo", "seq-mean-token-sum-norm"),
    ],
    "scale_rewards": [("group", True), ("none", False), (True, True), (False, False)],
    "type": [("filter", True)],
    "warmup_steps": [(29, 31), (0, 2)],
    "rollout_is": [("token", "truncate"), ("sequence", "sequence_truncate")],
    "rollout_is_level": [("token", "truncate"), ("sequence", "sequence_truncate")],
    "tis_ratio_type": [("token", "truncate"), ("sequence", "sequence_truncate")],
    "vllm_importance_sampling_mode": [("token_truncate", "truncate"), ("token_mask", "decoupled")],
    "prox_logp_method": [("recompute", "exact"), ("loglinear", "interpolated")],
}
"""(foreign, ours) for keys whose values change, by the last part of the foreign path."""

NEEDED: dict[str, str] = {
    "advantage.max_degenerate_batches": "[advantage]\ndynamic_sampling = true\n",
    "advantage.overlong_penalty_factor": "[advantage]\noverlong_buffer_len = 64\n",
    "policy_loss.loss_scale_factor": '[policy_loss]\nloss_agg_mode = "seq-mean-token-sum-norm"\n',
    "entropy.clamp_p": "[entropy]\nentropy_coeff = 0.002\n",
    "adaptive_entropy": "[entropy]\nentropy_coeff = 0.002\n",
    "target_entropy": '[entropy]\nmethod = "target"\nentropy_coeff = 0.001\n',
}
"""What a run file needs beside one of our keys, so that it has an effect."""


def cases() -> list[Any]:
    found = []
    for path, alias in ALIASES.items():
        plain = [(FOREIGN[alias.key], FOREIGN[alias.key])] if alias.key in FOREIGN else []
        for value, ours in CONVERTED.get(path.rpartition(".")[2], plain):
            found.append(pytest.param(path, value, ours, id=f"{path}={value}"))
    return found


def table(path: str, value: Any) -> str:
    """TOML that sets this path; a key without a table stands before all of them."""
    section, _, name = path.rpartition(".")
    return (
        f"[{section}]\n{name} = {spelled(value)}\n" if section else f"{name} = {spelled(value)}\n"
    )


def merged(*texts: str) -> str:
    """One TOML text whose tables hold what the tables of all these texts hold."""
    top: list[str] = []
    sections: dict[str, list[str]] = {}
    for text in texts:
        lines = top
        for line in text.splitlines():
            if line.startswith("["):
                lines = sections.setdefault(line, [])
            else:
                lines.append(line)
    bodies = ["\n".join([name, *lines]) for name, lines in sections.items()]
    return "\n".join([*top, *bodies]) + "\n"


def at(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def parse(*texts: str, model: str = "[warmup]\n") -> tuple[RunConfig, tuple[str, ...]]:
    return parse_run_with_notices(merged(RUN, model, *texts))


def refusal(*texts: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(*texts)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_row_of_the_table_has_a_case() -> None:
    covered = {case.values[0] for case in cases()}
    assert covered == set(ALIASES)


@pytest.mark.parametrize(
    "path",
    [
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "actor.loss_mode",
        "policy_loss.policy_loss_type",
        "policy_loss.k_percent",
        "policy_loss.kl_cov.kl_cov_frac",
        "policy_loss.clip_cov.clip_ratio",
        "actor_rollout_ref.actor.clip_ratio_low",
        "actor_rollout_ref.actor.clip_ratio_high",
        "policy_loss.eps_clip_low",
        "policy_loss.eps_clip_high",
        "policy_loss.epsilon_high",
        "policy_loss.ratio_clip_min",
        "policy_loss.ratio_clip_max",
        "epsilon",
        "epsilon_high",
        "beta",
        "temperature",
        "num_generations",
        "max_completion_length",
        "loss_type",
        "top_entropy_quantile",
        "entropy_coef",
        "entropy.entropy_coef",
        "entropy.entropy_loss_coef",
        "entropy.entropy_bonus",
        "entropy.entropy_clamp",
        "aent.entropy_clamp",
        "aent.entropy_low",
        "aent.entropy_high",
        "aent.coeff_lr",
        "aent.warmup_steps",
        "aent.coeff_box_low",
        "aent.coeff_box_high",
        "adaptive_entropy.entropy_coeff_warmup",
        "adaptive_entropy.entropy_coeff_clip_low",
        "adaptive_entropy.entropy_coeff_clip_high",
        "adaptive_entropy.reg",
        "actor.clamp_p",
        "algorithm.adv_estimator",
        "algorithm.norm_adv_by_std_in_grpo",
        "algorithm.filter_groups.max_num_gen_batches",
        "reward_model.overlong_buffer.len",
        "reward_model.overlong_buffer.penalty_factor",
        "actor.kl_loss_coef",
        "actor.kl_loss_type",
        "algorithm.rollout_is_threshold",
        "vllm_importance_sampling_cap",
    ],
)
def test_the_spellings_that_are_promised_are_in_the_table(path: str) -> None:
    assert path in ALIASES


@pytest.mark.parametrize(("path", "value", "ours"), cases())
def test_an_alias_gives_our_key_and_one_notice(path: str, value: Any, ours: Any) -> None:
    key = ALIASES[path].key
    section = key.partition(".")[0]
    needed = NEEDED.get(key, NEEDED.get(section, ""))
    run = RUN.replace("num_steps = 3\n", "") if key == "run.num_steps" else RUN
    model = "" if key == "model.path" else "[warmup]\n"
    document = tomllib.loads(merged(run, model, needed, table(path, value)))
    read, notices = read_aliases(document, sections=SECTIONS)
    config = RunConfig.model_validate(read)
    assert at(config, key) == ours
    (notice,) = notices
    assert notice.startswith(f"{path} = {spelled(value)}: read as {key} = {spelled(ours)}")


def test_no_alias_is_a_key_of_ours() -> None:
    for path in [*ALIASES, *SWITCHES]:
        section, _, name = path.rpartition(".")
        fields = RunConfig.model_fields
        if section in fields:
            model: Any = fields[section].annotation
            assert name not in model.model_fields
        assert path not in fields


def test_every_alias_leads_to_a_key_of_ours() -> None:
    for key in [alias.key for alias in ALIASES.values()] + list(VALUES):
        section, _, name = key.partition(".")
        model: Any = RunConfig.model_fields[section].annotation
        assert name in model.model_fields


def test_a_percentage_is_said_as_the_share_that_it_is() -> None:
    text = '[policy_loss]\nloss_mode = "kl_cov"\nppo_kl_coef = 1.0\nk_percent = 0.2\n'
    config, notices = parse(text, TWO_STEPS)
    assert config.policy_loss.kl_cov_ratio == 0.002
    assert notices == (
        "policy_loss.k_percent = 0.2: read as policy_loss.kl_cov_ratio = 0.002"
        " (percent to fraction)",
    )


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [(key, value, ours) for key, values in VALUES.items() for value, ours in values.items()],
)
def test_a_foreign_value_of_our_key_is_read_with_a_notice(key: str, value: str, ours: str) -> None:
    config, notices = parse(table(key, value))
    assert at(config, key) == ours
    assert f"{key} = {spelled(value)}: read as {key} = {spelled(ours)}" in notices


def test_a_foreign_value_under_a_foreign_key_is_one_notice() -> None:
    config, notices = parse(
        '[actor]\nuse_kl_loss = true\nkl_loss_coef = 0.01\nkl_loss_type = "low_var_kl"\n'
    )
    assert (config.reference_kl.coef, config.reference_kl.estimator) == (0.01, "k3")
    assert notices == (
        "actor.use_kl_loss = true: sets nothing",
        "actor.kl_loss_coef = 0.01: read as reference_kl.coef = 0.01",
        'actor.kl_loss_type = "low_var_kl": read as reference_kl.estimator = "k3"',
    )


@pytest.mark.parametrize("key", ["epsilon", "eps_clip"])
def test_one_clip_ratio_is_both_sides_unless_the_upper_is_given(key: str) -> None:
    loss = parse(f"{key} = 0.1\n")[0].policy_loss
    assert (loss.clip_ratio_low, loss.clip_ratio_high) == (0.1, 0.1)
    loss = parse(f"{key} = 0.1\nepsilon_high = 0.28\n")[0].policy_loss
    assert (loss.clip_ratio_low, loss.clip_ratio_high) == (0.1, 0.28)


def test_a_coefficient_from_elsewhere_is_that_of_a_bonus_unless_another_method_is_chosen() -> None:
    assert parse("[actor]\nentropy_coeff = 0.001\n")[0].entropy.method == "bonus"
    assert parse("[actor]\nentropy_coeff = 0\n")[0].entropy.method == "none"
    chosen = '[entropy]\nmethod = "target"\n'
    assert parse(chosen, "[actor]\nentropy_coeff = 0.001\n")[0].entropy.method == "target"


def test_the_script_of_aent_is_read_as_it_is_printed() -> None:
    config, notices = parse(
        "[actor_rollout_ref.actor]\nuse_kl_loss = false\nkl_loss_coef = 0\n"
        'kl_loss_type = "low_var_kl"\nentropy_coeff = 0.002\nclamp_entropy = true\nclamp_p = 0.33\n'
        "[actor_rollout_ref.actor.adaptive_entropy]\nentropy_low = 0.15\nentropy_high = 0.24\n"
        "entropy_coeff_lr = 0.002\nentropy_coeff_reg = 0\nentropy_coeff_warmup = 30\n"
        "entropy_coeff_clip_high = 0.009\nentropy_coeff_clip_low = 0.0006\n"
    )
    assert (config.entropy.method, config.entropy.entropy_coeff) == ("aent", 0.002)
    assert config.adaptive_entropy.warmup == 30
    assert config.reference_kl.coef == 0
    assert len(notices) == 13
    assert (
        'actor_rollout_ref.actor.kl_loss_type = "low_var_kl": sets nothing (no effect with'
        " actor_rollout_ref.actor.use_kl_loss = false)" in notices
    )


def test_the_clip_cov_recipe_of_verl_is_read_as_it_is_printed() -> None:
    config, _ = parse(
        '[algorithm]\nadv_estimator = "grpo"\n'
        "[algorithm.filter_groups]\nenable = true\nmax_num_gen_batches = 10\n"
        "[actor_rollout_ref.actor]\nclip_ratio_low = 1\nclip_ratio_high = 1\n"
        'clip_ratio_c = 10.0\nloss_agg_mode = "token-mean"\nentropy_coeff = 0\n'
        '[actor_rollout_ref.actor.policy_loss]\nloss_mode = "clip_cov"\nclip_cov_ratio = 0.0002\n'
        "kl_cov_ratio = 0.2\nppo_kl_coef = 1\n"
        "[reward_model.overlong_buffer]\nenable = false\nlen = 2048\npenalty_factor = 1.0\n"
    )
    loss, advantage = config.policy_loss, config.advantage
    assert (loss.loss_mode, loss.clip_ratio_low, loss.clip_cov_ratio) == ("clip_cov", 1, 2e-4)
    assert advantage.dynamic_sampling
    assert advantage.max_degenerate_batches == 10
    assert advantage.overlong_buffer_len == 0


SWITCHED = [
    ("algorithm.filter_groups.enable", "advantage.dynamic_sampling", True, False),
    ("grpo.use_dynamic_sampling", "advantage.dynamic_sampling", True, False),
    ("ACTOR.use_dynamic_bsz", "learner.micro_batch_tokens", 16384, 16384),
    ("reward_model.overlong_buffer.enable", "advantage.overlong_buffer_len", 0, 0),
    ("ACTOR.use_kl_loss", "reference_kl.coef", 0.001, 0.0),
    ("SKYRL.use_kl_loss", "reference_kl.coef", 0.001, 0.0),
    ("SKYRL.use_entropy_loss", "entropy.method", "bonus", "none"),
    ("ACTOR.clamp_entropy", "entropy.method", "aent", None),
    ("entropy.clamp_entropy", "entropy.method", "aent", None),
    ("AENT.adaptive_coeff", "entropy.method", "aent", None),
    ("use_adaptive_entropy", "target_entropy.coeff_max", 1.0, 0.005),
    ("entropy.use_adaptive_entropy", "target_entropy.comparison", "inclusive", "strict"),
    ("vllm_importance_sampling_correction", "off_policy.method", "truncate", "none"),
    ("ACTOR.use_decoupled_loss", "off_policy.method", "decoupled", "none"),
    ("off_policy.use_decoupled_loss", "off_policy.method", "decoupled", "none"),
    ("SKYRL.use_tis", "off_policy.method", "truncate", "none"),
]
PLACES = {
    "ACTOR": ("actor_rollout_ref.actor", "actor"),
    "SKYRL": ("trainer.algorithm", "algorithm"),
    "AENT": ("actor.aent", "aent"),
}
SWITCH_CASES = [
    (place + path[len(head) :], key, on, off)
    for path, key, on, off in SWITCHED
    for head in [path.partition(".")[0]]
    for place in PLACES.get(head, (head,))
]


def test_every_switch_has_a_case() -> None:
    assert {path for path, *_ in SWITCH_CASES} == set(SWITCHES)


@pytest.mark.parametrize(("path", "key", "on", "off"), SWITCH_CASES)
def test_a_switch_sets_our_key_both_ways(path: str, key: str, on: Any, off: Any) -> None:
    needed = "[entropy]\nentropy_coeff = 0.002\n" if on == "aent" else ""
    config, notices = parse(needed, table(path, True))
    assert at(config, key) == on
    assert [notice for notice in notices if notice.startswith(f"{path} = true: ")]
    if off is None:
        assert refusal(needed, table(path, False)).startswith(f"{path} = false: has no counterpart")
    else:
        assert at(parse(table(path, False))[0], key) == off
    assert "must be true or false" in refusal(needed, table(path, 3))


@pytest.mark.parametrize("path", [path for path, each in SWITCHES.items() if each.governs])
def test_what_a_switch_governs_has_no_effect_when_it_is_off(path: str) -> None:
    section = path.rpartition(".")[0]
    for name in SWITCHES[path].governs:
        neighbour = f"{section}.{name}" if section else name
        if neighbour not in ALIASES:
            continue
        config, notices = parse(table(path, False), table(neighbour, 1))
        assert config == parse(table(path, False))[0]
        assert f"{neighbour} = 1: sets nothing (no effect with {path} = false)" in notices


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (
            ["[policy_loss]\nk_percent = 0.2\nkl_cov_ratio = 0.002\n"],
            ["policy_loss.k_percent = 0.2", "policy_loss.kl_cov_ratio = 0.002"],
        ),
        (
            ["[actor]\nclip_ratio_low = 0.1\n", "[policy_loss]\neps_clip_low = 0.1\n"],
            ["policy_loss.eps_clip_low = 0.1", "actor.clip_ratio_low"],
        ),
        (
            ['[entropy]\nmethod = "bonus"\nclamp_entropy = true\nentropy_coeff = 0.1\n'],
            ["entropy.clamp_entropy = true", 'entropy.method = "bonus"'],
        ),
        (
            ["[aent]\nentropy_low = 0.1\n", '[entropy]\nmethod = "bonus"\nentropy_coeff = 0.1\n'],
            ["aent.entropy_low = 0.1", 'entropy.method = "aent"', 'not "bonus"'],
        ),
        (
            ['[algorithm]\npolicy_loss_type = "regular"\nclip_ratio_c = 3.0\n'],
            ['algorithm.policy_loss_type = "regular"', "policy_loss.clip_ratio_c", "not 3.0"],
        ),
    ],
)
def test_one_thing_said_twice_is_an_error_that_names_both(
    texts: list[str], names: list[str]
) -> None:
    message = refusal(*texts)
    assert all(name in message for name in names)
    assert message.endswith("leave one out")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("loss_type", "bnpo", "divides by the tokens of one device"),
        ("loss_type", "cispo", "clip_ratio_high = epsilon_high - 1"),
        ("scale_rewards", "batch", "divides by the batch's deviation"),
        ("vllm_importance_sampling_mode", "sequence_mask", 'method = "sequence_mask", lower = 0.0'),
    ],
)
def test_a_value_without_counterpart_is_refused_with_what_to_write(
    path: str, value: str, reason: str
) -> None:
    message = refusal(table(path, value))
    assert message.startswith(f'{path} = "{value}": ')
    assert reason in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[actor_rollout_ref.actor]\nclip_ratio_lo = 0.1\n",
            "actor_rollout_ref.actor.clip_ratio_lo = 0.1: unknown key; did you mean"
            " actor_rollout_ref.actor.clip_ratio_low?",
        ),
        (
            '[trainer]\nlogger = "wandb"\n',
            'trainer.logger = "wandb": unknown key; it has no counterpart; leave it out',
        ),
        ("epsilom = 0.1\n", "epsilom = 0.1: unknown key"),
        (
            "[policy_loss]\nclip_covratio = 0.1\n",
            "policy_loss.clip_covratio = 0.1: unknown key; did you mean clip_cov_ratio?",
        ),
        ('"policy_loss.k_percent" = 0.1\n', "policy_loss.k_percent = 0.1: unknown key"),
        ("policy_loss = 3\nepsilon = 0.2\n", "policy_loss = 3: input should be"),
        ('[policy_loss]\nk_percent = "0.2"\n', "policy_loss.kl_cov_ratio = '0.2': input should be"),
        ("[policy_loss]\nk_percent = [1]\n", "policy_loss.kl_cov_ratio = [1]: input should be"),
        ("[algorithm]\nadv_estimator = 'gae'\n", "advantage.estimator = 'gae': input should be"),
    ],
)
def test_what_is_no_alias_is_still_refused(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_the_document_that_is_read_is_left_as_it_is() -> None:
    document = {"policy_loss": {"k_percent": 0.2}}
    read, _ = read_aliases(document, sections=SECTIONS)
    assert document == {"policy_loss": {"k_percent": 0.2}}
    assert read == {"policy_loss": {"kl_cov_ratio": 0.002}}


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_run_files_that_are_shipped_need_no_notice(path: Path) -> None:
    assert parse_run_with_notices(path.read_text())[1] == ()


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            '[policy_loss]\nloss_mode = "kl_cov"\n' + TWO_STEPS,
            "policy_loss.ppo_kl_coef = 1.0: not set; verl's file has 0.1",
        ),
        (
            '[policy_loss]\nloss_mode = "clip_cov"\nclip_ratio_high = 1.0\n',
            "policy_loss.clip_ratio_low = 0.2: Clip-Cov's authors ran 1",
        ),
        (
            '[policy_loss]\nloss_mode = "clip_cov"\nclip_ratio_low = 1.0\nclip_ratio_high = 1.0\n'
            "[advantage]\nnormalise_std = false\n",
            "policy_loss.clip_cov_lb = 1.0, clip_cov_ub = 5.0: the authors' bounds",
        ),
        (
            "[policy_loss]\nkl_cov_ratio = 0.2\n",
            'policy_loss.kl_cov_ratio = 0.2: has no effect with loss_mode = "vanilla"',
        ),
        (
            '[policy_loss]\nloss_mode = "gspo"\nclip_ratio_low = 0.2\n',
            "policy_loss.clip_ratio_low = 0.2: hardly ever binds on a completion's ratio",
        ),
        (
            '[policy_loss]\nloss_mode = "kl_cov"\nppo_kl_coef = 1.0\n',
            "learner.optimizer_steps_per_batch = 1: KL-Cov's penalty has no effect",
        ),
        (
            "[policy_loss]\nentropy_ratio_clip_low = 0.05\nentropy_ratio_clip_high = 0.05\n",
            "learner.optimizer_steps_per_batch = 1: entropy-ratio clipping has no effect",
        ),
        (
            '[reference_kl]\nestimator = "k2"\n',
            'reference_kl.estimator = "k2": has no effect with coef = 0',
        ),
        (
            '[reference_kl]\ncoef = 0.1\nestimator = "k1"\n',
            'reference_kl.estimator = "k1": its gradient is noise',
        ),
    ],
)
def test_a_choice_that_is_easily_meant_otherwise_gives_one_notice(text: str, start: str) -> None:
    (notice,) = parse(text)[1]
    assert notice.startswith(start)
    assert parse_run(merged(RUN, "[warmup]\n", text)) == parse(text)[0]
