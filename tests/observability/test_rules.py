"""Alerts ask for what exists, say what they saw, and have a runbook."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import yaml

from shared.config import RunConfig
from tests.observability.catalogue import ROOT, TARGET_LABELS, Catalogue, catalogue, faults
from tests.observability.promql import Selector, grouping_labels, kept_labels, selectors

PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOKS = ROOT / "deploy/RUNBOOKS.md"


@cache
def rules() -> list[dict[str, Any]]:
    text = (PROMETHEUS / "rules.yml").read_text("utf8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@cache
def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


@cache
def known() -> Catalogue:
    """With what the recording rules add."""
    found: dict[str, frozenset[str]] = {}
    for rule in rules():
        if "record" in rule:
            before = found.get(rule["record"], frozenset())
            found[rule["record"]] = (
                before | _labels_of(rule["expr"], found) | {*rule.get("labels", ())}
            )
    return {**catalogue(), **found}


def _labels_of(expression: str, found: Catalogue) -> frozenset[str]:
    """What the result of a rule can carry: what it sums by, or what recorded series have."""
    recorded = [found.get(each.metric, frozenset()) for each in selectors(expression)]
    return frozenset(kept_labels(expression)).union(*recorded)


def test_the_reader_of_promql_finds_what_is_asked_for() -> None:
    text = 'sum by (run) (rate(a_total{x="1",y!~"b|c"}[5m] offset 1h) * on (job) d) > 1e3 and e:f'
    assert selectors(text) == [
        Selector("a_total", {"x": "1", "y": "b|c"}),
        Selector("d", {}),
        Selector("e:f", {}),
    ]
    assert grouping_labels(text) == {"run", "job"}


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(isentrope_learner_steps[5m])", "no series isentrope_learner_steps"),
        ('isentrope_queue_lag_messages{name="scored"}', "has no label name"),
        ('isentrope_queue_lag_messages{stream="no_such"}', "nobody sets stream to 'no_such'"),
        ("sum by (stream) (isentrope_learner_loss)", "no series has the label stream"),
    ],
)
def test_what_does_not_exist_is_found(expression: str, fault: str) -> None:
    (found,) = faults(expression, catalogue())
    assert fault in found


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    assert selectors(rule["expr"])
    assert faults(rule["expr"], known()) == []


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_what_it_saw_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"deploy/RUNBOOKS.md#{alert['alert'].lower()}"
    if not alert["expr"].startswith("absent"):
        assert "$labels.run" in notes["summary"]
        has_one_value = " == " in alert["expr"]
        assert has_one_value or "$value" in notes["description"]
    carried = _labels_of(alert["expr"], known()) | TARGET_LABELS
    assert set(re.findall(r"\$labels\.(\w+)", " ".join(notes.values()))) <= carried


def test_every_alert_has_its_runbook_and_no_runbook_is_left_over() -> None:
    sections = re.findall(r"^## (Isentrope\w+)$", RUNBOOKS.read_text("utf8"), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]


def test_every_runbook_says_what_it_means_what_to_look_at_and_what_to_do() -> None:
    text = RUNBOOKS.read_text("utf8")
    for section in re.split(r"^## (?=Isentrope)", text, flags=re.MULTILINE)[1:]:
        heads = re.findall(r"^\*\*(.+?)\*\*", section, re.MULTILINE)
        assert heads == ["Means.", "Look.", "Do.", "Threshold."], section.splitlines()[0]


def test_every_alert_is_seen_to_fire() -> None:
    text = (PROMETHEUS / "rules_test.yml").read_text("utf8")
    fired = set(re.findall(r'ALERTS\{alertname="(\w+)"', text))
    assert fired == {alert["alert"] for alert in alerts()}


def test_every_configuration_key_that_a_runbook_names_exists() -> None:
    text = RUNBOOKS.read_text("utf8")
    sections = {
        name: field.annotation.model_fields  # type: ignore[union-attr]
        for name, field in RunConfig.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    keys = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", re.sub(r"\]\([^)]*\)|rules\.yml", "", text))
    named = [(section, key) for section, key in keys if section in sections]
    assert named
    assert [f"{section}.{key}" for section, key in named if key not in sections[section]] == []
