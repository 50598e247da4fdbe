"""What kustomize makes of the overlays, alone and with each component."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

KUBERNETES = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())

COMBINATIONS = {
    "cpu-demo": [
        ["gpu"],
        ["gpu", "rdma"],
        ["keda"],
        ["keda", "redis-tls"],
        ["keda-rollouts"],
        ["kueue"],
        ["monitoring"],
        ["monitoring", "mtls"],
        ["mtls"],
        ["redis-tls"],
        ["sandbox"],
    ],
    "single-node-8gpu": [["rdma", "keda-rollouts", "monitoring", "mtls", "redis-tls", "sandbox"]],
    "multi-node": [
        [],
        ["kueue"],
        ["mtls"],
        ["rdma"],
        ["redis-tls"],
        ["keda-rollouts", "kueue", "mtls", "rdma", "redis-tls", "sandbox"],
    ],
}
"""Components laid over each overlay; multi-node holds gpu, learner-lws, keda, monitoring."""

HOW_TO_GET_KUBECTL = (
    "kubectl: not found, and the manifests cannot be built without it; Debian 13 and later:"
    " apt-get install kubectl; elsewhere take the package kubectl of Debian 13. It must be 1.30 or"
    " later"
)


def has_kubectl() -> bool:
    """Whether anything can be built."""
    return shutil.which("kubectl") is not None


def build(folder: Path) -> str:
    """The manifests of a kustomization.

    Raises:
        RuntimeError: kustomize refused it; its words.
    """
    ended = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    if ended.returncode != 0:
        raise RuntimeError(f"{folder}: {ended.stderr.strip()}")
    return ended.stdout


def build_combination(overlay: str, components: list[str]) -> str:
    """An overlay with components over it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()

        def relative(*parts: str) -> str:
            return os.path.relpath(KUBERNETES.joinpath(*parts).resolve(), folder)

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [relative("overlays", overlay)],
            "components": [relative("components", each) for each in components],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf8")
        return build(folder)


def builds() -> Iterator[tuple[str, str]]:
    """Every overlay and every combination, as `(name, manifests)`."""
    for overlay in OVERLAYS:
        yield overlay, build(KUBERNETES / "overlays" / overlay)
        for components in COMBINATIONS.get(overlay, []):
            if components:
                yield "+".join([overlay, *components]), build_combination(overlay, components)
