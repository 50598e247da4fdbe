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
    "single-node-8gpu": [
        ["rdma"],
        ["rdma", "keda-rollouts", "monitoring", "mtls", "redis-tls", "sandbox", "tracing"],
    ],
    "multi-node": [
        [],
        ["kueue"],
        ["mtls"],
        ["rdma"],
        ["redis-tls"],
        ["keda-rollouts", "kueue", "mtls", "rdma", "redis-tls", "sandbox", "tracing"],
    ],
}
"""Components laid over each overlay; multi-node holds gpu, learner-lws, keda, monitoring. cpu-demo
takes none of GPUs: its run file is not for them."""

LOAD_MODEL = KUBERNETES / "load-model"
"""What is applied beside an overlay, before it."""

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


def relative(path: Path, folder: Path) -> str:
    """How a kustomization in `folder` names another: kustomize takes no absolute path."""
    return os.path.relpath(path.resolve(), folder.resolve())


def build_combination(overlay: str, components: list[str]) -> str:
    """An overlay with components over it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [relative(KUBERNETES / "overlays" / overlay, folder)],
            "components": [
                relative(KUBERNETES / "components" / each, folder) for each in components
            ],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf8")
        return build(folder)


def builds() -> Iterator[tuple[str, str]]:
    """Every overlay, every combination and what comes before one, as `(name, manifests)`."""
    for overlay in OVERLAYS:
        yield overlay, build(KUBERNETES / "overlays" / overlay)
        for components in COMBINATIONS.get(overlay, []):
            if components:
                yield "+".join([overlay, *components]), build_combination(overlay, components)
    # It names a volume of the overlay, and policies of either could open the other's pods.
    beside = build(KUBERNETES / "overlays" / "multi-node")
    yield "multi-node, load-model", f"{beside}---\n{build(LOAD_MODEL)}"
