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
            RUN + "[warmup]\n[model]\nmax_length = 100\n[rollout]\nmax_completion_tokens = 100\n",
            "rollout.max_completion_tokens = 100: leaves no room",
        ),
        (
            RUN + "[warmup]\n[learner]\noptimizer_steps_per_batch = 3\n",
            "learner.optimizer_steps_per_batch = 3: does not divide groups_per_batch = 16",
        ),
        (
            RUN + "[warmup]\n[learner]\ngroups_per_batch = 5000\n",
            "redis.max_prompts = 4096: needs room for 15000 groups",
        ),
        (
            RUN + "[warmup]\n[checkpoint]\nevery_steps = 4000\n",
            "redis.max_groups = 4096: `scored` holds up to",
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
            RUN + "[warmup]\nnum_heads = 8\n",
            "warmup.num_heads = 8: a head must be a multiple of 32",
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


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_run(tmp_path / "nowhere.toml")


def test_a_large_selection_is_accepted_when_it_is_meant() -> None:
    config = parse_run(
        RUN + "[warmup]\n[policy_loss]\n"
        'loss_mode = "kl_cov"\nkl_cov_ratio = 0.2\nallow_large_ratio = true\n'
    )
    assert config.policy_loss.kl_cov_ratio == 0.2


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
        timeout=30,
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
