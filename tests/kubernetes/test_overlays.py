"""The overlays as they stand; `make manifests` asks more of them, with tools of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

from tests.kubernetes.check_manifests import problems
from tests.kubernetes.kustomize import (
    COMBINATIONS,
    COMPONENTS,
    KUBERNETES,
    OVERLAYS,
    build,
    has_kubectl,
    relative,
)
from tests.kubernetes.manifests import of_kind, parse, pods

needs_kubectl = pytest.mark.skipif(not has_kubectl(), reason="kubectl builds the overlays")


def test_every_component_is_checked_over_some_overlay() -> None:
    text = (KUBERNETES / "overlays" / "multi-node" / "kustomization.yaml").read_text("utf8")
    used = {name for name in COMPONENTS if f"components/{name}\n" in text}
    over = set(chain.from_iterable(chain.from_iterable(COMBINATIONS.values())))
    assert set(COMPONENTS) - used - over == set()
    assert set(COMBINATIONS) == set(OVERLAYS)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_wrong_with_an_overlay(overlay: str) -> None:
    assert problems(parse(build(KUBERNETES / "overlays" / overlay))) == []


@needs_kubectl
def test_a_namespace_of_one_s_own_takes_what_the_documentation_says(tmp_path: Path) -> None:
    text = (KUBERNETES.parent / "README.md").read_text("utf8")
    [block] = re.findall(r"```yaml\n(namespace: team-b.*?)```", text, re.DOTALL)
    given = yaml.safe_load(block)
    [overlay] = given["resources"]
    given["resources"] = [relative(KUBERNETES / overlay.partition("kubernetes/")[2], tmp_path)]
    given["components"] = [relative(KUBERNETES / "components" / "keda-rollouts", tmp_path)]

    def found() -> list[str]:
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(given), "utf8")
        return problems(parse(build(tmp_path)))

    assert found() == []
    del given["replacements"]
    assert len(found()) == 3


@needs_kubectl
def test_the_demo_s_pods_use_one_run_file_and_it_is_the_laptop_s() -> None:
    manifests = parse(build(KUBERNETES / "overlays" / "cpu-demo"))
    [run] = [each for each in of_kind(manifests, "ConfigMap") if "run.toml" in each["data"]]
    laptop = KUBERNETES.parent / "config" / "demo.toml"
    assert run["data"]["run.toml"] == laptop.read_text("utf8")
    services = [pod for pod in pods(manifests) if pod.name != "redis"]
    mounted = {pod.volumes["run"]["configMap"]["name"] for pod in services}
    assert mounted == {run["metadata"]["name"]}


def test_the_component_s_rules_are_the_ones_that_are_tested() -> None:
    script = str(KUBERNETES.parent / "prometheus" / "kubernetes.py")
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rules = KUBERNETES / "components" / "monitoring" / "rules.yaml"
    assert rules.read_text("utf8") == printed.stdout, f"python {script} > {rules}"
