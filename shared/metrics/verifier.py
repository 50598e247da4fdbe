"""What a verifier does."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

VERIFIER_SECONDS = Histogram(
    "isentrope_verifier_duration_seconds", "Time to score one completion.", ["verifier"]
)
VERIFIER_RESULTS = Counter(
    "isentrope_verifier_results_total", "Completions by outcome.", ["verifier", "result"]
)
