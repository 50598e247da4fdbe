"""Print rules.yml as the PrometheusRule of the component `monitoring`; after each change of it:

python deploy/prometheus/kubernetes.py > deploy/kubernetes/components/monitoring/rules.yaml
"""

from __future__ import annotations

from pathlib import Path

HEAD = """\
# Written from deploy/prometheus/rules.yml by deploy/prometheus/kubernetes.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: isentrope
spec:
"""


def manifest() -> str:
    """The rules under `spec`, comments and all."""
    rules = (Path(__file__).parent / "rules.yml").read_text("utf8")
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(True))


if __name__ == "__main__":
    print(manifest(), end="")
