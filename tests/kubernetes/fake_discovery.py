"""What the stand-in API server knows, told the way kubectl asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.kubernetes.manifests import Manifest


class Kind(NamedTuple):
    """A kind and where it is found; `group` is empty for the core."""

    group: str
    version: str
    plural: str
    kind: str
    is_namespaced: bool = True
    has_scale: bool = False

    @property
    def api_version(self) -> str:
        """As in a manifest."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Of the paths of its group and version."""
        return f"{'apis' if self.group else 'api'}/{self.api_version}"


RESOURCES = (
    Kind("", "v1", "namespaces", "Namespace", is_namespaced=False),
    Kind("", "v1", "configmaps", "ConfigMap"),
    Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Kind("", "v1", "pods", "Pod"),
    Kind("", "v1", "secrets", "Secret"),
    Kind("", "v1", "serviceaccounts", "ServiceAccount"),
    Kind("", "v1", "services", "Service"),
    Kind("apps", "v1", "deployments", "Deployment", has_scale=True),
    Kind("apps", "v1", "statefulsets", "StatefulSet", has_scale=True),
    Kind("batch", "v1", "jobs", "Job"),
    Kind("cert-manager.io", "v1", "certificates", "Certificate"),
    Kind("cert-manager.io", "v1", "issuers", "Issuer"),
    Kind("keda.sh", "v1alpha1", "scaledobjects", "ScaledObject"),
    Kind("keda.sh", "v1alpha1", "triggerauthentications", "TriggerAuthentication"),
    Kind("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet", has_scale=True),
    Kind("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor"),
    Kind("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
    Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Kind("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", is_namespaced=False),
)

_VERBS = ["create", "delete", "get", "list", "patch", "update"]
_PARAMETERS = ("dryRun", "fieldManager", "fieldValidation", "force")


def discovery(path: str, kubernetes_version: str) -> Manifest | None:
    """What kubectl asks before it does anything; None if `path` is something else."""
    if path == "/version":
        major, minor = kubernetes_version.split(".")[:2]
        return {"major": major, "minor": minor, "gitVersion": f"v{kubernetes_version}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(_groups())}
    if path == "/openapi/v3":
        roots = sorted({resource.root for resource in RESOURCES})
        return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots}}
    if path.startswith("/openapi/v3/"):
        return _openapi(path.removeprefix("/openapi/v3/"))
    found = [resource for resource in RESOURCES if path == f"/{resource.root}"]
    if not found:
        return None
    listed = [entry for resource in found for entry in _entries(resource)]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": found[0].api_version,
        "resources": listed,
    }


def _groups() -> Iterator[Manifest]:
    for group, version in sorted({(each.group, each.version) for each in RESOURCES if each.group}):
        named = {"groupVersion": f"{group}/{version}", "version": version}
        yield {"name": group, "versions": [named], "preferredVersion": named}


def _entries(resource: Kind) -> Iterator[Manifest]:
    yield {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "kind": resource.kind,
        "namespaced": resource.is_namespaced,
        "verbs": _VERBS,
    }
    if resource.has_scale:
        yield {
            "name": f"{resource.plural}/scale",
            "singularName": "",
            "group": "autoscaling",
            "version": "v1",
            "kind": "Scale",
            "namespaced": resource.is_namespaced,
            "verbs": ["get", "patch", "update"],
        }


def _openapi(root: str) -> Manifest:
    """Just enough for kubectl to see that the server checks fields itself."""
    given = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in _PARAMETERS]
    paths = {}
    for resource in RESOURCES:
        if resource.root == root:
            home = "/namespaces/{namespace}" if resource.is_namespaced else ""
            paths[f"/{root}{home}/{resource.plural}/{{name}}"] = {
                "patch": {
                    "parameters": given,
                    "responses": {"200": {"description": "OK"}},
                    "x-kubernetes-action": "patch",
                    "x-kubernetes-group-version-kind": {
                        "group": resource.group,
                        "version": resource.version,
                        "kind": resource.kind,
                    },
                }
            }
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths}
