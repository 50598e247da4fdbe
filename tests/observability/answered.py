"""Ask a Prometheus, as of `make monitor`, every query of the dashboard and how the rules fare.

`python -m tests.observability.answered RUN_ID [--url http://127.0.0.1:9090]`: prints what has no
answer and the alerts; exit status 1 if a query that every run should answer has none, or a rule
fails. Give a run a few minutes: it must have evaluated twice, and rates want two scrapes.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse
import urllib.request
from typing import Any

from tests.observability.test_dashboard import queries

NOT_IN_EVERY_RUN = (
    "isentrope_certificate_expiry_timestamp_seconds",
    "isentrope_learner_groups_abandoned_total",
    "isentrope_learner_groups_reissued_total",
    "isentrope_learner_kl_reference_nats",
    "isentrope_learner_policy_entropy_clamped_nats",
    "isentrope_learner_entropy_bound_nats",
    "isentrope_learner_entropy_coefficient",
)
"""Of events that may never come, or of methods and certificates that a run may not use."""


def main() -> int:
    """Ask, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_id")
    parser.add_argument("--url", default="http://127.0.0.1:9090")
    given = parser.parse_args()
    silent = unanswered(given.url, given.run_id)
    sick = failing_rules(given.url)
    print(
        f"{len(list(queries()))} queries, {len(silent)} without an answer; {len(sick)} rules fail"
    )
    print("\n".join([*silent, *sick]))
    alerts = ask(given.url, "ALERTS")
    print(
        "alerts:", [(each["metric"]["alertname"], each["metric"]["alertstate"]) for each in alerts]
    )
    missing = [query for query in silent if not any(name in query for name in NOT_IN_EVERY_RUN)]
    return 1 if missing or sick else 0


def unanswered(url: str, run_id: str) -> list[str]:
    """The queries of the dashboard that give no series for the run."""
    filled = [
        query.replace("$__rate_interval", "1m").replace("$run", run_id) for query in queries()
    ]
    return [query for query in filled if not ask(url, query)]


def failing_rules(url: str) -> list[str]:
    """Rules whose last evaluation was an error, with the error."""
    return [
        f"{rule['name']}: {rule.get('lastError', '')}"
        for group in _get(f"{url}/api/v1/rules")["groups"]
        for rule in group["rules"]
        if rule["health"] == "err"
    ]


def ask(url: str, query: str) -> list[Any]:
    """The result of an instant query."""
    found: list[Any] = _get(f"{url}/api/v1/query?query={urllib.parse.quote(query)}")["result"]
    return found


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


if __name__ == "__main__":
    sys.exit(main())
