"""Pods as they should be run: resources, probes, their end, their rights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.verifier.worker import STOP_SECONDS
from shared.config.services import RolloutConfig
from shared.rpc import GRACE_SECONDS, PROGRESS
from tests.kubernetes.manifests import Manifest, Pod, arguments, option, pods, quantity

GPU = "nvidia.com/gpu"
SERVICES = {
    "learner": "isentrope.v1.Learner",
    "rollout": "isentrope.v1.Rollout",
    "verifier": "isentrope.v1.Verifier",
}

_HANDLERS = ("exec", "grpc", "httpGet", "tcpSocket")
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

_DRAIN_SECONDS = {
    "verifier": STOP_SECONDS + GRACE_SECONDS,
    "rollout": RolloutConfig.model_fields["drain_seconds"].default + GRACE_SECONDS,
    # No bound of their own: what they are given at least.
    "learner": 300.0,
    "redis": 30.0,
}
_MARGIN_SECONDS = 15.0


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each thing that a cluster would take and a person would regret."""
    for pod in pods(manifests):
        for container in pod.every_container:
            yield from _resources(pod, container)
            yield from _image(pod, container)
            yield from _rights(pod, container)
        for container in pod.containers:
            yield from _probes(pod, container)
            yield from _shared_memory(pod, container)
        yield from _pod_rights(pod)
        yield from _end(pod)


def _resources(pod: Pod, container: Manifest) -> Iterator[str]:
    who = f"{pod.owner}: {container['name']}"
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    if "memory" not in limits:
        yield f"{who} has no memory limit"
    for name in ("cpu", "memory"):
        if name not in requests:
            yield f"{who} requests no {name}"
        elif name in limits and quantity(requests[name]) > quantity(limits[name]):
            yield f"{who} requests more {name} than its limit"
    if GPU in requests:
        yield f"{who} requests GPUs: they stand under limits alone"
    if GPU in limits and "cpu" in limits:
        yield f"{who} has a GPU and a CPU limit, which throttles what feeds it"
    if GPU in limits and not _tolerates_gpus(pod):
        yield f"{pod.owner}: has GPUs and does not tolerate the taint of their nodes"


def _tolerates_gpus(pod: Pod) -> bool:
    return any(each.get("key") == GPU for each in pod.spec.get("tolerations", []))


def _image(pod: Pod, container: Manifest) -> Iterator[str]:
    image: str = container["image"]
    _, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"{pod.owner}: image {image!r} names no version"


def _rights(pod: Pod, container: Manifest) -> Iterator[str]:
    who = f"{pod.owner}: {container['name']}"
    context = container.get("securityContext", {})
    capabilities = context.get("capabilities", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{who} may gain privileges"
    if capabilities.get("drop") != ["ALL"]:
        yield f"{who} keeps capabilities"
    if not set(capabilities.get("add", [])) <= {"IPC_LOCK"}:
        yield f"{who} adds capabilities {capabilities['add']}"
    has_gpu = GPU in container.get("resources", {}).get("limits", {})
    if not has_gpu and context.get("readOnlyRootFilesystem") is not True:
        yield f"{who} may write to its root file system"


def _pod_rights(pod: Pod) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
        yield f"{pod.owner}: may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{pod.owner}: has no seccomp profile"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield f"{pod.owner}: is given a token for the API server"
    if pod.spec.get("enableServiceLinks") is not False:
        yield f"{pod.owner}: gets a variable for every Service of the namespace"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{pod.owner}: {key} is on"


def _probes(pod: Pod, container: Manifest) -> Iterator[str]:
    found = {kind: container[kind] for kind in _PROBES if kind in container}
    for kind, probe in found.items():
        if len([handler for handler in _HANDLERS if handler in probe]) != 1:
            yield f"{pod.owner}: {kind} must have one handler"
    is_worker_rank = not container.get("ports") or "grpc" not in {
        port["name"] for port in container["ports"]
    }
    if pod.name not in SERVICES or is_worker_rank:
        return
    for kind in _PROBES:
        if kind not in found:
            yield f"{pod.owner}: {container['name']} has no {kind}"
            continue
        if "ISENTROPE_TLS" in {variable["name"] for variable in container.get("env", [])}:
            yield from _probe_past_tls(pod, kind, found[kind])
            continue
        asked = found[kind].get("grpc", {}).get("service")
        wanted = PROGRESS if kind == "livenessProbe" else SERVICES[pod.name]
        if asked != wanted:
            yield f"{pod.owner}: {kind} asks for the health of {asked!r}, not of {wanted!r}"


def _probe_past_tls(pod: Pod, kind: str, probe: Manifest) -> Iterator[str]:
    """A kubelet cannot ask a gRPC server that wants a certificate."""
    wanted = {
        "path": f"/health/{PROGRESS}" if kind == "livenessProbe" else "/health/",
        "port": "metrics",
        "scheme": "HTTPS",
    }
    asked = probe.get("httpGet")
    if asked != wanted:
        yield f"{pod.owner}: {kind} asks {asked}; a kubelet, without a certificate, needs {wanted}"


def _shared_memory(pod: Pod, container: Manifest) -> Iterator[str]:
    if pod.name not in ("learner", "rollout"):
        return
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    volume = pod.volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    if volume.get("medium") != "Memory" or "sizeLimit" not in volume:
        yield f"{pod.owner}: /dev/shm is not an emptyDir in memory with a limit"
        return
    limit = container.get("resources", {}).get("limits", {}).get("memory")
    if limit is not None and quantity(volume["sizeLimit"]) > quantity(limit):
        yield f"{pod.owner}: /dev/shm is larger than the memory limit, which it counts against"


def _end(pod: Pod) -> Iterator[str]:
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in pod.containers:
        hook = container.get("lifecycle", {}).get("preStop", {})
        needed = hook.get("sleep", {}).get("seconds", 0) + _DRAIN_SECONDS.get(pod.name, 0.0)
        if grace < needed + _MARGIN_SECONDS:
            yield f"{pod.owner}: a grace of {grace} s, and ending takes {needed:.0f} s"
        words = arguments(container)
        if words[0] == "torchrun":
            given = float(option(words, "shutdown-timeout") or 30)
            if not _DRAIN_SECONDS[pod.name] <= given <= grace - _MARGIN_SECONDS:
                yield f"{pod.owner}: torchrun kills its ranks {given:.0f} s after SIGTERM"
