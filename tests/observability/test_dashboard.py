"""The committed dashboard asks for what exists and is what panels.py says."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.observability.catalogue import ROOT, faults
from tests.observability.test_rules import RUNBOOKS, known

OPS_PYTHON = ROOT / ".venv-ops/bin/python"


@cache
def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((ROOT / "deploy/grafana/isentrope.json").read_text("utf8"))
    return made


@cache
def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


def test_every_query_asks_for_what_is_exported() -> None:
    wrong = {query: found for query in queries() if (found := faults(query, known()))}
    assert wrong == {}


def test_a_legend_shows_labels_that_the_query_keeps() -> None:
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            expression = target["expr"]
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
            recorded = re.fullmatch(r"(run:\S+)\{.*\}", expression)
            assert shown <= (known()[recorded[1]] if recorded else kept), panel["title"]


def test_every_panel_has_an_id_a_unit_a_title_and_the_chosen_datasource() -> None:
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in dashboard()["panels"]]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}


def test_the_run_is_a_variable_that_every_query_reads() -> None:
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert variables.keys() == {"datasource", "run"}
    assert variables["run"]["query"] == "label_values(isentrope_run_info, run)"
    assert all('run="$run"' in query for query in queries())


def test_the_rows_are_those_that_the_runbooks_name() -> None:
    rows = {panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"}
    named = set(re.findall(r"[Rr]ow \*(.+?)\*", RUNBOOKS.read_text("utf8")))
    assert named
    assert named <= rows


def test_the_committed_file_is_what_the_code_makes() -> None:
    tool = [str(OPS_PYTHON), "-c", "import grafana_foundation_sdk"]
    if not OPS_PYTHON.exists() or subprocess.run(tool, capture_output=True).returncode:
        pytest.skip("grafana-foundation-sdk is not in .venv-ops; `make alerts` installs it")
    check = [str(OPS_PYTHON), str(ROOT / "deploy/grafana/build.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
