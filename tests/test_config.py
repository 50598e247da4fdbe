from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import Environment, RunConfig, load_run, parse_run
from shared.errors import ConfigError

RUN = '[run]\nname = "a"\nnum_steps = 3\n'
RUN_FILES = sorted(Path("deploy/config").glob("*.toml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_that_is_shipped_is_valid(path: Path) -> None:
    assert load_run(path).run.num_steps > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run: is missing; add it"),
        (
            RUN + "[warmup]\n[polcy_loss]\n",
            "polcy_loss = {}: unknown key; did you mean policy_loss?",
        ),
        (
            RUN + "[warmup]\n[policy_loss]\nclip_covratio = 0.1\n",
            "policy_loss.clip_covratio = 0.1: unknown key; did you mean clip_cov_ratio?",
        ),
        (
            '[run]\nname = "a"\nnum_steps = "three"\n',
            "run.num_steps = 'three': input should be a valid integer",
        ),
        ('[run]\nname = "A b"\nnum_steps = 1\n', "run.name = 'A b': string should match"),
        (RUN, "model.path is not set and there is no [warmup]"),
        (RUN + "[warmup]\n[rollout]\ngroup_size = 1\n", "rollout.group_size = 1: grpo compares"),
        (
            RUN + "[warmup]\n[weights]\ncanary_tolerance = 0.0\n",
            "weights.canary_tolerance = 0.0: input should be greater than 0",
        ),
        (
            RUN + "[warmup]\n[model]\nmax_length = 100\n[rollout]\nmax_completion_tokens = 100\n",
            "rollout.max_completion_tokens = 100: leaves no room",
        ),
        (
            RUN + "[warmup]\n[learner]\noptimizer_steps_per_batch = 3\n",
            "learner.optimizer_steps_per_batch = 3: does not divide groups_per_batch = 16",
        ),
        (
            RUN + '[warmup]\n[learner]\noffload = "cpu"\n',
            'learner.offload = "cpu": DeepSpeed offloads what ZeRO holds, and zero_stage = 0',
        ),
        (
            RUN + '[warmup]\n[learner]\nhead_dtype = "bfloat16"\n',
            "learner.head_dtype = 'bfloat16': input should be 'model' or 'float32'",
        ),
        (
            RUN + "[warmup]\n[learner.lora]\ndropout = 0.1\n",
            "learner.lora.dropout = 0.1: unknown key",
        ),
        (
            RUN + "[warmup]\n[learner]\ngroups_per_batch = 5000\n",
            "redis.max_prompts = 4096: needs room for 15000 groups",
        ),
        (
            RUN + '[warmup]\n[weights]\ncatch_up = "never"\n',
            "weights.catch_up = 'never': input should be 'stream' or 'group'",
        ),
        (
            RUN + "[warmup]\n[weights]\nmin_mib_per_second = 0.5\n",
            "weights.min_mib_per_second = 0.5: input should be greater than or equal to 1",
        ),
        (
            RUN + "[warmup]\n[weights]\nrepublish_seconds = 0\n",
            "weights.republish_seconds = 0: input should be greater than 0",
        ),
        (
            RUN + "[warmup]\n[checkpoint]\nevery_steps = 4000\n",
            "redis.max_groups = 4096: `scored` holds up to",
        ),
        (
            RUN + "[warmup]\n[redis]\nmax_prompts_mib = 1\n",
            "redis.max_prompts_mib = 1: 148 prompts of model.max_length = 4096 tokens may take 3;",
        ),
        (
            RUN + "[warmup]\n[redis]\nmax_groups_mib = 1\n",
            "redis.max_groups_mib = 1: one batch of 16 groups may take 2; raise it, or lower",
        ),
        (RUN + "[warmup]\n[redis]\nmax_groups_mib = 0\n", "redis.max_groups_mib = 0: input should"),
        (
            RUN + "[warmup]\n[redis]\noutage_seconds = 0\n",
            "redis.outage_seconds = 0: input should be greater than 0",
        ),
        (
            RUN + "[warmup]\n[redis]\nreconcile_seconds = -1\n",
            "redis.reconcile_seconds = -1: input should be greater than 0",
        ),
        (
            RUN + "[warmup]\n[rollout]\npartial_tokens = -1\n",
            "rollout.partial_tokens = -1: input should be greater than or equal to 0",
        ),
        (
            RUN + '[warmup]\n[policy_loss]\nloss_mode = "kl_cov"\nkl_cov_ratio = 0.2\n',
            "policy_loss.kl_cov_ratio = 0.2: a share of tokens, the paper has",
        ),
        (
            RUN + '[warmup]\n[policy_loss]\nloss_mode = "clip_cov"\nclip_cov_ratio = 0.2\n',
            "policy_loss.clip_cov_ratio = 0.2: a share of tokens, the paper has",
        ),
        (
            RUN + "[warmup]\n[policy_loss]\nclip_cov_lb = 6.0\n",
            "policy_loss.clip_cov_lb = 6.0: must be below clip_cov_ub = 5.0",
        ),
        (
            RUN + "[warmup]\n[entropy]\nentropy_coeff = 0.1\n",
            'entropy.entropy_coeff = 0.1: has no effect with method = "none"',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "bonus"\n',
            'entropy.method = "bonus": needs entropy_coeff above 0',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "aent"\nentropy_coeff = 0.002\n'
            "[adaptive_entropy]\nentropy_low = 0.5\n",
            "adaptive_entropy.entropy_low = 0.5: must be below entropy_high = 0.24",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "aent"\nentropy_coeff = 1.0\n',
            "entropy.entropy_coeff = 1.0: AEnt starts inside",
        ),
        (
            RUN + "[warmup]\n[off_policy]\nlower = 9.0\n",
            "off_policy.lower = 9.0: must be below upper = 5.0",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "pi"\nentropy_coeff = 0.1\n',
            'entropy.entropy_coeff = 0.1: has no effect with method = "pi"; set [pi_entropy]',
        ),
        (
            RUN + "[warmup]\n[entropy]\nclamp_p = 0.2\n",
            'entropy.clamp_p = 0.2: has no effect with method = "none"; leave it out',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "aent"\nentropy_coeff = 0.002\n'
            'schedule = "linear"\nentropy_coeff_end = 0.0\n',
            'entropy.schedule = "linear": has no effect with method = "aent"; set method = "bonus"',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "bonus"\nentropy_coeff = 0.1\n'
            'schedule = "cosine"\n',
            'entropy.schedule = "cosine": has no end; set entropy_coeff_end',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "bonus"\nentropy_coeff = 0.1\n'
            'schedule = "exponential"\nentropy_coeff_end = 0.0\n',
            'entropy.schedule = "exponential": needs both ends above 0, not entropy_coeff = 0.1 and'
            " entropy_coeff_end = 0.0; raise the end that is 0",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "bonus"\nentropy_coeff_end = 0.1\n'
            'schedule = "exponential"\n',
            'entropy.schedule = "exponential": needs both ends above 0, not entropy_coeff = 0.0',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "bonus"\nentropy_coeff = 0.1\n'
            "schedule_steps = 9\n",
            'entropy.schedule_steps = 9: has no effect with schedule = "constant"; leave it out',
        ),
        (
            RUN + "[warmup]\n[adaptive_entropy]\nentropy_low = 0.1\n",
            'entropy.method = "none": [adaptive_entropy] has no effect with it; set method = "aent"'
            " or leave the section out",
        ),
        (
            RUN + "[warmup]\n[target_entropy]\ntarget = 0.1\n",
            'entropy.method = "none": [target_entropy] has no effect with it; set method =',
        ),
        (
            RUN + "[warmup]\n[pi_entropy]\ntarget = 0.1\n",
            'entropy.method = "none": [pi_entropy] has no effect with it; set method = "pi"',
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "target"\n[target_entropy]\ncoeff_min = 0.01\n',
            "target_entropy.coeff_min = 0.01: must be below coeff_max = 0.005",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "target"\n[target_entropy]\ndelta = 0.01\n',
            "target_entropy.delta = 0.01: one step crosses the whole range from coeff_min = 0.0 to"
            " coeff_max = 0.005; lower it",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "target"\nentropy_coeff = 0.1\n',
            "entropy.entropy_coeff = 0.1: the controller starts inside [target_entropy.coeff_min,"
            " coeff_max] = [0.0, 0.005]",
        ),
        (
            RUN + '[warmup]\n[entropy]\nmethod = "pi"\n'
            "[pi_entropy]\nproportional = 0.0\nintegral = 0.0\n",
            "pi_entropy.proportional = 0.0: nothing controls with integral = 0.0; raise one",
        ),
        (
            RUN + '[warmup]\n[advantage]\nestimator = "rloo"\nnormalise_std = false\n',
            'advantage.normalise_std = false: has no effect with estimator = "rloo"; leave it out',
        ),
        (
            RUN + "[warmup]\n[advantage]\nmax_degenerate_batches = 3\n",
            "advantage.max_degenerate_batches = 3: has no effect with dynamic_sampling = false",
        ),
        (
            RUN + "[warmup]\n[advantage]\noverlong_penalty_factor = 0.5\n",
            "advantage.overlong_penalty_factor = 0.5: has no effect with overlong_buffer_len = 0",
        ),
        (
            RUN + "[warmup]\n[advantage]\nposition_steepness = 5.0\n",
            "advantage.position_steepness = 5.0: has no effect with position_gamma = 0",
        ),
        (
            RUN + "[warmup]\n[advantage]\noverlong_buffer_len = 1024\n",
            "advantage.overlong_buffer_len = 1024: must be below rollout.max_completion_tokens ="
            " 1024, or every completion is too long; lower it",
        ),
        (
            RUN + '[warmup]\n[rollout]\ngroup_size = 1\n[advantage]\nestimator = "opo"\n',
            "rollout.group_size = 1: opo compares completions of one prompt; use at least 2",
        ),
        (
            RUN + "[warmup]\n[rollout]\ngroup_size = 1\n[advantage]\n"
            'estimator = "reinforce_plus_plus"\ndynamic_sampling = true\n',
            "rollout.group_size = 1: dynamic_sampling compares completions of one prompt",
        ),
        (
            RUN + "[warmup]\n[rollout]\ngroup_size = 1\n[advantage]\n"
            'estimator = "reinforce_plus_plus"\nppl_alpha = 0.01\n',
            "rollout.group_size = 1: ppl_alpha compares completions of one prompt",
        ),
        (
            RUN + '[warmup]\n[policy_loss]\nloss_mode = "gspo"\nloss_agg_mode = "token-mean"\n',
            'policy_loss.loss_agg_mode = "token-mean": GSPO\'s is "seq-mean-token-mean"; leave it',
        ),
        (
            RUN + "[warmup]\n[policy_loss]\nentropy_ratio_clip_high = 0.05\n",
            "policy_loss.entropy_ratio_clip_high = 0.05: needs entropy_ratio_clip_low too; the"
            " paper has 0.05 for both",
        ),
        (
            RUN + '[warmup]\n[policy_loss]\nselection_logprobs = "proximal"\n',
            'policy_loss.selection_logprobs = "proximal": has no effect with loss_mode = "vanilla",'
            " which selects nothing; leave it out",
        ),
        (
            RUN + "[warmup]\n[policy_loss]\nloss_scale_factor = 100.0\n",
            "policy_loss.loss_scale_factor = 100.0: has no effect with loss_agg_mode ="
            ' "token-mean"; leave it out',
        ),
        (
            RUN + "[warmup]\n[policy_loss]\ntop_entropy_quantile = 0.0\n",
            "policy_loss.top_entropy_quantile = 0.0: input should be greater than 0",
        ),
        (
            RUN + '[warmup]\n[off_policy]\nmethod = "mask"\ncap = 3.0\n',
            'off_policy.cap = 3.0: has no effect with method = "mask"; leave it out',
        ),
        (
            RUN + "[warmup]\n[off_policy]\nupper = 3.0\n",
            'off_policy.upper = 3.0: has no effect with method = "truncate"; leave it out',
        ),
        (
            RUN + '[warmup]\n[off_policy]\nmethod = "none"\nproximal = "interpolated"\n',
            'off_policy.proximal = "interpolated": nothing corrects for its distance from the'
            ' behaviour policy with method = "none"; set method = "truncate"',
        ),
        (
            RUN + "[warmup]\n[law]\nwindow = 1\n",
            "law.window = 1: input should be greater than or equal to 2",
        ),
        (
            RUN + "[warmup]\nnum_heads = 8\n",
            "warmup.num_heads = 8: a head must be a multiple of 32",
        ),
        (
            RUN + "[warmup]\n[watchdog]\nstall_seconds = -1.0\n",
            "watchdog.stall_seconds = -1.0: input should be greater than or equal to 0",
        ),
        ("run = [", "not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_key_value_and_remedy(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_run(text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_the_watchdog_bites_after_five_minutes_and_can_be_switched_off() -> None:
    assert parse_run(RUN + "[warmup]\n").watchdog.stall_seconds == 300
    off = parse_run(RUN + "[warmup]\n[watchdog]\nstall_seconds = 0.0\n")
    assert off.watchdog.stall_seconds == 0


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("", 1e-3),
        ('dtype = "bfloat16"\n', 0.2),
        ('dtype = "bfloat16"\n[weights]\ncanary_tolerance = 0.5\n', 0.5),
        ("[weights]\ncanary_tolerance = 0.01\n", 0.01),
    ],
)
def test_a_canary_may_differ_by_what_the_dtype_rounds_off(text: str, tolerance: float) -> None:
    assert parse_run(RUN + '[model]\npath = "x"\n' + text).canary_tolerance == tolerance


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_run(tmp_path / "nowhere.toml")


def test_a_large_selection_is_accepted_when_it_is_meant() -> None:
    config = parse_run(
        RUN + "[warmup]\n[policy_loss]\n"
        'loss_mode = "kl_cov"\nkl_cov_ratio = 0.2\nallow_large_ratio = true\n'
    )
    assert config.policy_loss.kl_cov_ratio == 0.2


def test_gspo_and_decoupled_ppo_have_defaults_of_their_own_which_a_file_may_change() -> None:
    def loss(more: str) -> tuple[float, float, str]:
        config = parse_run(RUN + '[warmup]\n[policy_loss]\nloss_mode = "gspo"\n' + more).policy_loss
        return config.clip_ratio_low, config.clip_ratio_high, config.loss_agg_mode

    def cap(more: str) -> float:
        return parse_run(RUN + "[warmup]\n[off_policy]\n" + more).off_policy.cap

    assert loss("") == (3e-4, 4e-4, "seq-mean-token-mean")
    assert loss("clip_ratio_high = 1e-3\n") == (3e-4, 1e-3, "seq-mean-token-mean")
    assert parse_run(RUN + "[warmup]\n").policy_loss.clip_ratio_low == 0.2
    assert (cap(""), cap('method = "decoupled"\n')) == (2.0, 5.0)
    assert cap('method = "decoupled"\ncap = 3.0\n') == 3.0


@pytest.mark.parametrize(
    "text",
    [
        '[entropy]\nmethod = "bonus"\nschedule = "linear"\nentropy_coeff_end = 0.01\n',
        '[entropy]\nmethod = "target"\n[target_entropy]\ncomparison = "inclusive"\n',
        '[entropy]\nmethod = "pi"\n[pi_entropy]\ntarget = 0.5\n',
        '[advantage]\nestimator = "opo"\ndynamic_sampling = true\nmax_degenerate_batches = 2\n',
        '[advantage]\nestimator = "reinforce_plus_plus"\n[rollout]\ngroup_size = 1\n',
        '[policy_loss]\nloss_mode = "kl_cov"\nselection_logprobs = "proximal"\n',
        '[policy_loss]\nloss_agg_mode = "seq-mean-token-sum-norm"\nloss_scale_factor = 64\n',
        '[off_policy]\nmethod = "sequence_mask"\nlower = 0.0\nupper = 3.0\n',
        '[off_policy]\nmethod = "decoupled"\nproximal = "interpolated"\n',
        "[reference_kl]\ncoef = 0.001\n[diagnostics]\nentropy_change_every_steps = 0\n[law]\n",
    ],
)
def test_combinations_that_have_an_effect_are_accepted(text: str) -> None:
    assert parse_run(RUN + "[warmup]\n" + text).run.num_steps == 3


def test_the_warm_up_folder_changes_with_everything_that_shapes_the_model() -> None:
    def path(extra: str) -> str:
        return parse_run(RUN + extra).model_path

    same = path("[warmup]\n")
    assert same == path("[warmup]\n[learner]\nlearning_rate = 1e-3\n")
    assert (
        len({same, path("[warmup]\nnum_steps = 5\n"), path("[warmup]\n[task]\nname = 'x'\n")}) == 3
    )
    assert path('[model]\npath = "some/model"\n') == "some/model"


def test_reading_a_run_file_loads_neither_torch_nor_vllm() -> None:
    program = (
        "import sys; from shared.config import parse_run; import shared.process\n"
        f"parse_run({RUN + '[warmup]'!r})\n"
        "heavy = {'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("service", ["rollout", "verifier", "learner"])
def test_a_service_refuses_a_bad_run_file_with_exit_code_two(service: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(RUN + "[warmup]\nfoo = 1\n")
    ended = subprocess.run(
        [sys.executable, "-m", f"services.{service}", "--config", str(bad)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {bad}: warmup.foo = 1: unknown key")


def test_the_environment_gives_address_and_rank() -> None:
    given = Environment.read({"REDIS_URL": "redis://r", "RANK": "1", "WORLD_SIZE": "2"})
    assert (given.redis_url, given.rank, given.world_size) == ("redis://r", 1, 2)


@pytest.mark.parametrize("variables", [{"RANK": "two"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_rank_that_makes_no_sense_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="RANK"):
        Environment.read(variables)


def test_every_field_of_the_run_file_says_what_it_means() -> None:
    def undocumented(model: type, path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                found += undocumented(inner, f"{path}{name}.")
            elif field.description is None and path:
                found.append(path + name)
        return found

    assert undocumented(RunConfig, "") == []
