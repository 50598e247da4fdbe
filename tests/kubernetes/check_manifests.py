"""`make manifests`: everything that can be known of the manifests without a cluster.

build     kustomize, every overlay, alone and with components over it
agree     our own checks of what schemas miss; schemas of custom resources
schemas   Kubernetes' strict schemas, oldest and newest version
apply     an unmodified kubectl applies, diffs, scales and deletes at a stand-in API server
security  checkov, but for what checkov.yaml accepts with a reason

python -m tests.kubernetes.check_manifests TOOLS      TOOLS: the folder of ops.txt's programs
    --overlay FOLDER      an overlay of one's own instead, which is not applied
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.kubernetes import (
    certificates,
    custom_resources,
    network,
    references,
    run_file,
    scaling,
    workloads,
)
from tests.kubernetes.kustomize import (
    HOW_TO_GET_KUBECTL,
    KUBERNETES,
    LOAD_MODEL,
    OVERLAYS,
    build,
    builds,
    has_kubectl,
)
from tests.kubernetes.manifests import Manifest, of_kind, parse

ROOT = KUBERNETES.parent.parent
VERSIONS = ("1.30", "1.37")
"""The oldest and the newest Kubernetes that is supported."""

CHECKS: tuple[Callable[[Sequence[Manifest]], Iterator[str]], ...] = (
    references.problems,
    workloads.problems,
    network.problems,
    run_file.problems,
    scaling.problems,
    custom_resources.problems,
    certificates.problems,
)

_NO_SCHEMA = "Couldn't find schema for kind"


def problems(manifests: Sequence[Manifest]) -> list[str]:
    """What all our checks find."""
    return [problem for check in CHECKS for problem in check(manifests)]


def schema_problems(folder: Path, tools: Path, version: str) -> list[str]:
    """What Kubernetes' schemas refuse in the YAML files of a folder.

    A kind without a schema is only a warning to the tool: it must be one of ours.
    """
    files = sorted(str(path) for path in folder.glob("*.yaml"))
    command = [str(tools / "kubernetes-validate"), "--strict", "--quiet", "-k", version, *files]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [*ended.stdout.splitlines(), *ended.stderr.splitlines()]
    ours = {f"{_NO_SCHEMA} {kind} with api version {api}" for api, kind in custom_resources.kinds()}
    found = [line for line in said if not any(each in line for each in ours)]
    if ended.returncode != 0 and not found:
        found = [f"kubernetes-validate ended with {ended.returncode}"]
    return found


def write_for_schemas(made: Mapping[str, str], folder: Path) -> None:
    """A file a build with the objects that no earlier one has, pod templates of LWS apart."""
    seen: set[str] = set()
    for name, text in made.items():
        manifests = parse(text)
        given = [json.dumps(each) for each in [*manifests, *_pod_templates(manifests)]]
        new = [each for each in given if each not in seen]
        seen.update(new)
        (folder / f"{name}.yaml").write_text("\n---\n".join(new), "utf8")


def _pod_templates(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """Those that hide in custom resources, as objects that Kubernetes has a schema of."""
    for each in of_kind(manifests, "LeaderWorkerSet"):
        group = each["spec"]["leaderWorkerTemplate"]
        for part in ("leaderTemplate", "workerTemplate"):
            yield {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": {"name": f"{each['metadata']['name']}-{part}".lower()},
                "template": group[part],
            }


@contextmanager
def stand_in(tools: Path, version: str) -> Iterator[Mapping[str, str]]:
    """The stand-in API server, and the environment that leads kubectl to it."""
    command = [str(tools / "python"), "-m", "tests.kubernetes.fake_api", "--kubernetes", version]
    with tempfile.TemporaryDirectory() as home:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            config = Path(home) / "config"
            config.write_text(yaml.safe_dump(_kubeconfig(port)), "utf8")
            yield {**os.environ, "KUBECONFIG": str(config), "HOME": home}
        finally:
            server.kill()
            server.wait()


def _kubeconfig(port: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "users": [{"name": "it", "user": {}}],
        "current-context": "it",
    }


def apply_problems(overlay: str, environment: Mapping[str, str]) -> list[str]:
    """What a person does with an overlay, in its order."""
    for step, expected in _steps(overlay):
        ended = subprocess.run(
            ["kubectl", *step], env=environment, capture_output=True, text=True, timeout=120
        )
        if ended.returncode != 0 or (expected is not None and ended.stdout.strip() != expected):
            said = (ended.stderr or ended.stdout).strip()
            return [f"{overlay}: kubectl {' '.join(step)}: {said}"]
    return []


def _steps(overlay: str) -> list[tuple[list[str], str | None]]:
    """Arguments of kubectl, and what it must print, if that matters."""
    apply, namespace = ["apply", "--server-side"], "--namespace=isentrope"
    chosen = f"--kustomize={KUBERNETES / 'overlays' / overlay}"
    loader = f"--kustomize={LOAD_MODEL}"
    learner = f"{'leaderworkerset' if overlay == 'multi-node' else 'statefulset'}/learner"
    number = ["get", "deployment/rollout", namespace, "-o=jsonpath={.spec.replicas}"]
    return [
        # For `kubectl create namespace`, which speaks what the stand-in does not.
        ([*apply, chosen, "--selector=pod-security.kubernetes.io/warn"], None),
        ([*apply, chosen, "--selector=app.kubernetes.io/name=data"], None),
        (["get", "persistentvolumeclaims", namespace, "-o=name"], "persistentvolumeclaim/data"),
        (["get", "deployments", namespace, "-o=name"], ""),
        ([*apply, "--validate=strict", loader], None),
        (["delete", "--wait=false", loader], None),
        ([*apply, "--validate=strict", chosen], None),
        (["diff", "--server-side", chosen], ""),
        (["scale", "deployment/rollout", namespace, "--replicas=7"], None),
        (number, "7"),
        (["scale", learner, namespace, "--replicas=0"], None),
        (["delete", "--wait=false", chosen], None),
    ]


def security_problems(folder: Path, tools: Path) -> list[str]:
    """What checkov finds in the files of a folder and `checkov.yaml` does not accept."""
    command = [str(tools / "checkov"), f"--config-file={Path(__file__).parent / 'checkov.yaml'}"]
    ended = subprocess.run(
        [*command, f"--directory={folder}"], capture_output=True, text=True, timeout=300, cwd=folder
    )
    return [] if ended.returncode == 0 else (ended.stdout + ended.stderr).splitlines()


def main() -> int:
    """Run the stages; 0, or 1 after a line for each problem."""
    parser = argparse.ArgumentParser(description="Check the Kubernetes manifests.")
    parser.add_argument("tools", type=Path, help="folder of the programs of ops.txt")
    parser.add_argument("--overlay", type=Path, help="a kustomization to check instead of ours")
    given = parser.parse_args()
    if not has_kubectl():
        print(f"error: {HOW_TO_GET_KUBECTL}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        return _run(Path(temporary), given.tools.absolute(), given.overlay)


def _run(folder: Path, tools: Path, own: Path | None) -> int:
    made = dict(builds()) if own is None else {own.resolve().name: build(own)}
    write_for_schemas(made, folder)

    def agree() -> Iterator[str]:
        for name, text in made.items():
            yield from (f"{name}: {problem}" for problem in problems(parse(text)))

    def schemas() -> Iterator[str]:
        for version in VERSIONS:
            for problem in schema_problems(folder, tools, version):
                yield f"Kubernetes {version}: {problem}"

    def apply() -> Iterator[str]:
        for version, overlays in zip(VERSIONS, (["multi-node"], OVERLAYS), strict=True):
            with stand_in(tools, version) as environment:
                for overlay in overlays:
                    yield from apply_problems(overlay, environment)

    print(f"{len(made)} builds of {len(OVERLAYS) if own is None else 1} overlays")
    found = [
        *_stage("our own checks", agree),
        *_stage(f"strict schemas of Kubernetes {' and '.join(VERSIONS)}", schemas),
        *([] if own else _stage("kubectl at a stand-in API server", apply)),
        *_stage("checkov", lambda: security_problems(folder, tools)),
    ]
    return 1 if found else 0


def _stage(name: str, check: Callable[[], Iterator[str] | list[str]]) -> list[str]:
    started = time.monotonic()
    found = list(check())
    print(f"{name}: {len(found) or 'no'} problems, {time.monotonic() - started:.0f} s", flush=True)
    print("".join(f"  {line}\n" for line in found), end="", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
