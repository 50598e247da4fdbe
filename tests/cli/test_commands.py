"""The other commands, what they refuse, and what they import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.launch import GpuShares, RunIdentity, plan_services, restart_command
from services.cli.run_folder import RunFolder
from shared.config import parse_run
from shared.errors import ConfigError, StartError

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "deploy" / "config" / "demo.toml"
RUN_FILE = '[run]\nname = "demo"\nnum_steps = 3\n[model]\npath = "none"\n'


def run_folder(path: Path) -> RunFolder:
    path.mkdir(parents=True)
    (path / "run.toml").write_text(RUN_FILE)
    return RunFolder(path)


def test_check_tells_the_main_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(DEMO)]) == 0
    output = capsys.readouterr().out
    for part in ("demo", "countdown", "aent", "2 replicas", "staleness at most 1"):
        assert part in output


def test_check_tells_how_far_a_canary_may_differ_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    for text, said in (
        ("", "within 0.001 nats (for float32)"),
        ('dtype = "bfloat16"\n', "within 0.2 nats (for bfloat16)"),
        ("[weights]\ncanary_tolerance = 0.1\n", "within 0.1 nats (as set)"),
    ):
        file.write_text(RUN_FILE + text)
        assert main(["check", str(file)]) == 0
        assert said in capsys.readouterr().out


def test_check_and_up_say_what_was_read_as_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE + "[actor]\nclip_ratio_high = 0.28\n")
    notice = "notice: actor.clip_ratio_high = 0.28: read as policy_loss.clip_ratio_high = 0.28\n"
    assert main(["check", str(file)]) == 0
    output = capsys.readouterr().out
    assert output.endswith(notice)
    assert "clip 0.8 to 1.28" in output
    assert main(["up", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == notice
    assert said.err.startswith("error: model.path = 'none'")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no entropy term", "grpo, vanilla (clip 0.8 to 1.2), token-mean", "truncate\n"]),
        ('[policy_loss]\nloss_mode = "gspo"\n', ["gspo (clip 0.9997 to 1.0004), seq-mean-token"]),
        ('[policy_loss]\nloss_mode = "unclipped"\n', ["unclipped (no clip)"]),
        ('[policy_loss]\nloss_mode = "kl_cov"\n', ["kl_cov (share 0.0002, coefficient 1)"]),
        (
            "[policy_loss]\ntop_entropy_quantile = 0.2\nentropy_ratio_clip_low = 0.05\n"
            "entropy_ratio_clip_high = 0.05\n[reference_kl]\ncoef = 0.001\n",
            ["top 0.2 of tokens by entropy", "entropy ratio 0.95 to 1.05", "KL 0.001 (k3)"],
        ),
        (
            "[advantage]\ndynamic_sampling = true\noverlong_buffer_len = 64\nppl_alpha = 0.01\n"
            'position_gamma = 0.1\n[off_policy]\nproximal = "interpolated"\n',
            [
                "dynamic sampling, overlong buffer 64 tokens",
                "perplexity shaping 0.01, position shaping 0.1",
                "proximal interpolated",
            ],
        ),
        ('[entropy]\nmethod = "bonus"\nentropy_coeff = 0.01\n', ["bonus, coefficient 0.01\n"]),
        (
            '[entropy]\nmethod = "bonus"\nentropy_coeff = 0.01\nschedule = "cosine"\n'
            "entropy_coeff_end = 0.0\n",
            ["bonus, coefficient 0.01 to 0, cosine over 3 steps"],
        ),
        (
            '[entropy]\nmethod = "target"\n',
            ["target 0.2 nats, coefficient 0 to 0.005 in steps of 0.0001"],
        ),
        (
            '[entropy]\nmethod = "pi"\n',
            ["pi, entropy held at 0.2 nats, gains 1 and 0.01"],
        ),
    ],
)
def test_check_tells_every_choice_that_decides_what_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE + text)
    assert main(["check", str(file)]) == 0
    output = capsys.readouterr().out
    for part in parts:
        assert part in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[run]\nname = 'x'\nnum_steps = 3\nsteps = 4\n", "run.steps = 4: unknown key; did you"),
        ("[run\n", "not TOML"),
        ("[run]\nname = 'x'\n", "run.num_steps: is missing; add it"),
        (None, "cannot be read"),
    ],
)
def test_check_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    assert main(["check", str(file)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {file}: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["check", str(DEMO)]])
def test_what_needs_no_model_imports_none_and_no_plotting(arguments: list[str]) -> None:
    heavy = "{'torch', 'vllm', 'deepspeed', 'transformers', 'matplotlib', 'grpc', 'rich.live'}"
    code = (
        "import sys\nfrom services.cli.__main__ import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"sys.exit(str(sorted({heavy} & set(sys.modules))).strip('[]'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr.strip()) == (1, "")


@pytest.mark.parametrize("command", ["report", "status", "export"])
def test_a_folder_that_is_not_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = [str(tmp_path / "model")] if command == "export" else []
    assert main([command, str(tmp_path), *more]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_report_prints_the_path_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "demo-1")
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.report)
    assert folder.report.exists()


def test_status_of_a_run_that_has_ended_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "demo-1")
    assert main(["status", str(folder.path)]) == 1
    assert "nothing runs (no redis-url file); start it with: isentrope up" in (
        capsys.readouterr().err
    )
    folder.write_redis_url("redis://127.0.0.1:1")
    assert main(["status", str(folder.path)]) == 1
    assert "nothing runs (Redis does not answer" in capsys.readouterr().err


def test_export_copies_the_model_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, destination = run_folder(tmp_path / "demo-1"), tmp_path / "out"
    assert main(["export", str(folder.path), str(destination)]) == 2
    assert "no model; the learner writes it when the run finishes" in capsys.readouterr().err
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    assert main(["export", str(folder.path), str(destination)]) == 0
    assert [path.name for path in destination.iterdir()] == ["config.json"]
    assert main(["export", str(folder.path), str(destination)]) == 2
    assert "exists; give a folder that does not exist yet" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"demo-1", "out"}


def identity(text: str) -> RunIdentity:
    return RunIdentity(parse_run(RUN_FILE + text), Path("run.toml"), "demo-1", "unix:///s", True)


def test_services_are_started_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = "[learner]\nnum_ranks = 2\nthreads = 3\n[rollout]\nthreads = 2\n"
    launches = {launch.name: launch for launch in plan_services(identity(text))}
    assert list(launches) == [
        "verifier-0", "rollout-0", "rollout-1", "learner", "learner-rank-1",
    ]  # fmt: skip
    ranks = [launches["learner"], launches["learner-rank-1"]]
    assert [each.environment["RANK"] for each in ranks] == ["0", "1"]
    assert [each.environment["LOCAL_RANK"] for each in ranks] == ["0", "1"]
    assert {each.environment["WORLD_SIZE"] for each in ranks} == {"2"}
    assert len({each.environment["MASTER_PORT"] for each in ranks}) == 1
    assert [each.has_lease for each in ranks] == [True, False]
    assert [each.environment["OMP_NUM_THREADS"] for each in launches.values()] == [*"12233"]
    assert all("--exit-with-parent" in each.command for each in launches.values())
    assert [("--resume" in each.command) for each in launches.values()] == [False] * 3 + [True] * 2
    command = restart_command(identity(text), launches["rollout-1"])
    assert command.startswith('REDIS_URL="$(cat redis-url-rollout)" ')
    assert command.endswith(
        " -m services.rollout --config run.toml --run-id demo-1 --name rollout-1"
    )


def test_gpus_go_to_the_learner_first_and_are_shared_where_they_are_few() -> None:
    many = GpuShares.of(["0", "1", "2", "3", "4"], num_ranks=1, per_replica=2)
    assert many.of_rank(0) == {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "0"}
    replicas = [many.of_replica(index)["CUDA_VISIBLE_DEVICES"] for index in range(3)]
    assert replicas == ["1,2", "3,4", "1,2"]
    one = GpuShares.of(["0"], num_ranks=2, per_replica=1)
    assert one.of_replica(1) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert one.of_rank(1)["LOCAL_RANK"] == "0"
    with pytest.raises(ConfigError, match="tensor_parallel_size = 4: this machine has 2 GPUs"):
        GpuShares.of(["0", "1"], num_ranks=1, per_replica=4)


def test_only_one_launcher_can_hold_a_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "demo-1")
    refusal = pytest.raises(StartError, match="is running or still ending")
    with folder.lock(), refusal, folder.lock():
        pass
    with folder.lock():
        pass
