"""The learner's engine on real DeepSpeed: every ZeRO stage, two ranks, resume, export."""

from __future__ import annotations

import os
import random
import resource
import shutil
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.learner.batch import MicroBatch, build_batch, collate
from services.learner.checkpoint import write_checkpoint
from services.learner.engine import LearnerEngine
from services.learner.export import export_checkpoint
from services.learner.passes import TrainedModel
from services.learner.policy import Policy
from services.learner.ranks import Ranks
from services.learner.reshape import reshaped
from services.learner.zero import CHECKPOINT_TAG
from shared.config import Environment, RunConfig
from shared.config.algorithm import PolicyLossConfig
from shared.errors import CheckpointError, ConfigError, StartError
from shared.records import (
    Completion,
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)
from tests.integration.rank_processes import JOB_SECONDS, RankProcesses, ranks_of
from tests.learner.fakes import (
    ONE_RANK,
    PlainModel,
    RecordingTrainer,
    make_trainer,
    sampled_groups,
    train_steps,
    weights_of,
)

pytestmark = pytest.mark.integration

STAGES = (0, 1, 2, 3)
VOCABULARY = 20
ALONE = Environment.read({})
Weights = dict[str, Tensor]


def save_model(folder: Path, *, vocabulary: int = VOCABULARY, tied: bool = True) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def run_config(**sections: dict[str, Any]) -> RunConfig:
    learner = {
        "groups_per_batch": 4,
        "optimizer_steps_per_batch": 2,
        "learning_rate": 3e-4,
        "micro_batch_tokens": 100,
        **sections.pop("learner", {}),
    }
    whole = {"run": {"name": "t", "num_steps": 9}, "model": {"path": "x"}, "learner": learner}
    return RunConfig.model_validate({**whole, **sections})


def scored_groups(seed: int, *, behaviour: float | None = None) -> list[ScoredGroup]:
    """Random prompts and completions; about half of them pass, the first was never judged."""
    draw = random.Random(seed)
    groups = []
    for index in range(4):
        completions, scores = [], []
        for _ in range(6):
            length = draw.randint(3, 14)
            token_ids = array("I", [draw.randrange(VOCABULARY) for _ in range(length)])
            logprobs = [behaviour or -draw.random() * 4 for _ in range(length)]
            runs = (VersionRun(0, length),)
            completions.append(Completion(token_ids, array("f", logprobs), runs, False))
            passed = draw.random() < 0.5
            scores.append(Score(Outcome.PASS if passed else Outcome.FAIL, float(passed), ""))
        if index == 0:
            scores[0] = Score(Outcome.ERROR, 0.0, "the scorer died")
        uid = GroupUid("t", seed, index, 0)
        prompt = array("I", [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 9))])
        head = PromptGroup(uid, Purpose.TRAIN, "t", index, prompt, "", 6, 1.0, 32, 0, 0.0)
        group = RolloutGroup(head, tuple(completions), "replica", 0.0)
        groups.append(ScoredGroup(group, tuple(scores), "verifier", 0.0))
    return groups


def snapshot(engine: LearnerEngine) -> Weights:
    return {name: weight.detach().clone() for name, weight in engine.weights()}


def broken_groups(seed: int) -> list[ScoredGroup]:
    """Two good groups, for one mini-batch, and two for another with a NaN in one completion."""
    *good, group = scored_groups(seed)
    first, *others = group.rollout.completions
    logprobs = array("f", [float("nan")] * len(first.token_ids))
    broken = replace(first, behaviour_logprobs=logprobs)
    return [*good, replace(group, rollout=replace(group.rollout, completions=(broken, *others)))]


def trained(
    config: RunConfig, model: Path, batches: Sequence[list[ScoredGroup]] | None = None
) -> Weights:
    engine = LearnerEngine.start(config, str(model), ALONE)
    try:
        for step, groups in enumerate(batches or [scored_groups(0), scored_groups(1)]):
            engine.train(groups, step=step, policy_version=step)
        return snapshot(engine)
    finally:
        engine.close()


def distance(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def logprobs_of(folder: Path, token_ids: list[int]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(token_ids[1:]).unsqueeze(-1))
    result: list[float] = chosen.squeeze(-1).tolist()
    return result


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    with ranks_of(run_rank) as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding is above ZeRO-3's threshold of 100,000 elements, so it is really split."""
    folder = tmp_path_factory.mktemp("wide")
    save_model(folder, vocabulary=2000)
    return folder


@pytest.fixture(scope="module")
def expected(wide_model: Path) -> Weights:
    return trained(run_config(), wide_model)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_trains_the_same_weights(
    stage: int, wide_model: Path, expected: Weights
) -> None:
    config = run_config(learner={"zero_stage": stage})
    assert distance(trained(config, wide_model), expected) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpointed_activations_train_the_same_weights(
    stage: int, wide_model: Path, expected: Weights
) -> None:
    config = run_config(learner={"zero_stage": stage, "activation_checkpointing": True})
    assert distance(trained(config, wide_model), expected) < 1e-5


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_offloaded_optimiser_trains_the_same_weights_and_refuses_the_same_steps(
    stage: int, wide_model: Path, expected: Weights
) -> None:
    config = run_config(learner={"zero_stage": stage, "offload": "cpu"})
    engine = LearnerEngine.start(config, str(wide_model), ALONE)
    assert engine._model._engine.zero_use_cpu_optimizer()
    before = snapshot(engine)
    poisoned = scored_groups(0, behaviour=float("nan"))
    report = engine.train(poisoned, step=0, policy_version=0)
    assert report.metrics["nonfinite_loss"] == 2
    assert distance(snapshot(engine), before) == 0
    for step in range(2):
        engine.train(scored_groups(step), step=step, policy_version=step)
    after = snapshot(engine)
    engine.close()
    assert distance(after, expected) < 1e-5


def test_an_untied_head_is_gathered_too(tmp_path: Path) -> None:
    save_model(tmp_path, vocabulary=2000, tied=False)
    whole = trained(run_config(), tmp_path)
    assert "lm_head.weight" in whole
    assert distance(trained(run_config(learner={"zero_stage": 3}), tmp_path), whole) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tokens", [30, 100_000])
def test_the_size_of_micro_batches_does_not_change_the_step(
    stage: int, tokens: int, wide_model: Path, expected: Weights
) -> None:
    config = run_config(learner={"zero_stage": stage, "micro_batch_tokens": tokens})
    assert distance(trained(config, wide_model), expected) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_at_every_zero_stage(stage: int, model: Path) -> None:
    config = run_config(
        model={"path": "x", "dtype": "bfloat16"},
        learner={"zero_stage": stage, "learning_rate": 1e-2},
    )
    engine = LearnerEngine.start(config, str(model), ALONE)
    before = snapshot(engine)
    report = engine.train(scored_groups(0), step=0, policy_version=0)
    after = snapshot(engine)
    assert {spec.dtype for spec in engine.manifest()} == {"bfloat16"}
    engine.close()
    assert distance(before, after) > 0
    assert report.metrics["ratio_max"] > 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(stage: int, model: Path) -> None:
    config = run_config(learner={"zero_stage": stage})
    engine = LearnerEngine.start(config, str(model), ALONE)
    before = snapshot(engine)
    poisoned = scored_groups(0, behaviour=float("nan"))
    report = engine.train(poisoned, step=0, policy_version=0)
    assert report.metrics["nonfinite_loss"] == 2
    assert report.metrics["nonfinite_grad"] == 0
    assert not {"loss", "grad_norm"} & report.metrics.keys()
    assert distance(snapshot(engine), before) == 0
    engine.train(scored_groups(0), step=0, policy_version=0)
    engine.train(scored_groups(1), step=1, policy_version=1)
    after = snapshot(engine)
    engine.close()
    assert distance(after, trained(config, model)) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_told_from_a_loss(stage: int, model: Path) -> None:
    engine = LearnerEngine.start(run_config(learner={"zero_stage": stage}), str(model), ALONE)
    before = snapshot(engine)
    weight = engine._policy.model.model.norm.weight
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    report = engine.train(scored_groups(0), step=0, policy_version=0)
    hook.remove()
    assert report.metrics["nonfinite_grad"] == 2
    assert report.metrics["nonfinite_loss"] == 0
    assert distance(snapshot(engine), before) == 0
    assert engine.train(scored_groups(0), step=0, policy_version=0).metrics["grad_norm"] > 0
    engine.close()


def test_one_broken_minibatch_does_not_stop_the_other(model: Path) -> None:
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    report = engine.train(broken_groups(0), step=0, policy_version=0)
    engine.close()
    assert report.metrics["nonfinite_loss"] == 1
    assert report.metrics["grad_norm"] > 0


def test_weights_are_those_of_a_hugging_face_checkpoint(model: Path) -> None:
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    manifest, weights = engine.manifest(), snapshot(engine)
    engine.close()
    loaded = Qwen2ForCausalLM.from_pretrained(model)
    reference = {name: weight.detach() for name, weight in loaded.named_parameters()}
    assert [spec.name for spec in manifest] == list(weights)
    assert all(weights[spec.name].shape == spec.shape for spec in manifest)
    assert all(weights[spec.name].dtype == spec.torch_dtype for spec in manifest)
    assert distance(weights, reference) == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_an_exported_model_is_the_trained_one(stage: int, wide_model: Path, tmp_path: Path) -> None:
    engine = LearnerEngine.start(run_config(learner={"zero_stage": stage}), str(wide_model), ALONE)
    next(engine.weights())
    engine.train(scored_groups(0), step=0, policy_version=0)
    engine.export(tmp_path)
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6]
    scores = engine.score_tokens(token_ids)
    engine.close()
    assert scores == pytest.approx(logprobs_of(tmp_path, token_ids), abs=1e-5)
    assert scores != pytest.approx(logprobs_of(wide_model, token_ids), abs=1e-3)
    assert (tmp_path / "tokenizer_config.json").exists()


def test_a_sharded_model_is_never_whole_while_its_weights_are_taken(tmp_path: Path) -> None:
    save_model(tmp_path, vocabulary=40_000, tied=False)
    config = run_config(learner={"zero_stage": 3}, weights={"bucket_mib": 1})
    engine = LearnerEngine.start(config, str(tmp_path), ALONE)
    sizes = {spec.name: spec.num_bytes for spec in engine.manifest()}
    shards = list(engine._policy.model.parameters())
    # DeepSpeed keeps small ones whole once a pass has met them.
    assert max(each.numel() for each in shards) < 100_000
    taken: list[tuple[weakref.ref[Tensor], int]] = []
    held = []
    for name, weight in engine.weights():
        taken.append((weakref.ref(weight), sizes[name]))
        copies = sum(size for copy, size in taken if copy() is not None)
        held.append(copies + sum(each.numel() * each.element_size() for each in shards))
    engine.close()
    # Two matrices of the vocabulary are nearly all of it, each a bucket of its own.
    assert max(sizes.values()) <= max(held) < 0.6 * sum(sizes.values())


def test_scores_need_a_token_after_the_first(model: Path) -> None:
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    with pytest.raises(ValueError, match="one more is needed"):
        engine.score_tokens([1])
    engine.close()


def test_training_on_a_batch_raises_the_probability_of_what_was_rewarded(model: Path) -> None:
    groups = scored_groups(7)
    config = run_config(learner={"optimizer_steps_per_batch": 1, "learning_rate": 3e-3})
    engine = LearnerEngine.start(config, str(model), ALONE)
    before = _mean_scores(engine, groups)
    for step in range(8):
        engine.train(groups, step=step, policy_version=step)
    after = _mean_scores(engine, groups)
    engine.close()
    assert after[Outcome.PASS] > before[Outcome.PASS] + 0.1
    assert after[Outcome.FAIL] < before[Outcome.FAIL]


def _mean_scores(engine: LearnerEngine, groups: list[ScoredGroup]) -> dict[Outcome, float]:
    sums = {Outcome.PASS: [0.0, 0], Outcome.FAIL: [0.0, 0]}
    for group in groups:
        prompt = group.rollout.prompt.prompt_token_ids
        for completion, score in zip(group.rollout.completions, group.scores, strict=True):
            if not score.outcome.is_verdict:
                continue
            scores = engine.score_tokens([*prompt, *completion.token_ids])[len(prompt) - 1 :]
            sums[score.outcome][0] += sum(scores)
            sums[score.outcome][1] += len(scores)
    return {outcome: total / count for outcome, (total, count) in sums.items()}


def test_on_policy_the_ratio_is_exactly_one(model: Path) -> None:
    config = run_config(learner={"optimizer_steps_per_batch": 1})
    engine = LearnerEngine.start(config, str(model), ALONE)
    metrics = engine.train(scored_groups(0), step=0, policy_version=2).metrics
    engine.close()
    assert metrics["ratio_max"] == metrics["ratio_mean"] == 1
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert metrics["staleness_max"] == 2


def test_only_what_applies_is_measured(model: Path) -> None:
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    plain = engine.train(scored_groups(0), step=0, policy_version=1)
    engine.close()
    config = run_config(
        policy_loss={"loss_mode": "kl_cov", "kl_cov_ratio": 0.05},
        entropy={"method": "aent", "entropy_coeff": 0.002},
        off_policy={"method": "none"},
    )
    engine = LearnerEngine.start(config, str(model), ALONE)
    rich = engine.train(scored_groups(0), step=0, policy_version=1)
    after = engine.train(scored_groups(1), step=1, policy_version=1)
    engine.close()
    assert plain.histograms["staleness"] == [(1, 23)]
    assert sum(plain.profiles["entropy_histogram"]) == plain.metrics["tokens"]
    assert len(plain.profiles["entropy_by_position"]) == 10
    assert rich.metrics.keys() - plain.metrics.keys() == {
        "entropy_clamped",
        "entropy_clamped_seq_mean",
        "entropy_removed_mass",
        "entropy_coefficient",
        "entropy_loss",
        "selected_tokens",
        "selected_quota",
        "selected_fraction",
        "selected_abs_advantage_mean",
        "selected_negative_advantage_fraction",
        "selected_probability_mean",
    }
    assert plain.metrics.keys() - rich.metrics.keys() == {
        "clip_fraction_low",
        "clip_fraction_high",
        "importance_weight_mean",
        "importance_weight_ess",
    }
    assert rich.metrics["selected_tokens"] == rich.metrics["selected_quota"]
    assert rich.metrics["entropy_coefficient"] == 0.002
    # The clamped entropy is far above the band, so the coefficient falls.
    assert after.metrics["entropy_coefficient"] < 0.002


def test_per_micro_batch_selection_takes_at_least_a_token_in_each(model: Path) -> None:
    selected = {}
    for scope in ("global", "micro"):
        config = run_config(policy_loss={"loss_mode": "kl_cov", "scope": scope})
        engine = LearnerEngine.start(config, str(model), ALONE)
        metrics = engine.train(scored_groups(0), step=0, policy_version=0).metrics
        engine.close()
        assert metrics["selected_tokens"] == metrics["selected_quota"]
        selected[scope] = metrics["selected_tokens"]
    # One of each of two mini-batches, against one of each of their micro-batches.
    assert selected["global"] == 2
    assert selected["micro"] > 2


def test_entropy_is_measured_at_temperature_one_whatever_the_sampler_used(model: Path) -> None:
    entropies = []
    for temperature in (1.0, 0.5):
        config = run_config(rollout={"temperature": temperature})
        engine = LearnerEngine.start(config, str(model), ALONE)
        report = engine.train(scored_groups(0), step=0, policy_version=0)
        entropies.append(report.metrics["entropy"])
        engine.close()
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)


def test_a_batch_without_verdicts_trains_nothing(model: Path) -> None:
    groups = [
        ScoredGroup(each.rollout, (Score(Outcome.ERROR, 0.0, "boom"),) * 6, "verifier", 0.0)
        for each in scored_groups(0)
    ]
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    before = snapshot(engine)
    report = engine.train(groups, step=0, policy_version=0)
    assert distance(snapshot(engine), before) == 0
    engine.close()
    assert report.metrics["verifier_errors"] == 24
    assert report.metrics["completions"] == 0
    assert "entropy" not in report.metrics


def test_the_learning_rate_warms_up_and_stays(model: Path) -> None:
    config = run_config(learner={"lr_warmup_steps": 3, "learning_rate": 3e-3})
    engine = LearnerEngine.start(config, str(model), ALONE)
    rates = [
        engine.train(scored_groups(step), step=step, policy_version=0).metrics["learning_rate"]
        for step in range(3)
    ]
    engine.close()
    assert rates == pytest.approx([2e-3, 3e-3, 3e-3])


RESUMED: dict[str, Any] = {
    "entropy": {"method": "aent", "entropy_coeff": 0.002},
    "policy_loss": {
        "loss_mode": "clip_cov",
        "clip_cov_ratio": 0.02,
        "clip_cov_lb": 0.1,
        "top_entropy_quantile": 0.7,
    },
    "reference_kl": {"coef": 0.1},
}


@pytest.fixture(scope="module")
def chosen_in_small_micro_batches(wide_model: Path) -> Weights:
    return trained(run_config(learner={"micro_batch_tokens": 30}, **RESUMED), wide_model)


@pytest.mark.parametrize("stage", STAGES)
def test_the_training_pass_may_measure_for_the_choice_at_every_zero_stage(
    stage: int, wide_model: Path, chosen_in_small_micro_batches: Weights
) -> None:
    learner = {"zero_stage": stage, "micro_batch_tokens": 100_000}
    weights = trained(run_config(learner=learner, **RESUMED), wide_model)
    assert distance(weights, chosen_in_small_micro_batches) < 1e-5


def reference_config(stage: int, coefficient: float) -> RunConfig:
    return run_config(
        learner={"zero_stage": stage, "learning_rate": 3e-3, "optimizer_steps_per_batch": 1},
        reference_kl={"coef": coefficient},
    )


def distances_to_start(engine: LearnerEngine, steps: Sequence[int]) -> list[float]:
    return [
        engine.train(scored_groups(0), step=step, policy_version=step).metrics["reference_kl"]
        for step in steps
    ]


@pytest.fixture(scope="module")
def distances_without_zero(wide_model: Path) -> list[float]:
    engine = LearnerEngine.start(reference_config(0, 0.01), str(wide_model), ALONE)
    try:
        return distances_to_start(engine, range(4))
    finally:
        engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_start_s_model_also_after_a_resume(
    stage: int, wide_model: Path, tmp_path: Path, distances_without_zero: list[float]
) -> None:
    config = reference_config(stage, 0.01)
    engine = LearnerEngine.start(config, str(wide_model), ALONE)
    before = distances_to_start(engine, range(2))
    save(engine, tmp_path)
    engine.close()
    engine = LearnerEngine.start(config, str(wide_model), ALONE)
    engine.load(tmp_path)
    after = distances_to_start(engine, range(2, 4))
    engine.close()
    assert [*before, *after] == pytest.approx(distances_without_zero, rel=1e-2, abs=1e-9)
    assert before[0] == pytest.approx(0, abs=1e-9)
    assert 1e-5 < before[1] < after[0] < after[1]


def test_the_reference_s_coefficient_pulls_the_policy_back(model: Path) -> None:
    ends = []
    for coefficient in (1e-6, 3.0):
        engine = LearnerEngine.start(reference_config(0, coefficient), str(model), ALONE)
        ends.append(distances_to_start(engine, range(6))[-1])
        engine.close()
    assert ends[1] < 0.5 * ends[0]


def test_the_measured_change_of_the_entropy_is_that_between_two_measurements(model: Path) -> None:
    config = run_config(
        learner={"learning_rate": 3e-3}, diagnostics={"entropy_change_every_steps": 1}
    )
    engine = LearnerEngine.start(config, str(model), ALONE)
    metrics = [
        engine.train(scored_groups(0), step=step, policy_version=step).metrics for step in range(3)
    ]
    engine.close()
    for earlier, later in pairwise(metrics):
        difference = later["entropy"] - earlier["entropy"]
        assert earlier["entropy_change_measured"] == pytest.approx(difference, abs=1e-6)
        assert abs(difference) > 1e-4


def sampled_by(policy: Policy, seed: int) -> list[ScoredGroup]:
    """Ten tokens a completion by the policy itself; the reward is the share of odd ones."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for group in scored_groups(seed):
        prompt = list(group.rollout.prompt.prompt_token_ids)
        token_ids, reported = torch.tensor([prompt] * 6), []
        for _ in range(10):
            with torch.no_grad():
                logprobs = policy.model(token_ids).logits[:, -1].log_softmax(-1)
            drawn = torch.multinomial(logprobs.exp(), 1, generator=generator)
            reported.append(logprobs.gather(-1, drawn))
            token_ids = torch.cat([token_ids, drawn], dim=1)
        drawn_ids = token_ids[:, len(prompt) :]
        completions = tuple(
            Completion(array("I", ids), array("f", values), (VersionRun(0, 10),), False)
            for ids, values in zip(
                drawn_ids.tolist(), torch.cat(reported, dim=1).tolist(), strict=True
            )
        )
        rewards = (drawn_ids % 2).double().mean(-1).tolist()
        scores = tuple(Score(Outcome.FAIL, reward, "") for reward in rewards)
        rollout = replace(group.rollout, completions=completions)
        groups.append(ScoredGroup(rollout, scores, "verifier", 0.0))
    return groups


def test_on_policy_the_predicted_changes_of_the_entropy_have_its_sign_in_most_steps(
    model: Path,
) -> None:
    config = run_config(
        learner={"optimizer_steps_per_batch": 1, "micro_batch_tokens": 100_000},
        policy_loss={"loss_mode": "unclipped"},
        off_policy={"method": "none"},
        diagnostics={"entropy_change_every_steps": 1},
    )
    policy = Policy.load(str(model), dtype=torch.float32, chunk=1024)
    descent = torch.optim.SGD(policy.parameters(), lr=3e-3)
    trainer = RecordingTrainer(config, PlainModel(policy, descent, max_grad_norm=1e9))
    metrics = [
        train_steps(trainer, [sampled_by(policy, step)], first_step=step)[0].metrics
        for step in range(1, 21)
    ]
    measured = torch.tensor([each["entropy_change_measured"] for each in metrics])
    for name in ("influence", "npg", "pg"):
        predicted = torch.tensor([each[f"entropy_change_predicted_{name}"] for each in metrics])
        assert int((measured * predicted > 0).sum()) >= 15, name
        assert float(torch.corrcoef(torch.stack([measured, predicted]))[0, 1]) > 0.5, name


def exercise(model: TrainedModel, micro_batches: list[MicroBatch]) -> list[Tensor]:
    """All that can be seen of a `TrainedModel` over three updates, the second refused."""
    seen: list[Tensor] = []
    for scale in (1.0, float("nan"), 1.0):
        for place, each in enumerate(micro_batches, start=1):
            measured = model.forward(each, temperature=0.8, clamp_p=0.3, with_mean_pull=True)
            seen += [value.detach().clone() for value in measured if value is not None]
            seen.append(model.reference_logprobs(each, temperature=0.8).detach().clone())
            assert measured.clamped_entropy is not None
            loss = (measured.logprob + measured.entropy - measured.clamped_entropy).sum() * scale
            model.accumulate(loss, is_last=place == len(micro_batches))
        taken = model.step()
        assert taken.is_applied == (scale == 1.0)
        seen.append(torch.tensor([taken.learning_rate, taken.grad_norm if scale == 1.0 else 0.0]))
    bare = model.forward(micro_batches[0], temperature=1.0)
    assert bare.clamped_entropy is bare.removed_mass is bare.mean_pull is None
    return [*seen, bare.logprob.detach(), bare.entropy.detach()]


@pytest.mark.parametrize("stage", STAGES)
def test_the_plain_model_of_the_unit_tests_does_what_the_one_on_deepspeed_does(
    stage: int, wide_model: Path
) -> None:
    config = reference_config(stage, 0.1)
    batch = build_batch(scored_groups(0), config, policy_version=0)
    micro_batches = [collate(batch, range(9)), collate(batch, range(9, 23))]
    engine = LearnerEngine.start(config, str(wide_model), ALONE)
    on_deepspeed = exercise(engine._trainer._model, micro_batches)
    engine.close()
    policy = Policy.load(str(wide_model), dtype=torch.float32, chunk=1024)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    plain = exercise(PlainModel(policy, optimizer), micro_batches)
    for left, right in zip(plain, on_deepspeed, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def save(engine: LearnerEngine, folder: Path) -> None:
    with engine.snapshot(copies=True) as taken:
        taken.write(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_goes_on_bit_for_bit(stage: int, model: Path, tmp_path: Path) -> None:
    config = run_config(learner={"zero_stage": stage, "lr_warmup_steps": 3}, **RESUMED)
    engine = LearnerEngine.start(config, str(model), ALONE)
    for step in range(2):
        engine.train(scored_groups(step), step=step, policy_version=step)
    save(engine, tmp_path)
    reports = [engine.train(scored_groups(step), step=step, policy_version=step) for step in (2, 3)]
    straight = snapshot(engine)
    engine.close()

    engine = LearnerEngine.start(config, str(model), ALONE)
    engine.load(tmp_path)
    again = [engine.train(scored_groups(step), step=step, policy_version=step) for step in (2, 3)]
    resumed = snapshot(engine)
    engine.close()
    assert again == reports
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_new_process_resumes_bit_for_bit(
    model: Path, tmp_path: Path, processes: RankProcesses
) -> None:
    engine = LearnerEngine.start(run_config(**RESUMED), str(model), ALONE)
    for step in range(2):
        engine.train(scored_groups(step), step=step, policy_version=step)
    save(engine, tmp_path / "checkpoint")
    for step in (2, 3):
        engine.train(scored_groups(step), step=step, policy_version=step)
    straight = snapshot(engine)
    engine.close()
    processes.run("alone0", tmp_path, model, num_ranks=1)
    resumed = torch.load(tmp_path / "resumed.pt")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    engine = LearnerEngine.start(run_config(learner={"zero_stage": 1}), str(model), ALONE)
    engine.train(scored_groups(0), step=0, policy_version=0)
    save(engine, folder)
    engine.close()
    return folder


@pytest.fixture
def fresh(model: Path) -> Iterator[LearnerEngine]:
    engine = LearnerEngine.start(run_config(learner={"zero_stage": 1}), str(model), ALONE)
    yield engine
    engine.close()


def test_a_folder_that_is_no_checkpoint_is_refused(fresh: LearnerEngine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        fresh.load(tmp_path)


@pytest.mark.parametrize("part", ["model_states", "optim_states"])
@pytest.mark.parametrize("damage", ["missing", "short", "overwritten"])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    part: str, damage: str, fresh: LearnerEngine, checkpoint: Path
) -> None:
    (path,) = (checkpoint / "state").glob(f"*{part}.pt")
    whole = path.read_bytes()
    broken = {"short": whole[: len(whole) // 2], "overwritten": b"\0" * len(whole)}
    path.unlink() if damage == "missing" else path.write_bytes(broken[damage])
    try:
        with pytest.raises(CheckpointError) as caught:
            fresh.load(checkpoint)
    finally:
        path.write_bytes(whole)
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def test_a_checkpoint_of_another_zero_stage_is_refused(model: Path, checkpoint: Path) -> None:
    engine = LearnerEngine.start(run_config(), str(model), ALONE)
    with pytest.raises(CheckpointError, match="zero_stage = 1, this run has 0"):
        engine.load(checkpoint)
    engine.close()


@pytest.mark.parametrize("room", [2**16, None])
def test_a_full_disk_is_no_damage_when_a_checkpoint_is_reshaped(
    checkpoint: Path, tmp_path: Path, room: int | None
) -> None:
    """torch says of it only where it stood in the file."""
    folder = shutil.copytree(checkpoint, tmp_path / "engine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room is None:
        (path,) = (folder / "state").glob("*optim_states.pt")
        path.write_bytes(b"\0" * path.stat().st_size)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught, reshaped(folder, CHECKPOINT_TAG):
            pytest.fail("it was reshaped")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused = "File too large); have 0.00" in str(caught.value)
    assert refused == (room is not None), caught.value
    assert ("cannot be read" in str(caught.value)) == (room is None)
    assert sorted(os.listdir(folder)) == ["parts.json", "state"]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nowhere"):
        LearnerEngine.start(run_config(), str(tmp_path / "nowhere"), ALONE)


def test_ranks_without_a_port_are_refused(model: Path) -> None:
    pair = Environment.read({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        LearnerEngine.start(run_config(), str(model), pair)


def test_a_model_whose_attention_is_not_ours_is_trained_in_padded_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    shape = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.3,
    )
    GptOssForCausalLM(shape).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "services.learner.zero"):
        engine = LearnerEngine.start(run_config(), str(tmp_path), ALONE)
    assert "cannot be packed" in caplog.text
    assert engine._policy.cost.is_padded
    token_ids = [3, 1, 4, 1, 5]
    scores = engine.score_tokens(token_ids)
    assert engine.train(scored_groups(0), step=0, policy_version=0).metrics["grad_norm"] > 0
    engine.close()
    assert scores == pytest.approx(logprobs_of(tmp_path, token_ids), abs=1e-5)


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest,
    wide_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    processes: RankProcesses,
) -> tuple[int, Path]:
    """ZeRO stage of two ranks that trained, and the folder with what they left."""
    stage: int = request.param
    folder = tmp_path_factory.mktemp(f"pair{stage}")
    processes.run(f"train{stage}", folder, wide_model, num_ranks=2)
    return stage, folder


@pytest.mark.parametrize("pair", [0, 2, 3], indirect=True)
def test_two_ranks_train_the_weights_of_one(pair: tuple[int, Path], wide_model: Path) -> None:
    stage, folder = pair
    together = torch.load(folder / "trained.pt")
    alone = trained(pair_config(stage), wide_model, PAIR_BATCHES)
    assert distance(together, alone) < 1e-5
    scores, metrics = torch.load(folder / "measured.pt")
    assert scores == pytest.approx(logprobs_of(folder / "export", [1, 2, 3]), abs=1e-5)
    assert metrics["selected_tokens"] > 0
    assert metrics["nonfinite_loss"] == 1
    refusal = (folder / "refusal").read_text()
    assert ("rank 1" in refusal) == (stage > 0), refusal  # without ZeRO rank 1 has no file


@pytest.mark.parametrize("pair", [0, 2, 3], indirect=True)
def test_a_checkpoint_of_two_ranks_is_exported_as_they_would_have(
    pair: tuple[int, Path], wide_model: Path, tmp_path: Path
) -> None:
    stage, folder = pair
    config = run_config(
        model={"path": str(wide_model)}, learner={"zero_stage": stage, "threads": 1}
    )

    def copy(engine: Path) -> None:
        shutil.copytree(folder / "checkpoint", engine)

    whole = write_checkpoint(tmp_path, step=1, state={}, save_engine=copy)
    export_checkpoint(config, whole, tmp_path / "export", report=print)
    ours, theirs = (
        load_file(exported / "model.safetensors")
        for exported in (tmp_path / "export", folder / "export-of-checkpoint")
    )
    assert distance(ours, theirs) == 0
    assert distance(ours, load_file(folder / "export/model.safetensors")) > 0


@pytest.mark.parametrize("pair", [3], indirect=True)
def test_two_ranks_resume_bit_for_bit(
    pair: tuple[int, Path], wide_model: Path, processes: RankProcesses
) -> None:
    _, folder = pair
    processes.run("resume3", folder, wide_model, num_ranks=2)
    straight, resumed = torch.load(folder / "trained.pt"), torch.load(folder / "resumed.pt")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("pair", [0, 2, 3], indirect=True)
def test_a_run_goes_on_with_one_rank_instead_of_two_and_with_two_again(
    pair: tuple[int, Path], wide_model: Path, tmp_path: Path, processes: RankProcesses
) -> None:
    stage, folder = pair
    alone = LearnerEngine.start(pair_config(stage), str(wide_model), ALONE)
    alone.load(folder / "checkpoint")
    before = snapshot(alone)
    save(alone, tmp_path / "checkpoint")
    alone.train(PAIR_BATCHES[1], step=1, policy_version=1)
    after = snapshot(alone)
    alone.close()
    together = torch.load(folder / "trained.pt")
    assert distance(together, after) < 1e-5 < 1e-4 < distance(before, after)
    assert not list((folder / "checkpoint").glob("*universal*"))
    processes.run(f"resume{stage}", tmp_path, wide_model, num_ranks=2)
    assert distance(torch.load(tmp_path / "resumed.pt"), together) < 1e-5


def test_two_ranks_choose_the_tokens_of_one_and_sum_to_its_gradient(
    tmp_path: Path, model: Path, processes: RankProcesses
) -> None:
    processes.run("choose0", tmp_path, model, num_ranks=2)
    together = torch.load(tmp_path / "chosen.pt")
    for name, config in CHOICES.items():
        *alone, weights = choose(config, ONE_RANK)
        *chosen, of_both = together[name]
        assert all(torch.equal(*pair) for pair in zip(alone, chosen, strict=True)), name
        assert all(bool(each.any()) for each in alone), name
        torch.testing.assert_close(of_both, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_ends_when_the_other_dies(
    dying: int, model: Path, tmp_path: Path, processes: RankProcesses
) -> None:
    ranks = processes.start(f"die{dying}", tmp_path, model, num_ranks=2)
    assert ranks[dying].ended(seconds=JOB_SECONDS) == 9
    assert ranks[1 - dying].ended(seconds=JOB_SECONDS) == 1
    assert f"EngineError: rank {1 - dying} cannot go on" in ranks[1 - dying].printed


# The NaN is on one rank only, and must stop the other rank's step as well.
PAIR_BATCHES = (scored_groups(0), broken_groups(1))


def pair_config(stage: int) -> RunConfig:
    """Rows that do not come out even over two ranks, one a micro-batch.

    Under ZeRO-2 a mini-batch is one micro-batch a rank: the training pass measures for the choice.
    """
    tokens = 100_000 if stage == 2 else 1
    return run_config(learner={"zero_stage": stage, "micro_batch_tokens": tokens}, **RESUMED)


def lora_config(stage: int, **lora: Any) -> RunConfig:
    settings = {"rank": 4, "alpha": 16, **lora}
    return run_config(learner={"zero_stage": stage, "learning_rate": 3e-3, "lora": settings})


AGGREGATIONS = get_args(PolicyLossConfig.model_fields["loss_agg_mode"].annotation)
KL_COV = {"loss_mode": "kl_cov", "kl_cov_ratio": 0.05}
CLIP_COV = {"loss_mode": "clip_cov", "clip_cov_ratio": 0.05, "clip_cov_lb": 0.1}
CHOICES = {
    f"{name}-{tokens}": run_config(
        learner={"learning_rate": 0.02, "micro_batch_tokens": tokens},
        policy_loss={**loss, "top_entropy_quantile": 0.3},
    )
    for name, loss in (("kl_cov", KL_COV), ("clip_cov", CLIP_COV), ("vanilla", {}))
    for tokens in (1, 100_000)
} | {
    # Ranks and micro-batches of unlike numbers of tokens, and a whole batch on one of each.
    f"{mode}-{tokens}": run_config(
        learner={"learning_rate": 0.02, "micro_batch_tokens": tokens},
        policy_loss={"loss_agg_mode": mode, "top_entropy_quantile": 0.3},
    )
    for mode in AGGREGATIONS
    for tokens in (40, 100_000)
}


def choose(config: RunConfig, ranks: Ranks) -> list[Tensor]:
    """By step which tokens were selected and kept, and at last the weights."""
    trainer = make_trainer(config, ranks=ranks)
    train_steps(trainer, [sampled_groups(0), sampled_groups(1)])
    pairs = [(each.selected, each.kept) for each in trainer.records]
    return [each for pair in pairs for each in pair if each is not None] + [weights_of(trainer)]


def choose_on_ranks(folder: Path) -> None:
    ranks = Ranks.join(Environment.read())
    chosen = {name: choose(config, ranks) for name, config in CHOICES.items()}
    if ranks.rank == 0:
        torch.save(chosen, folder / "chosen.pt")
    dist.destroy_process_group()


def run_rank(job: str, folder: Path, model: Path) -> None:
    """One rank's part of a job, whose last character is its ZeRO stage or the rank to die."""
    name, stage = job[:-1], int(job[-1])
    if name == "choose":
        choose_on_ranks(folder)
        return
    configs = {"alone": run_config(**RESUMED), "lora": lora_config(stage)}
    config = configs.get(name) or pair_config(stage)
    engine = LearnerEngine.start(config, str(model), Environment.read())
    if name == "die" and engine.rank == stage:
        os._exit(9)
    if engine.rank > 0:
        engine.follow()
        return
    try:
        JOBS[name](engine, folder)
    finally:
        engine.close()


def _alone(engine: LearnerEngine, folder: Path) -> None:
    engine.load(folder / "checkpoint")
    for step in (2, 3):
        engine.train(scored_groups(step), step=step, policy_version=step)
    torch.save(snapshot(engine), folder / "resumed.pt")


def _refuse(engine: LearnerEngine, folder: Path) -> str:
    """What rank 0 hears when the disk takes nothing of rank 1, as here: a folder is in the way."""
    for name in ("bf16_zero_pp_rank_1", "zero_pp_rank_1"):
        (folder / f"state/{name}_mp_rank_00_optim_states.pt").mkdir(parents=True)
    try:
        save(engine, folder)
    except OSError as error:
        return str(error)
    return ""


def _train(engine: LearnerEngine, folder: Path) -> None:
    engine.train(PAIR_BATCHES[0], step=0, policy_version=0)
    (folder / "refusal").write_text(_refuse(engine, folder / "refused"))
    with engine.snapshot(copies=True):
        """Nobody writes it; the other rank does not wait for that."""
    save(engine, folder / "checkpoint")
    engine.export(folder / "export-of-checkpoint")
    engine.reassure()
    report = engine.train(PAIR_BATCHES[1], step=1, policy_version=1)
    # A publication that is given up on must not leave the other rank behind.
    next(engine.weights())
    engine.export(folder / "export")
    torch.save((engine.score_tokens([1, 2, 3]), report.metrics), folder / "measured.pt")
    torch.save(snapshot(engine), folder / "trained.pt")


def _resume(engine: LearnerEngine, folder: Path) -> None:
    engine.load(folder / "checkpoint")
    engine.train(PAIR_BATCHES[1], step=1, policy_version=1)
    torch.save(snapshot(engine), folder / "resumed.pt")


JOBS = {"alone": _alone, "train": _train, "lora": _train, "resume": _resume, "die": _train}
