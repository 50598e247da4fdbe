"""Evaluation through the same streams, and the entropy law that is fitted on it.

An evaluation puts held-out problems on `prompts` for the version just published; training goes on
meanwhile. When the last group is back, its score joins the entropy of that version as a point of
R = -a exp(H) + b.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.learner.feeder import make_group, put_group
from shared.config import RunConfig
from shared.config.algorithm import LawConfig
from shared.metrics.learner import LEARNER_REISSUED
from shared.records import GroupUid, Outcome, Purpose, ScoredGroup
from shared.rl.entropy_law import EntropyLaw, fit, forecast
from shared.stream import Stream
from shared.tasks.task import Problem
from shared.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Evaluation:
    """One evaluation under way.

    Attributes:
        results: (mean reward, solved share, any solved) by problem.
        attempts: how often a problem was issued again, where it was.
        given_up: problems that will have no result; the score is of the others.
    """

    policy_version: int
    started_at: float
    results: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    max_version_distance: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)

    def missing(self, num_problems: int) -> list[int]:
        """Problems that a result is still expected of."""
        return [i for i in range(num_problems) if i not in self.results and i not in self.given_up]


class Evaluator:
    """Issues evaluations and puts their results together."""

    def __init__(
        self,
        *,
        config: RunConfig,
        run_id: str,
        prompts: Stream,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
    ) -> None:
        self._config = config
        self._run_id = run_id
        self._prompts = prompts
        self._problems = problems[: config.evaluation.num_problems]
        self._tokenizer = tokenizer
        self._under_way: dict[int, Evaluation] = {}

    @property
    def num_under_way(self) -> int:
        """Evaluations whose results are not all in."""
        return len(self._under_way)

    @property
    def num_missing(self) -> int:
        """Groups without a result."""
        return sum(len(each.missing(len(self._problems))) for each in self._under_way.values())

    def is_due(self, step: int) -> bool:
        """Every so many steps, at the very start and at the very end."""
        every = self._config.evaluation.every_steps
        return every > 0 and (step % every == 0 or step == self._config.run.num_steps)

    async def issue(self, step: int, *, policy_version: int) -> None:
        """Start the evaluation of the version that `step` published."""
        self._under_way[step] = Evaluation(policy_version, time.time())
        for index in range(len(self._problems)):
            await self._put(step, index)

    async def issue_missing(
        self, held: Iterable[GroupUid], dead: Iterable[GroupUid], *, max_attempts: int
    ) -> list[dict[str, Any]]:
        """Issue again what has no result and is nowhere; give up what died as its last attempt.

        Args:
            held: evaluation groups on their way.
            dead: those in `dead_letter`.
        Returns:
            The metrics of evaluations that are complete without what was given up.
        """
        on_their_way = {(uid.epoch, uid.index) for uid in held}
        dead_attempts = {(uid.epoch, uid.index, uid.attempt) for uid in dead}
        finished = []
        for step, evaluation in list(self._under_way.items()):
            for index in evaluation.missing(len(self._problems)):
                if (step, index) in on_their_way:
                    continue
                newest = evaluation.attempts.get(index, 0)
                if (step, index, newest) in dead_attempts and newest + 1 >= max_attempts:
                    logger.error("gave up problem %d of the evaluation of step %d", index, step)
                    evaluation.given_up.add(index)
                    continue
                evaluation.attempts[index] = newest + 1
                LEARNER_REISSUED.labels(reason="evaluation").inc()
                await self._put(step, index)
            if (metrics := self._finish_if_complete(step)) is not None:
                finished.append(metrics)
        return finished

    def add(self, group: ScoredGroup) -> dict[str, Any] | None:
        """Take a result; the finished evaluation's metrics once it was the last one."""
        uid = group.rollout.prompt.uid
        evaluation = self._under_way.get(uid.epoch)
        is_asked = uid.run_id == self._run_id and uid.index < len(self._problems)
        if evaluation is None or not is_asked or uid.index in evaluation.results:
            return None
        evaluation.results[uid.index] = _problem_result(group)
        distance = max(
            abs(run.policy_version - evaluation.policy_version)
            for completion in group.rollout.completions
            for run in completion.version_runs
        )
        evaluation.max_version_distance = max(evaluation.max_version_distance, distance)
        return self._finish_if_complete(uid.epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {
            str(step): {
                "policy_version": each.policy_version,
                "started_at": each.started_at,
                "results": sorted(each.results.items()),
                "max_version_distance": each.max_version_distance,
                "attempts": sorted(each.attempts.items()),
                "given_up": sorted(each.given_up),
            }
            for step, each in self._under_way.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state."""
        self._under_way = {
            int(step): Evaluation(
                each["policy_version"],
                each["started_at"],
                {index: tuple(result) for index, result in each["results"]},
                each["max_version_distance"],
                dict(each["attempts"]),
                set(each["given_up"]),
            )
            for step, each in state.items()
        }

    def _finish_if_complete(self, step: int) -> dict[str, Any] | None:
        evaluation = self._under_way[step]
        if evaluation.missing(len(self._problems)):
            return None
        del self._under_way[step]
        if not evaluation.results:
            logger.error("the evaluation of step %d has no result at all", step)
            return None
        return _summary(step, evaluation)

    async def _put(self, step: int, index: int) -> None:
        evaluation = self._under_way[step]
        group = make_group(
            self._config,
            self._tokenizer,
            uid=GroupUid(self._run_id, step, index, evaluation.attempts.get(index, 0)),
            purpose=Purpose.EVAL,
            problem=self._problems[index],
            problem_index=index,
            policy_version=evaluation.policy_version,
        )
        await put_group(self._prompts, group)


class LawFit:
    """The entropy law, fitted anew whenever a version has both an entropy and a score."""

    def __init__(self, config: LawConfig) -> None:
        self._config = config
        self._entropies: dict[int, float] = {}
        self._scores: dict[int, float] = {}

    def add_entropy(self, policy_version: int, entropy: float) -> None:
        """Entropy of a version, measured on the batch at whose start it was the policy."""
        self._entropies[policy_version] = entropy

    def add_score(self, policy_version: int, score: float) -> None:
        """Evaluation score of a version."""
        self._scores[policy_version] = score

    @property
    def scores(self) -> Mapping[int, float]:
        """Evaluation score by version."""
        return self._scores

    def metrics(self) -> dict[str, float]:
        """The law so far, and the forecast that it allows; {} before the first entropy.

        While the points do not identify the law, `law_identifiable` is 0 and what depends on it
        is NaN; the entropy's share consumed, its rate and the steps left do not.
        """
        if not self._entropies:
            return {}
        law = self._fit()
        steps = sorted(self._entropies)
        ahead = forecast(
            law,
            steps,
            [self._entropies[step] for step in steps],
            floor=self._config.floor,
            window=self._config.window,
        )
        return {
            "law_identifiable": float(law.is_identifiable),
            "law_points": float(law.num_points),
            "law_condition": law.condition,
            "law_a": law.a,
            "law_a_low": law.a_interval[0],
            "law_a_high": law.a_interval[1],
            "law_b": law.b,
            "law_ceiling": law.ceiling,
            "law_ceiling_low": law.ceiling_interval[0],
            "law_ceiling_high": law.ceiling_interval[1],
            "law_rmse": law.rmse,
            "law_r2": law.r2,
            "law_floor": self._config.floor,
            "law_score_at_floor": ahead.score_at_floor,
            "law_gain_left": ahead.gain_left,
            "law_steps_left": ahead.steps_left,
            "entropy_consumed": ahead.consumed,
            "entropy_rate": ahead.rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {
            "entropies": sorted(self._entropies.items()),
            "scores": sorted(self._scores.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state."""
        self._entropies = dict(state["entropies"])
        self._scores = dict(state["scores"])

    def _fit(self) -> EntropyLaw:
        both = sorted(set(self._entropies) & set(self._scores))
        return fit(
            [self._entropies[version] for version in both],
            [self._scores[version] for version in both],
        )


def _problem_result(group: ScoredGroup) -> tuple[float, float, float]:
    """Mean reward, share of passes, and 1.0 if any passed, over completions that were judged."""
    judged = [score for score in group.scores if score.is_usable]
    if not judged:
        return 0.0, 0.0, 0.0
    passes = [score.outcome is Outcome.PASS for score in judged]
    mean_reward = statistics.fmean(score.reward for score in judged)
    return mean_reward, statistics.fmean(passes), float(any(passes))


def _summary(step: int, evaluation: Evaluation) -> dict[str, Any]:
    results = [result for _, result in sorted(evaluation.results.items())]
    rewards = [reward for reward, _, _ in results]
    spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    return {
        "eval_step": float(step),
        "eval_policy_version": float(evaluation.policy_version),
        "eval_version_distance": float(evaluation.max_version_distance),
        "eval_score": statistics.fmean(rewards),
        "eval_stderr": spread / len(rewards) ** 0.5,
        "eval_pass_rate": statistics.fmean(share for _, share, _ in results),
        "eval_pass_at_k": statistics.fmean(solved for _, _, solved in results),
        "eval_problems": float(len(results)),
        "eval_seconds": time.time() - evaluation.started_at,
        "eval_problem_scores": rewards,
    }
