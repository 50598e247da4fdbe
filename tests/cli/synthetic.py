"""Rows as a learner writes them, of a run whose entropy falls while its score rises."""

from __future__ import annotations

import math
import random
from typing import Any

Row = dict[str, Any]

PERCENTILES = {"50": 1e-4, "90": 0.02, "99": 0.4, "99_8": 1.6, "100": 6.0}
TOPS = {"0_02": 5.0, "0_2": 2.4, "2": 0.5, "20": 0.06, "50": 0.02, "100": 0.004}
A, B = 0.9, 1.5


def run_rows(num_steps: int = 100, *, every: int = 10, seed: int = 1) -> list[Row]:
    """All keys, in the order of a run: an evaluation comes back one step after its version."""
    draw = random.Random(seed)
    entropies = [0.15 + 0.07 * math.exp(-step / 40) for step in range(num_steps + 1)]
    rows = [evaluation_row(0, entropies[0], draw)]
    for step in range(1, num_steps + 1):
        rows.append(step_row(step, entropies[step - 1], draw))
        if step % every == 1 and step > 1:
            rows.append(evaluation_row(step - 1, entropies[step - 1], draw))
    fit = {"law_a": A, "law_b": B, "law_ceiling": B - A, "law_r2": 0.97, "law_points": 9.0}
    return [row | fit if "eval_score" in row and row["step"] > 30 else row for row in rows]


def step_row(step: int, entropy: float, draw: random.Random) -> Row:
    """What a training step measures."""
    reward = B - A * math.exp(entropy) - 0.02
    slow = 6.0 if step == 1 else 0.0
    wait, train = 0.5 + draw.random() * 0.4 + slow, 0.9 + draw.random() * 0.1
    return {
        "step": step,
        "policy_version": step,
        "time": 1000.0 + 1.8 * step,
        "reward_mean": reward + draw.gauss(0, 0.03),
        "reward_std": 0.45,
        "entropy": entropy * (1 + draw.gauss(0, 0.02)),
        "entropy_seq_mean": entropy * 1.1,
        "entropy_after_filter": entropy,
        "entropy_clamped": entropy * 0.8,
        "entropy_coefficient": 6e-4 + 2e-5 * step,
        **{f"entropy_p{p}": entropy * p / 50 for p in (10, 50, 80, 90, 99)},
        "covariance_mean": 0.004,
        **{f"covariance_p{p}": v * draw.uniform(0.7, 1.4) for p, v in PERCENTILES.items()},
        **{f"covariance_top_{p}": v for p, v in TOPS.items()},
        "staleness_mean": 0.7,
        "staleness_max": 2,
        "staleness_counts": {"0": 60, "1": 48, "2": 20},
        "groups_over_max_staleness": 0,
        "mismatch_kl": 2e-4 * draw.uniform(0.5, 2.0),
        "clip_fraction_low": 0.004 * draw.random(),
        "clip_fraction_high": 0.009 * draw.random(),
        "selected_tokens": 25,
        "tokens": 2500,
        "seconds": wait + train + 0.2,
        "wait_data_seconds": wait,
        "train_seconds": train,
        "publish_seconds": 0.15,
        "pause_seconds": 0.04,
        "completion_length_mean": 19.0,
    }


def evaluation_row(step: int, entropy: float, draw: random.Random) -> Row:
    """What an evaluation measures, in a row of its own."""
    score = B - A * math.exp(entropy) + draw.gauss(0, 0.006)
    return {
        "step": step,
        "eval_step": float(step),
        "eval_policy_version": float(step),
        "eval_score": score,
        "eval_stderr": 0.012,
        "eval_pass_rate": score,
        "eval_pass_at_k": min(1.0, score + 0.2),
        "eval_problems": 150.0,
    }
