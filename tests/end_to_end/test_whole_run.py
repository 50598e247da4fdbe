"""One run from the first process to the report, looked at while it lives and after its end."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client import Metric
from transformers import AutoModelForCausalLM

from protos import learner_pb2 as learner_pb
from protos import rollout_pb2 as rollout_pb
from protos import rollout_pb2_grpc, verifier_pb2_grpc
from protos import trajectory_pb2 as trajectory_pb
from protos import verifier_pb2 as verifier_pb
from shared.codec import unpack_logprobs, unpack_token_ids
from shared.config import load_run
from shared.lease import Member
from shared.tasks.registry import load_task
from shared.tokenizer import Tokenizer
from tests.end_to_end.monitored import NO_PROMETHEUS, PROMETHEUS, Monitor, monitored
from tests.end_to_end.real_run import (
    CALL_SECONDS,
    EVALUATED_EVERY,
    GROUPS_PER_BATCH,
    RUN_ID,
    Row,
    Up,
    positions,
    processes_in,
    sample,
    write_run_file,
)
from tests.observability.answered import Answers

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

NUM_STEPS = 36
"""A step takes a tenth of a second: the pause must come before the end."""

MAX_STALENESS = 1
PAUSE_AT = 3
MEMBERS = {"learner", "rollout-0", "rollout-1", "verifier-0"}
NAMES = {
    "learner": "isentrope.v1.Learner",
    "rollout": "isentrope.v1.Rollout",
    "verifier": "isentrope.v1.Verifier",
}
PROMPT = "2 3>5="
NUM_GENERATED = 3
GAUGES = {
    "isentrope_learner_policy_entropy_nats": "entropy",
    "isentrope_learner_reward_mean": "reward_mean",
    "isentrope_learner_loss": "loss",
    "isentrope_learner_kl_behaviour_nats": "mismatch_kl",
    "isentrope_learner_learning_rate": "learning_rate",
    "isentrope_learner_eval_score": "eval_score",
    "isentrope_learner_entropy_consumed_ratio": "entropy_consumed",
    "isentrope_learner_entropy_law_identifiable": "law_identifiable",
    "isentrope_learner_policy_version": "policy_version",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """The services while the learner was paused between two steps."""

    rows: list[Row]
    steps: list[Row]
    learner: learner_pb.GetLearnerStatusResponse
    members: dict[str, Member]
    metrics: dict[str, dict[str, Metric]]
    health: dict[str, int]
    probed: dict[str, str]
    reflected: dict[str, set[str]]
    replicas: dict[str, rollout_pb.GetRolloutStatusResponse]
    generated: dict[str, rollout_pb.GenerateResponse]
    scored: verifier_pb.ScoreResponse
    answers: Answers | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The run after its end, and who looked at it if there is a Prometheus."""

    up: Up
    seen: Seen
    left: list[int]
    monitor: Monitor | None


@pytest.fixture(scope="module")
def finished(
    model: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Up]
) -> Finished:
    folder = tmp_path_factory.mktemp("whole")
    run_file = write_run_file(folder, model=model, num_steps=NUM_STEPS, max_staleness=MAX_STALENESS)
    up = start(folder, run_file, "--run-id", RUN_ID)
    up.until_says("learner is up")
    with up.paused():  # or one replica might do it all before the other's engine is there
        up.until_says("all services are up")
        up.until_serving({"rollout-0", "rollout-1"})
    with monitored(up) as monitor, up.paused(after_step=PAUSE_AT):
        seen = look(up, model, monitor)
    up.wait(0)
    return Finished(up, seen, processes_in(folder), monitor)


def look(up: Up, model: Path, monitor: Monitor | None) -> Seen:
    members = up.until_members(MEMBERS)
    channels = {name: up.open(each) for name, each in members.items()}
    replicas = [name for name, each in members.items() if each.role == "rollout"]
    prompt = Tokenizer(str(model)).encode_prompt(PROMPT)
    try:
        return Seen(
            rows=up.rows,
            steps=up.steps,
            learner=up.learner_status(),
            members=members,
            metrics={name: up.scrape(member) for name, member in members.items()},
            health={
                name: is_serving(channel, NAMES[members[name].role])
                for name, channel in channels.items()
            },
            probed={name: up.probe(member) for name, member in members.items()},
            reflected={
                name: set(ProtoReflectionDescriptorDatabase(channel).get_services())
                for name, channel in channels.items()
            },
            replicas={name: up.rollout_status(members[name]) for name in replicas},
            generated={name: generate(channels[name], prompt) for name in replicas},
            scored=score(channels["verifier-0"]),
            answers=None if monitor is None else monitor.until_answered(set(members)),
        )
    finally:
        for channel in channels.values():
            channel.close()


def is_serving(channel: grpc.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(request, timeout=CALL_SECONDS)
    return int(answer.status)


def generate(channel: grpc.Channel, prompt: array[int]) -> rollout_pb.GenerateResponse:
    request = rollout_pb.GenerateRequest(
        prompt_token_ids=prompt.tobytes(),
        num_completions=NUM_GENERATED,
        temperature=1.0,
        max_completion_tokens=16,
    )
    return rollout_pb2_grpc.RolloutStub(channel).Generate(request, timeout=CALL_SECONDS)


def score(channel: grpc.Channel) -> verifier_pb.ScoreResponse:
    request = verifier_pb.ScoreRequest(
        task="countdown", answer="2 3>5", completions=["2+3=5$", "3+2=5$", "2*3=6$", "2+3=5"]
    )
    return verifier_pb2_grpc.VerifierStub(channel).Score(request, timeout=CALL_SECONDS)


def newest(rows: list[Row], key: str) -> float:
    return next(float(row[key]) for row in reversed(rows) if row.get(key) is not None)


def test_every_service_is_healthy_and_describes_itself(finished: Finished) -> None:
    seen = finished.seen
    assert set(seen.members) == MEMBERS
    assert set(seen.health.values()) == {health_pb2.HealthCheckResponse.SERVING}
    assert set(seen.probed.values()) == {"OK\nOK\n"}
    for name, member in seen.members.items():
        assert NAMES[member.role] in seen.reflected[name]
        assert "grpc.health.v1.Health" in seen.reflected[name]


def test_the_learners_metrics_say_what_its_file_says(finished: Finished) -> None:
    seen = finished.seen
    families = seen.metrics["learner"]
    for series, key in GAUGES.items():
        assert sample(families, series) == pytest.approx(newest(seen.rows, key), rel=1e-9), series
    tokens = sum(row["tokens"] for row in seen.steps)
    assert sample(families, "isentrope_learner_steps_total") == len(seen.steps)
    assert sample(families, "isentrope_learner_tokens_trained_total") == tokens
    completions = sum(sum(row["staleness_counts"].values()) for row in seen.steps)
    staleness = "isentrope_learner_sample_staleness_versions"
    assert sample(families, f"{staleness}_count") == completions
    assert sample(families, f"{staleness}_bucket", le=f"{MAX_STALENESS:.1f}") == completions
    assert sample(families, "isentrope_learner_samples_consumed_total") == completions


def test_the_learners_status_says_what_its_file_says(finished: Finished) -> None:
    status, seen = finished.seen.learner, finished.seen
    assert (status.run_id, status.num_steps, status.is_paused) == (RUN_ID, NUM_STEPS, True)
    assert status.step == status.policy_version == newest(seen.steps, "step") >= PAUSE_AT
    for key in ("entropy", "reward_mean", "loss", "tokens"):
        assert status.metrics[key] == pytest.approx(newest(seen.rows, key), rel=1e-9)
    assert set(status.queue_depths) == {"prompts", "rollouts", "scored", "dead_letter"}
    assert status.queue_depths["dead_letter"] == 0
    assert dict(status.replicas) == dict.fromkeys(seen.replicas, f"serves {status.policy_version}")


def test_a_replica_shows_its_own_metrics_and_those_of_vllm(finished: Finished) -> None:
    seen = finished.seen
    for name, status in seen.replicas.items():
        families = seen.metrics[name]
        assert status.replica == name
        assert status.state == rollout_pb.REPLICA_STATE_SERVING
        version = sample(families, "isentrope_rollout_policy_version")
        assert version == status.policy_version == seen.learner.policy_version
        num_tokens = sample(families, "isentrope_rollout_generated_tokens_total")
        assert num_tokens == 0 or status.groups_sampled > 0
        of_vllm = [each for each in families if each.startswith("vllm:")]
        assert {"vllm:num_requests_running", "vllm:generation_tokens"} <= set(of_vllm)
        [generated] = families["vllm:generation_tokens"].samples
        assert generated.value > 0
    # One may have been slow to start; that both sample is asked of the whole run.
    assert any(status.groups_sampled > 0 for status in seen.replicas.values())


def test_a_verifier_shows_what_it_scored(finished: Finished) -> None:
    families = finished.seen.metrics["verifier-0"]
    results = families["isentrope_verifier_results"].samples
    scored = sum(each.value for each in results if each.name.endswith("_total"))
    trained = sum(row["completions"] for row in finished.seen.steps)
    assert scored >= trained


@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
def test_prometheus_has_an_answer_to_all_that_dashboard_and_rules_ask(finished: Finished) -> None:
    answers = finished.seen.answers
    assert answers is not None
    assert answers.scraped == set(finished.seen.members)
    assert answers.missing == ()
    assert answers.failing_rules == ()
    # The certificates of this run are good for an hour.
    assert ("IsentropeCertificateExpiring", "pending") in answers.alerts
    assert {state for _, state in answers.alerts} == {"pending"}


@pytest.mark.skipif(PROMETHEUS is None, reason=NO_PROMETHEUS)
def test_the_monitor_ends_with_its_prometheus_and_leaves_whom_it_scraped(
    finished: Finished,
) -> None:
    monitor = finished.monitor
    assert monitor is not None
    assert monitor.process.returncode == 0
    assert not monitor.listens()
    scraped = {each["labels"]["instance"]: each["targets"] for each in monitor.targets}
    members = finished.seen.members
    assert scraped == {name: [each.metrics_address] for name, each in members.items()}


def test_a_replica_answers_a_direct_call_with_log_probs_and_versions(finished: Finished) -> None:
    for name, answer in finished.seen.generated.items():
        assert len(answer.completions) == NUM_GENERATED
        for completion in answer.completions:
            token_ids = unpack_token_ids(completion.token_ids)
            logprobs = unpack_logprobs(completion.behaviour_logprobs)
            assert 1 <= len(token_ids) == len(logprobs) <= 16
            assert all(math.isfinite(each) and each <= 0 for each in logprobs)
            version = finished.seen.replicas[name].policy_version
            runs = [(run.policy_version, run.num_tokens) for run in completion.version_runs]
            assert runs == [(version, len(token_ids))]


def test_the_verifier_passes_what_solves_the_problem_and_nothing_else(finished: Finished) -> None:
    scores = finished.seen.scored.scores
    right, wrong = trajectory_pb.OUTCOME_PASS, trajectory_pb.OUTCOME_FAIL
    assert [each.outcome for each in scores] == [right, right, wrong, wrong]
    assert [each.reward for each in scores] == [1.0, 1.0, 0.0, 0.0]
    assert all(each.detail for each in scores)


def test_every_step_is_done_and_published(finished: Finished) -> None:
    steps = finished.up.steps
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert [row["policy_version"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert any(row["grad_norm"] for row in steps), "no step taught anything"


def test_both_replicas_sample_what_is_trained_on(finished: Finished) -> None:
    sampled = {name for row in finished.up.steps for name in row["replica_groups"]}
    assert sampled == {"rollout-0", "rollout-1"}
    for row in finished.up.steps:
        assert sum(row["replica_groups"].values()) == GROUPS_PER_BATCH


def test_nothing_over_the_staleness_bound_is_trained_on(finished: Finished) -> None:
    for row in finished.up.steps:
        assert row["groups_over_max_staleness"] == 0
        assert max(map(int, row["staleness_counts"])) <= MAX_STALENESS


def test_each_place_of_the_prompt_order_is_trained_on_once(finished: Finished) -> None:
    trained = finished.up.trained
    assert [row["step"] for row in trained] == list(range(1, NUM_STEPS + 1))
    places = positions(trained)
    assert len(places) == NUM_STEPS * GROUPS_PER_BATCH
    assert sorted(places) == first_places(finished.up.folder / "run.toml", len(places))


def first_places(run_file: Path, count: int) -> list[tuple[int, int]]:
    """(epoch, index) of the first places of the prompt order."""
    config = load_run(run_file)
    size = len(load_task(config.task.name, config.task.params).problems("train"))
    return [divmod(position, size) for position in range(count)]


def test_the_evaluations_that_were_due_are_in_the_file(finished: Finished) -> None:
    evaluations = [row for row in finished.up.rows if row.get("eval_score") is not None]
    assert sorted(row["eval_step"] for row in evaluations) == list(
        range(0, NUM_STEPS + 1, EVALUATED_EVERY)
    )
    for row in evaluations:
        assert row["eval_policy_version"] == row["eval_step"]
        assert row["eval_problems"] == len(row["eval_problem_scores"]) == 8
        assert 0 <= row["eval_score"] <= 1


def test_a_run_leaves_a_report_and_a_model_that_loads(finished: Finished) -> None:
    run = finished.up.run
    assert "<html" in (run / "report.html").read_text("utf8").lower()
    figures = list((run / "plots").glob("*.png"))
    assert figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.config.model_type == "qwen2"
    assert Tokenizer(str(run / "model")).encode_prompt(PROMPT)
    assert finished.up.checkpoints[-1] == NUM_STEPS


def test_the_closing_table_sums_the_run_up(finished: Finished) -> None:
    printed = finished.up.printed
    assert finished.up.errors == ""
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert f"{NUM_STEPS} of {NUM_STEPS}" in lines["steps"]
    completions = sum(sum(row["staleness_counts"].values()) for row in finished.up.steps)
    assert f"0 of {completions}" in lines["trajectories over max_staleness"]
    assert str(finished.up.run / "report.html") in lines["report"]
    assert str(finished.up.run / "model") in lines["model"]
    assert [f"step {step}/{NUM_STEPS} " in printed for step in range(1, NUM_STEPS + 1)] == (
        [True] * NUM_STEPS
    )


def test_nobody_of_a_finished_run_is_left(finished: Finished) -> None:
    assert finished.left == []
    assert not (finished.up.run / "redis-url").exists()
    assert list((finished.up.folder / "tmp").glob("isentrope-*")) == []
