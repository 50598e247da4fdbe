"""Every series that a service can export, with its labels; and what is wrong with a question."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from prometheus_client import Counter, Gauge, Histogram

from shared import metrics
from shared.metrics.quantities import PERCENTILES, QUANTITIES, LearnerGauges
from tests.observability.promql import grouping_labels, selectors

ROOT = Path(__file__).parents[2]

TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod"})
"""Prometheus adds them to what it scrapes."""

FOREIGN = {
    "up": frozenset[str](),
    "process_resident_memory_bytes": frozenset[str](),
}
"""Not ours: of Prometheus and prometheus_client."""

Catalogue = Mapping[str, frozenset[str]]


@cache
def catalogue() -> Catalogue:
    """Labels by the name of the series, as in a scrape."""
    own = {"isentrope_build_info": frozenset({"version"})} | dict(_own())
    return FOREIGN | own | dict(engine_series())


def _own() -> Iterator[tuple[str, frozenset[str]]]:
    yield "isentrope_run_info", frozenset({"run", "model", "algorithm"})
    for each in _declared_by_us():
        if isinstance(each, Counter | Gauge | Histogram):
            name, labels = str(each._name), frozenset[str](each._labelnames)  # type: ignore[no-untyped-call, unused-ignore]
            match each:
                case Counter():
                    yield f"{name}_total", labels
                case Histogram():
                    yield f"{name}_bucket", labels | {"le"}
                    yield f"{name}_sum", labels
                    yield f"{name}_count", labels
                case _:
                    yield name, labels
    gauges = LearnerGauges()
    keys = [
        *QUANTITIES,
        *(key for _, by_label in PERCENTILES.values() for key in by_label.values()),
    ]
    gauges.show(dict.fromkeys(keys, 1.0))
    for family in gauges.collect():
        for sample in family.samples:
            yield sample.name, frozenset(sample.labels)


def _declared_by_us() -> Iterator[object]:
    """Whatever the modules of `shared.metrics` name."""
    for module in iter_modules(metrics.__path__, f"{metrics.__name__}."):
        yield from vars(import_module(module.name)).values()


def engine_series() -> Iterator[tuple[str, frozenset[str]]]:
    """What the installed vLLM exports without being asked: read where it declares it.

    Not imported, which takes seconds; that a real engine exports them is for
    tests/integration/test_rollout_engine.py to see.
    """
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "v1/metrics/loggers.py"
    logger = next(
        node
        for node in ast.walk(ast.parse(source.read_text("utf8")))
        if isinstance(node, ast.ClassDef) and node.name == "PrometheusStatLogger"
    )
    start = next(
        node
        for node in logger.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    for statement in start.body:  # those under a condition may be missing
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            yield from _declared(statement.value)


def _declared(call: ast.Call) -> Iterator[tuple[str, frozenset[str]]]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    named = given.get("name")
    if not (isinstance(named, ast.Constant) and str(named.value).startswith("vllm:")):
        return
    name, labels = str(named.value), _label_names(given["labelnames"])
    match ast.unparse(call.func):
        case "self._counter_cls":
            yield f"{name}_total", labels
        case "self._histogram_cls":
            yield f"{name}_bucket", labels | {"le"}
            yield f"{name}_sum", labels
            yield f"{name}_count", labels
        case _:
            yield name, labels


def _label_names(expression: ast.expr) -> frozenset[str]:
    """Of a list of texts, and the variable that has the two which nearly all of them share."""
    found: set[str] = set()
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant):
            found.add(str(node.value))
        elif isinstance(node, ast.Name) and node.id == "labelnames":
            found |= {"model_name", "engine"}
    return frozenset(found)


def faults(expression: str, known: Catalogue) -> list[str]:
    """Series, labels and label values of an expression that nobody exports."""
    found, labels = [], set(TARGET_LABELS)
    for selector in selectors(expression):
        if selector.metric not in known:
            found.append(f"no series {selector.metric}")
            continue
        of_metric = known[selector.metric] | TARGET_LABELS
        labels |= of_metric
        for label, value in selector.matchers.items():
            if label not in of_metric:
                found.append(f"{selector.metric} has no label {label}")
            elif not value.startswith("$"):
                found += [f"nobody sets {label} to {each!r}" for each in _unset(value)]
    found += [f"no series has the label {label}" for label in grouping_labels(expression) - labels]
    return found


def _unset(value: str) -> Iterator[str]:
    """Those of the alternatives of a matcher that do not stand in the code."""
    for each in value.split("|"):
        if f'"{each}"' not in _code() and not re.fullmatch(r"[\d.]*", each):
            yield each


@cache
def _code() -> str:
    files = [path for folder in ("shared", "services") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text("utf8") for path in sorted(files))
