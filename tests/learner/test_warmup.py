from __future__ import annotations

import signal
import subprocess
import sys
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.learner import warmup
from services.learner.warmup import WarmupProgress, warm_up
from shared.config import RunConfig, parse_run
from shared.errors import ConfigError
from shared.tasks.countdown import Countdown
from shared.tokenizer import Tokenizer
from tests.forked import FORKED

RUN = """
[run]
name = "test"
num_steps = 1
seed = {seed}
[model]
max_length = 64
dtype = "{dtype}"
[warmup]
num_steps = {num_steps}
batch_size = 8
hidden_size = 32
num_layers = 2
num_heads = 1
intermediate_size = 48
[task]
name = "{task}"
[rollout]
max_completion_tokens = 32
"""


def run_text(
    *,
    num_steps: int = 3,
    seed: int = 1,
    dtype: str = "float32",
    task: str = "countdown",
) -> str:
    return RUN.format(seed=seed, dtype=dtype, num_steps=num_steps, task=task)


def make_config(
    *,
    num_steps: int = 3,
    seed: int = 1,
    dtype: str = "float32",
    task: str = "countdown",
) -> RunConfig:
    return parse_run(run_text(num_steps=num_steps, seed=seed, dtype=dtype, task=task))


class Accented(Countdown):
    alphabet = "é"


def train(config: RunConfig, folder: Path) -> tuple[dict[str, torch.Tensor], list[WarmupProgress]]:
    reports: list[WarmupProgress] = []
    warm_up(config, folder, report=reports.append)
    return AutoModelForCausalLM.from_pretrained(folder).state_dict(), reports


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_folder_holds_a_model_and_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "warmup"
    _, reports = train(make_config(), folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), Tokenizer(str(folder))
    assert model.config.vocab_size == len(Countdown.alphabet) + 2
    assert model.config.max_position_embeddings == 64
    assert model.generation_config.eos_token_id == 18
    assert tokenizer.stop_token_ids == (18,)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert [(each.step, each.num_steps) for each in reports] == [(3, 3)]
    assert [path.name for path in folder.parent.iterdir()] == ["warmup"]


def test_the_model_of_the_default_sizes_has_half_a_million_parameters() -> None:
    config = parse_run('[run]\nname = "test"\nnum_steps = 1\n[warmup]\n')
    assert config.warmup is not None
    model = warmup._build(config, config.warmup, Countdown())
    assert sum(parameter.numel() for parameter in model.parameters()) == 496_128


def test_the_same_config_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, _ = train(make_config(), tmp_path / "1")
    torch.rand(3)
    again, _ = train(make_config(), tmp_path / "2")
    other, _ = train(make_config(seed=2), tmp_path / "3")
    assert same(first, again)
    assert not same(first, other)


def test_training_leaves_the_global_numerics_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    train(make_config(num_steps=1), tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


def test_the_loss_falls_and_is_reported_every_few_steps(tmp_path: Path) -> None:
    _, reports = train(make_config(num_steps=195), tmp_path / "model")
    assert [report.step for report in reports] == [*range(10, 200, 10), 195]
    assert reports[-1].loss < 0.75 * reports[0].loss
    assert reports[-1].seconds_left == 0


def test_only_completion_tokens_are_learned() -> None:
    config = make_config()
    assert config.warmup is not None
    task = Countdown()
    torch.manual_seed(0)
    model = warmup._build(config, config.warmup, task)
    token_ids, is_completion = next(warmup._batches(task, task.demonstrations(1), 8))
    expected = []
    for row, mask in zip(token_ids, is_completion, strict=True):
        logprobs = model(row[None]).logits[0].log_softmax(-1)
        for place in range(1, len(row)):
            if mask[place]:
                expected.append(-logprobs[place - 1, row[place]])
    loss = warmup._completion_loss(model, token_ids, is_completion)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_a_batch_marks_the_completion_and_its_end() -> None:
    task = Countdown()
    token_ids, is_completion = next(warmup._batches(task, task.demonstrations(1), 4))
    pairs = [pair for pair, _ in zip(task.demonstrations(1), range(4), strict=False)]
    characters = [*task.alphabet, task.end, ""]
    for row, mask, (problem, completion) in zip(token_ids, is_completion, pairs, strict=True):
        assert "".join(characters[id] for id in row) == problem.prompt + completion
        assert "".join(characters[id] for id in row[mask]) == completion


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.02), (24, 0.5), (49, 1.0), (50, 1.0), (475, 0.5), (899, 1 / 850)]
)
def test_the_learning_rate_rises_then_falls_to_zero(step: int, expected: float) -> None:
    assert warmup._lr_factor(step, num_steps=900) == pytest.approx(expected)


def test_weights_are_saved_in_the_policys_dtype(tmp_path: Path) -> None:
    train(make_config(dtype="bfloat16"), tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(progress: WarmupProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(make_config(), tmp_path / "model", report=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing_beside_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(NotADirectoryError):
        warm_up(make_config(), tmp_path / "model", report=print)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_training_leaves_no_half_folder(tmp_path: Path) -> None:
    reports = FORKED.Queue()
    given = (make_config(num_steps=100_000), tmp_path / "model", reports)
    process = FORKED.Process(target=report_to_queue, args=given, daemon=True)
    process.start()
    assert reports.get(timeout=240.0).step == 10
    process.kill()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def report_to_queue(config: RunConfig, folder: Path, reports: Queue[WarmupProgress]) -> None:
    warm_up(config, folder, report=reports.put)


def test_the_model_of_whoever_was_first_stays(tmp_path: Path) -> None:
    first, _ = train(make_config(), tmp_path / "model")
    second, _ = train(make_config(seed=2), tmp_path / "model")
    assert same(first, second)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_reports_its_progress_line_by_line(tmp_path: Path) -> None:
    output, _ = start_main(tmp_path, num_steps=12).communicate()
    lines = output.decode().splitlines()
    assert [line.split(" loss ")[0] for line in lines] == ["warm-up 10/12", "warm-up 12/12"]
    assert lines[-1].endswith(" 0 s left")
    assert (tmp_path / "model" / "model.safetensors").exists()


def start_main(folder: Path, *, num_steps: int) -> subprocess.Popen[bytes]:
    (folder / "run.toml").write_text(run_text(num_steps=num_steps), "utf8")
    command = [sys.executable, "-m", "services.learner.warmup"]
    options = ["--config", str(folder / "run.toml"), "--folder", str(folder / "model")]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE)


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys, services.learner.warmup as warmup\n"
        "try: warmup.main(['--help'])\n"
        "finally: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            make_config(task="tests.verifier.hostile:HostileTask"),
            "has no demonstrations for a [warmup] to imitate",
        ),
        (
            make_config(task="tests.learner.test_warmup:Accented"),
            "its alphabet 'é$' must be ASCII",
        ),
        (
            parse_run('[run]\nname = "x"\nnum_steps = 1\n[model]\npath = "m"\n'),
            "there is no [warmup]",
        ),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(
    tmp_path: Path, config: RunConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        warm_up(config, tmp_path / "model", report=print)
    assert message in str(caught.value)


def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = warmup.main(["--config", str(tmp_path / "none.toml"), "--folder", str(tmp_path / "m")])
    assert code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.toml'}: cannot be read")
