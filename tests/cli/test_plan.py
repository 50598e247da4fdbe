"""`isentrope plan`: what it reads of a run, what it reckons of hardware, what it refuses."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from services.cli.__main__ import main
from services.cli.plan.measured import measured
from services.cli.plan.model import Factors, Hardware, ModelSize, reckon
from services.cli.plan.rates import Decode, Lengths, Publishing, Rates, Shape, lengths_of
from services.cli.plan.simulation import Simulation
from services.cli.run_folder import RunFolder
from shared.errors import ConfigError

RUN_FILE = """
[run]
name = "planned"
num_steps = 30
[model]
path = "none"
[rollout]
group_size = 2
max_concurrent_groups = 2
[learner]
groups_per_batch = 4
max_staleness = {max_staleness}
[evaluation]
every_steps = 0
[checkpoint]
every_steps = 10
"""
LENGTH = 50
TOKEN_SECONDS = 0.02
TRAIN_SECONDS = 0.7
PUBLISHING = Publishing(0.2, 0.05)
STEP_SECONDS = 0.1
CHECKPOINT_SECONDS = 3.0
SMALL = ("--replicas", "1", "2", "--steps", "8", "--seeds", "2")
MODEL = ("--parameters", "7e9", "--gpu", "h100", "--response-mean", "1000")


def write_run(
    folder: Path, *, num_steps: int = 30, wait_seconds: float, staleness: int = 0
) -> None:
    """As a learner writes it; a batch trains for TRAIN_SECONDS and waits for `wait_seconds`."""
    folder.mkdir()
    (folder / "run.toml").write_text(RUN_FILE.format(max_staleness=staleness))
    now, rows = 0.0, []
    for step in range(1, num_steps + 1):
        seconds = wait_seconds + TRAIN_SECONDS + PUBLISHING.seconds + STEP_SECONDS
        now += seconds
        rows.append(
            {
                "step": step,
                "time": now,
                "seconds": seconds,
                "wait_data_seconds": wait_seconds,
                "train_seconds": TRAIN_SECONDS,
                "publish_seconds": PUBLISHING.seconds,
                "pause_seconds": PUBLISHING.pause_seconds,
                "tokens": 8.0 * LENGTH,
                "completion_length_mean": float(LENGTH),
                "staleness_counts": {"0": 8},
                "replica_groups": {"rollout-0": 2, "rollout-1": 2},
                "groups_replaced": 0,
            }
        )
        if step % 10 == 0:
            now += CHECKPOINT_SECONDS
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_rates_of_a_run_are_read_and_the_engines_speed_is_found(tmp_path: Path) -> None:
    # Synchronous, two replicas of two places: a batch is one round.
    write_run(tmp_path / "run", wait_seconds=LENGTH * TOKEN_SECONDS)
    run = measured(RunFolder(tmp_path / "run"))
    assert (run.num_steps, run.shape.num_replicas) == (28, 2)
    assert run.rates.lengths == Lengths(LENGTH, 0.0, 1024)
    assert statistics.fmean(run.rates.train_seconds_per_token) * 8 * LENGTH == pytest.approx(
        TRAIN_SECONDS
    )
    assert set(run.rates.publishing) == {PUBLISHING}
    assert run.rates.step_seconds == pytest.approx(STEP_SECONDS)
    assert run.rates.checkpoint_seconds == pytest.approx(CHECKPOINT_SECONDS)
    assert run.rates.decode.fixed_seconds == pytest.approx(TOKEN_SECONDS, rel=0.02)
    assert run.wait_seconds == pytest.approx(LENGTH * TOKEN_SECONDS)
    assert not run.is_bound
    assert run.staleness == {0: 28 * 8}


def test_part_of_the_engines_time_can_be_said_to_grow_with_its_sequences(tmp_path: Path) -> None:
    write_run(tmp_path / "run", wait_seconds=LENGTH * TOKEN_SECONDS)
    decode = measured(RunFolder(tmp_path / "run"), batch_cost=0.25).rates.decode
    assert decode.fixed_seconds == pytest.approx(0.75 * TOKEN_SECONDS, rel=0.02)
    assert decode.token_seconds(4, 0) == pytest.approx(TOKEN_SECONDS, rel=0.02)


def test_replicas_that_held_fewer_groups_than_allowed_are_faster_than_they_seem(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "run", wait_seconds=LENGTH * TOKEN_SECONDS)
    run = measured(RunFolder(tmp_path / "run"), max_concurrent_groups=1)
    assert run.shape.max_concurrent_groups == 1
    assert run.rates.decode.fixed_seconds == pytest.approx(TOKEN_SECONDS / 2, rel=0.02)


def test_rows_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", wait_seconds=1.0)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace("train_seconds", "seconds_of_training"))
    with pytest.raises(ConfigError, match="train_seconds is missing"):
        measured(RunFolder(tmp_path / "run"))


def test_a_run_that_never_waited_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", wait_seconds=0.001, staleness=1)
    assert main(["plan", "--from", str(tmp_path / "run"), *SMALL]) == 0
    assert "the learner hardly waited" in capsys.readouterr().out


def test_the_scatter_of_the_means_tells_the_scatter_of_the_lengths(tmp_path: Path) -> None:
    write_run(tmp_path / "run", wait_seconds=1.0, num_steps=300)
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    source, sigma = random.Random(1), 0.5
    lengths = Lengths(LENGTH, sigma, 1024)
    for row in rows:
        row["completion_length_mean"] = statistics.fmean(lengths.draw(source) for _ in range(8))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured(RunFolder(path.parent)).rates.lengths.sigma == pytest.approx(sigma, rel=0.15)
    known = measured(RunFolder(path.parent), response_p99=2.5 * LENGTH).rates.lengths
    assert known == lengths_of(known.mean, 2.5 * LENGTH, 1024)


def test_a_run_that_has_hardly_begun_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_steps=6, wait_seconds=1.0)
    with pytest.raises(ConfigError, match="6 steps; at least 7 are needed"):
        measured(RunFolder(tmp_path / "run"))


def test_lengths_have_the_mean_and_the_percentile_that_were_asked_for() -> None:
    source, lengths = random.Random(1), lengths_of(1000, 3000, 100_000)
    drawn = sorted(lengths.draw(source) for _ in range(40_000))
    assert statistics.fmean(drawn) == pytest.approx(1000, rel=0.02)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(3000, rel=0.05)
    assert max(lengths_of(1000, 3000, 1500).draw(source) for _ in range(1000)) == 1500
    assert {lengths_of(1000, 1000, 5000).draw(source) for _ in range(9)} == {1000}


def test_completions_of_one_length_hold_half_of_their_tokens_on_average() -> None:
    assert lengths_of(1000, 1000, 5000).resident(8) == pytest.approx(8 * 500)


def reckoned(**factors: float) -> Rates:
    return reckon(
        ModelSize(8e9, 131_072),
        Hardware("h100", learner_gpus=8, replica_gpus=1),
        lengths_of(1000, 2000, 4000),
        prompt_tokens=500,
        group_size=8,
        verify_seconds=0.05,
        factors=Factors(**factors),
    ).rates


def test_the_roofline_is_that_of_the_data_sheet() -> None:
    made = reckoned(bandwidth=1.0, compute=1.0, training=0.5, engine_seconds=0.0)
    assert made.decode.token_seconds(1, 0) == pytest.approx(16e9 / 3.35e12)
    assert made.decode.token_seconds(1, 1e5) == pytest.approx((16e9 + 131_072e5) / 3.35e12)
    assert made.decode.token_seconds(1000, 0) == pytest.approx(1000 * 16e9 / 989e12)
    # The prompt of each completion is trained through as well.
    (train,) = made.train_seconds_per_token
    assert train == pytest.approx(1.5 * 8 * 8e9 / (8 * 989e12 * 0.5))
    assert made.verify_seconds == pytest.approx(8 * 0.05)


def test_training_waits_for_the_copy_of_a_checkpoint_and_not_for_the_disk() -> None:
    made = reckoned(copy_gb_per_second=5.0, storage_gb_per_second=2.0)
    assert made.checkpoint_seconds == pytest.approx(14 * 8.0 / (5.0 * 8))
    assert made.checkpoint_write_seconds == pytest.approx(14 * 8.0 / 2.0)


def test_a_models_size_is_read_from_its_folder(tmp_path: Path) -> None:
    # Qwen2.5-7B, which its card says has 7.61 billion parameters.
    config = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = ModelSize.of_folder(tmp_path)
    assert size.parameters == pytest.approx(7.61e9, rel=0.005)
    assert size.kv_bytes == 2 * 2 * 28 * 4 * 128


def test_the_answer_is_a_table_with_a_choice_and_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *MODEL, *SMALL]) == 0
    output = capsys.readouterr().out
    assert "reckoned, not measured" in output
    assert "-> 2 replicas with max_staleness 2" in output
    assert "GPU hours a step, the fewest of these" in output


def test_programs_get_everything_and_people_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    assert main(["plan", *MODEL, *SMALL, "--seeds", "1", "--json", "--plot", str(picture)]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [each["num_replicas"] for each in answer["candidates"]] == [1, 2]
    assert answer["recommended"] == {"replicas": 2, "max_staleness": 2}
    rates = dict(answer["rates"])
    made = Rates(
        **{
            **rates,
            "lengths": Lengths(**rates["lengths"]),
            "decode": Decode(**rates["decode"]),
            "train_seconds_per_token": tuple(rates["train_seconds_per_token"]),
            "publishing": tuple(Publishing(*each) for each in rates["publishing"]),
        }
    )
    shape = Shape(**answer["shape"])
    again = Simulation(made, shape, seed=0).run(num_steps=8, skipped_steps=4)
    one = answer["candidates"][0]
    assert (one["steps_per_hour"], one["steps_margin"]) == (again.steps_per_hour, None)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parameters", "7e9"], "--gpu is needed without a run"),
        (["--parameters", "7e9", "--gpu", "h100"], "--response-mean is needed"),
        (
            ["--parameters", "7e9", "--gpu", "h1", "--response-mean", "9"],
            "--gpu h1: not in the table; use one of l4, l40s",
        ),
        (
            ["--parameters", "70e9", "--gpu", "h100", "--response-mean", "1000"],
            "an engine needs --replica-gpus 4",
        ),
        (
            ["--parameters", "32e9", "--gpu", "h100", "--response-mean", "1000",
             "--replica-gpus", "2", "--learner-gpus", "4"],
            "the learner needs --learner-gpus 8 (ZeRO-3)",
        ),
        ([*MODEL, "--response-p99", "500"], "--response-p99 500: must be 1 to 15.0 times"),
        ([*MODEL, "--replicas", "4", "0"], "--replicas 0: must be at least 1"),
        ([*MODEL, "--group-size", "-1"], "--group-size -1: must be above 0"),
        ([*MODEL, "--mfu", "35"], "--mfu 35.0: must be a share, 0 to 1"),
        ([*MODEL, "--batch-cost", "0.5"], "--batch-cost goes with --from; leave it out"),
        (["--from", ".", "--gpu", "h100"], "--gpu goes with --parameters or --model"),
        (["--model", "nowhere", *MODEL[2:]], "--model nowhere: config.json cannot be used"),
        ([*MODEL, *SMALL, "--plot", "nowhere/plan.png"], "--plot nowhere/plan.png: cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_with_a_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err
