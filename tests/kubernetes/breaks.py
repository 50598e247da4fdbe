"""How tests break a healthy set of manifests, and ask what is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.kubernetes.check_manifests import problems
from tests.kubernetes.healthy import healthy
from tests.kubernetes.manifests import Manifest, title

Break = Callable[[dict[str, Manifest]], Any]
"""Changes objects, which it is given by `Kind/name`."""

ROLLOUT, VERIFIER = "Deployment/rollout", "Deployment/verifier"
LEARNER, REDIS = "StatefulSet/learner", "StatefulSet/redis"


def found_after(make: Break) -> list[str]:
    """What all checks find in a healthy set that was broken."""
    manifests = healthy()
    make({title(each): each for each in manifests})
    return problems(manifests)


def pod(objects: dict[str, Manifest], owner: str) -> Manifest:
    """The pod's spec."""
    spec: Manifest = objects[owner]["spec"]["template"]["spec"]
    return spec


def container(objects: dict[str, Manifest], owner: str) -> Manifest:
    """Its first container."""
    first: Manifest = pod(objects, owner)["containers"][0]
    return first


def put(mapping: Manifest, **values: Any) -> Manifest:
    """Set values; gives the mapping."""
    mapping.update(values)
    return mapping
