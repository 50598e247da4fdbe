"""Kubernetes objects as plain mappings, and the pods among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

Manifest = dict[str, Any]
Labels = Mapping[str, str]

_SUFFIXES = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod template and what it is a template of.

    Attributes:
        owner: `Kind/name` of the object, for messages.
        name: value of `app.kubernetes.io/name`.
    """

    owner: str
    name: str
    labels: Labels
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """Those that run, without those that come before them."""
        return list(self.spec["containers"])

    @property
    def every_container(self) -> list[Manifest]:
        """Init containers too."""
        return [*self.spec.get("initContainers", []), *self.containers]

    @property
    def volumes(self) -> dict[str, Manifest]:
        """By name."""
        return {volume["name"]: volume for volume in self.spec.get("volumes", [])}


def parse(text: str) -> list[Manifest]:
    """The objects of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def title(manifest: Manifest) -> str:
    """`Kind/name`."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> list[Manifest]:
    """Those of these kinds."""
    return [each for each in manifests if each["kind"] in kinds]


def named(manifests: Iterable[Manifest], kind: str) -> set[str]:
    """The names of the objects of a kind."""
    return {each["metadata"]["name"] for each in of_kind(manifests, kind)}


def pods(manifests: Iterable[Manifest]) -> Iterator[Pod]:
    """Every pod template."""
    for manifest in manifests:
        for template in _templates(manifest):
            labels = template["metadata"]["labels"]
            name = labels.get("app.kubernetes.io/name", "")
            yield Pod(title(manifest), name, labels, template["spec"])


def _templates(manifest: Manifest) -> list[Manifest]:
    if manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
        return [manifest["spec"]["template"]]
    if manifest["kind"] == "LeaderWorkerSet":
        group = manifest["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return []


def selects(selector: Manifest, labels: Labels) -> bool:
    """Whether a LabelSelector takes an object with these labels."""
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(rule, labels) for rule in selector.get("matchExpressions", []))


def _holds(rule: Manifest, labels: Labels) -> bool:
    value = labels.get(rule["key"])
    match rule["operator"]:
        case "In":
            return value in rule["values"]
        case "NotIn":
            return value not in rule["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise ValueError(f"operator {rule['operator']!r}: no such one")


def quantity(text: str | float) -> float:
    """`512Mi`, `250m` or `2` as a number.

    Raises:
        ValueError: it is not a quantity.
    """
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return float(found[1]) * _SUFFIXES[found[2]]


def arguments(container: Manifest) -> list[str]:
    """Command and arguments in one list."""
    return [*container.get("command", []), *container.get("args", [])]


def option(words: Sequence[str], name: str) -> str | None:
    """The value of `--name=value` among the words."""
    prefix = f"--{name}="
    return next((word.removeprefix(prefix) for word in words if word.startswith(prefix)), None)
