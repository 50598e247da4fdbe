"""A pod as the component `mtls` makes it, and the Secrets that it mounts, without a cluster."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.certificates import Authority, write_credentials
from tests.kubernetes.kustomize import KUBERNETES
from tests.kubernetes.manifests import Manifest, of_kind, parse

MTLS = KUBERNETES / "components" / "mtls"


def secured(workload: Manifest) -> Manifest:
    """The workload with the component's patches."""
    made = copy.deepcopy(workload)
    for operations in _patches(made["kind"], made["metadata"]["name"]):
        for operation in operations:
            _apply(made, operation)
    return made


def write_secrets(folder: Path, authority: Authority, *, token: str) -> None:
    """What cert-manager and a person put into the namespace: a folder for each Secret."""
    for certificate in of_kind(parse((MTLS / "certificates.yaml").read_text()), "Certificate"):
        spec = certificate["spec"]
        issued = authority.issue(dns=spec.get("dnsNames", []), uris=spec["uris"])
        write_credentials(folder / spec["secretName"], issued, authority)
    (folder / "metrics-token").mkdir()
    (folder / "metrics-token" / "token").write_text(token)


def mounted(template: Manifest, secrets: Path) -> Mapping[str, Path]:
    """The folders that the kubelet shows the first container instead of these paths."""
    found = {each["name"]: each["secret"] for each in template["volumes"] if "secret" in each}
    mounts = template["containers"][0]["volumeMounts"]
    return {
        each["mountPath"]: secrets / found[each["name"]]["secretName"]
        for each in mounts
        if each["name"] in found
    }


def _patches(kind: str, name: str) -> Iterator[Sequence[Manifest]]:
    """Lists of JSON Patch operations for this object, in order."""
    component: Manifest = yaml.safe_load((MTLS / "kustomization.yaml").read_text())
    for each in component["patches"]:
        target = each["target"]
        if re.fullmatch(target["kind"], kind) and re.fullmatch(target["name"], name):
            text = each["patch"] if "patch" in each else (MTLS / each["path"]).read_text()
            yield yaml.safe_load(text)


def _apply(manifest: Manifest, operation: Manifest) -> None:
    *way, last = operation["path"].strip("/").split("/")
    holder: Any = manifest
    for part in way:
        holder = holder[int(part)] if isinstance(holder, list) else holder.setdefault(part, {})
    match operation["op"]:
        case "remove":
            del holder[last]
        case "add" if last == "-":
            holder.append(operation["value"])
        case "add":
            holder[last] = operation["value"]
        case other:
            raise ValueError(f"op: {other}: kustomize knows it, this reader does not")
