"""What a Prometheus that looks at a run, as of `make monitor`, answers to all that we ask one.

Every query of the dashboard, and every series that a rule reads or records, must have a value for a
run that goes well; but for those of events that did not happen, or of methods that it does not use.
"""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from tests.observability.promql import Selector, selectors
from tests.observability.test_dashboard import queries
from tests.observability.test_rules import rules

NOT_IN_EVERY_RUN = (
    "isentrope_learner_groups_abandoned_total",
    "isentrope_learner_groups_reissued_total",
    "isentrope_learner_kl_reference_nats",
    "isentrope_learner_policy_entropy_clamped_nats",
    "isentrope_learner_entropy_bound_nats",
    "isentrope_learner_entropy_coefficient",
    "isentrope_learner_entropy_law_a",
    "isentrope_learner_entropy_law_b",
    "isentrope_learner_entropy_law_r_squared",
    "isentrope_learner_predicted_reward",
)
"""Of events that may never come, of methods that a run may not use, and of a law that a few steps
may not tell yet."""

ASK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What Prometheus said at one moment.

    Attributes:
        scraped: the instances whose last scrape went well.
        missing: what should have a value and has none, or was refused, with the reason.
        failing_rules: rules whose last evaluation was an error or is still to come.
        alerts: `(name, state)`.
    """

    scraped: frozenset[str]
    missing: tuple[str, ...]
    failing_rules: tuple[str, ...]
    alerts: frozenset[tuple[str, str]]

    @property
    def is_whole(self) -> bool:
        """Whether all has a value that should."""
        return not (self.missing or self.failing_rules)


def answers(url: str, run_id: str) -> Answers:
    """Ask the Prometheus at `url` all there is to ask of a run.

    Raises:
        OSError: it does not answer.
    """
    up, alerts = _labels(url, "up == 1"), _labels(url, "ALERTS")
    return Answers(
        scraped=frozenset(each["instance"] for each in up),
        missing=tuple(_missing(url, run_id)),
        failing_rules=tuple(_failing_rules(url)),
        alerts=frozenset((each["alertname"], each["alertstate"]) for each in alerts),
    )


def questions(run_id: str) -> set[str]:
    """The dashboard's queries for a run, and the series that rules read and record."""
    asked = {query.replace("$__rate_interval", "1m").replace("$run", run_id) for query in queries()}
    for rule in rules():
        asked |= {_series(selector) for selector in selectors(rule["expr"])}
        if "record" in rule:
            asked.add(f'{rule["record"]}{{run="{run_id}"}}')
    return asked


def _series(selector: Selector) -> str:
    """Also for a matcher that leaves a value out: that value must then be one that there is."""
    matchers = ",".join(f'{label}=~"{value}"' for label, value in selector.matchers.items())
    return f"{selector.metric}{{{matchers}}}"


def _missing(url: str, run_id: str) -> Iterator[str]:
    for query in sorted(questions(run_id)):
        try:
            has_value = bool(_labels(url, query))
        except HTTPError as error:
            yield f"{query}: {error.read().decode()}"
            continue
        if not has_value and not any(name in query for name in NOT_IN_EVERY_RUN):
            yield query


def _failing_rules(url: str) -> list[str]:
    return [
        f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}"
        for group in _get(f"{url}/api/v1/rules")["groups"]
        for rule in group["rules"]
        if rule["health"] != "ok"
    ]


def _labels(url: str, query: str) -> list[dict[str, str]]:
    """Of each series that an instant query gives."""
    result = _get(f"{url}/api/v1/query?query={urllib.parse.quote(query)}")["result"]
    return [dict(each["metric"]) for each in result]


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=ASK_SECONDS) as answer:
        return json.load(answer)["data"]
