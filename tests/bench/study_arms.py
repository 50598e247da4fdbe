"""What the entropy study compares: one base run, its arms, and the regimes all arms are run in.

The base is the built-in task with 16 x 8 completions a step and two optimiser steps on them. Its
learning rate is the largest at which the vanilla arm still learned in a pilot. Shares of selected
tokens are far above the papers', because a batch here has 2,000 tokens and not a million.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, dict[str, Any]]

BASE: Document = {
    "run": {"name": "study", "num_steps": 200},
    "model": {"max_length": 64},
    "warmup": {},
    "task": {"name": "countdown", "params": {"numbers": 3}},
    "rollout": {"group_size": 8, "max_completion_tokens": 32},
    "learner": {
        "groups_per_batch": 16,
        "optimizer_steps_per_batch": 2,
        "learning_rate": 1e-4,
        "lr_warmup_steps": 10,
    },
    "evaluation": {"every_steps": 10, "num_problems": 150, "group_size": 8},
}

WIDE_CLIP = {"clip_ratio_low": 1.0, "clip_ratio_high": 1.0}
"""The ratio range [0, 2] that the authors of Clip-Cov run it with."""

ARMS: dict[str, Document] = {
    "vanilla": {},
    "half-lr": {"learner": {"learning_rate": 5e-5}},
    "clip-higher": {"policy_loss": {"clip_ratio_high": 0.28}},
    "wide-clip": {"policy_loss": {**WIDE_CLIP, "clip_ratio_c": 1e3}},
    "clip-cov": {"policy_loss": {"loss_mode": "clip_cov", **WIDE_CLIP, "clip_cov_ratio": 0.01}},
    "unclipped": {"policy_loss": {"loss_mode": "unclipped"}},
    "kl-cov": {
        "policy_loss": {"loss_mode": "kl_cov", "kl_cov_ratio": 0.1, "allow_large_ratio": True}
    },
    "bonus": {"entropy": {"method": "bonus", "entropy_coeff": 0.05}},
    "aent": {
        "entropy": {"method": "aent", "entropy_coeff": 0.01, "clamp_p": 0.33},
        "adaptive_entropy": {
            "entropy_low": 0.14,
            "entropy_high": 0.18,
            "entropy_coeff_lr": 0.02,
            "clip_low": 0.0006,
            "clip_high": 0.06,
        },
    },
    "aent-high": {
        "entropy": {"method": "aent", "entropy_coeff": 0.03, "clamp_p": 0.33},
        "adaptive_entropy": {
            "entropy_low": 0.17,
            "entropy_high": 0.2,
            "entropy_coeff_lr": 0.05,
            "clip_low": 0.0006,
            "clip_high": 0.1,
        },
    },
}

CONTROLS = {
    "clip-higher": "vanilla",
    "clip-cov": "wide-clip",
    "kl-cov": "unclipped",
    "bonus": "vanilla",
    "aent": "vanilla",
    "aent-high": "vanilla",
}
"""The arm that differs from a method by nothing but the method."""

SLOW = "half-lr"
"""What else may hold entropy up: going slower."""


@dataclass(frozen=True, slots=True)
class Regime:
    """A setting in which arms are compared; `lag` is the staleness of every batch."""

    title: str
    lag: int = 0
    changes: Document = field(default_factory=dict)


REGIMES: dict[str, Regime] = {
    "base": Regime("three numbers, on policy, 200 steps"),
    "stale": Regime("three numbers, 6 versions stale, 200 steps", lag=6),
    "long": Regime(
        "three numbers, on policy, 800 steps",
        changes={"run": {"num_steps": 800}, "evaluation": {"every_steps": 40}},
    ),
    "four": Regime(
        "four numbers, on policy, 400 steps",
        changes={
            "run": {"num_steps": 400},
            "task": {"params": {"numbers": 4}},
            "warmup": {"num_steps": 1500},
            "evaluation": {"every_steps": 20},
        },
    ),
}


def run_document(regime: Regime, arm: str, seed: int) -> Document:
    """The run file of one arm and seed; each seed has a warm-up model of its own."""
    document = _merged(BASE, regime.changes, ARMS[arm])
    document["run"]["seed"] = seed
    return document


def _merged(*documents: Mapping[str, Mapping[str, Any]]) -> Document:
    """Later ones over earlier ones, key by key."""
    merged: Document = {}
    for document in documents:
        for section, values in document.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged
