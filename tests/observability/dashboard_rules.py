"""Print every query of the dashboard as a recording rule, for `promtool check rules` to parse."""

from __future__ import annotations

import yaml

from tests.observability.test_dashboard import queries


def rules() -> str:
    """With Grafana's variables replaced by what it would put there."""
    asked = [query.replace("$__rate_interval", "1m").replace("$run", "a") for query in queries()]
    recorded = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(asked)]
    groups = [{"name": "dashboard", "rules": recorded}]
    return str(yaml.safe_dump({"groups": groups}, width=1000))


if __name__ == "__main__":
    print(rules(), end="")
