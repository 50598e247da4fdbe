"""Make isentrope.json from panels.py: `python deploy/grafana/build.py`, or `--check` to compare.

Needs grafana-foundation-sdk, which is in `.venv-ops`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models import dashboard as dashboard_models
from panels import ROWS, Panel

FILE = Path(__file__).parent / "isentrope.json"
_DATASOURCE = dashboard_models.DataSourceRef(type_val="prometheus", uid="$datasource")
_LOGARITHM_BASE = 10


def text() -> str:
    """The dashboard as Grafana imports it."""
    built = (
        dashboard.Dashboard("Isentrope")
        .uid("isentrope")
        .tags(["isentrope"])
        .editable()
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(_DATASOURCE)
            .query("label_values(isentrope_run_info, run)")
            .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    )
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            built = built.with_panel(_drawn(panel))
    made = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for id, panel in enumerate(made["panels"], start=1):
        panel["id"] = id
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


def _drawn(panel: Panel) -> timeseries.Panel | stat.Panel | heatmap.Panel:
    drawn: timeseries.Panel | stat.Panel | heatmap.Panel
    match panel.kind:
        case "number":
            drawn = stat.Panel().span(6).height(4)
        case "heatmap":
            drawn = heatmap.Panel().span(12).height(8)
        case _:
            drawn = _lines(panel)
    drawn = drawn.title(panel.title).unit(panel.unit).datasource(_DATASOURCE)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        asked = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter)
        drawn = drawn.with_target(
            asked.format("heatmap" if panel.kind == "heatmap" else "time_series")
        )
    return drawn


def _lines(panel: Panel) -> timeseries.Panel:
    drawn = timeseries.Panel().span(12).height(8)
    if panel.kind == "stack":
        stacking = common.StackingConfig().mode(models.StackingMode.NORMAL)
        drawn = drawn.stacking(stacking).fill_opacity(30)
    if panel.is_logarithmic:
        scale = common.ScaleDistributionConfig().type(models.ScaleDistribution.LOG)
        drawn = drawn.scale_distribution(scale.log(_LOGARITHM_BASE))
    return drawn


def main() -> int:
    """Write the file, or say whether it is what it should be."""
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text(), "utf8")
        return 0
    if FILE.read_text("utf8") == text():
        return 0
    print(f"error: {FILE} is not what panels.py says; run {Path(__file__).name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
