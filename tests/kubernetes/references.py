"""Whatever a manifest names is there: pods behind selectors, ports, configuration, volumes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tests.kubernetes.manifests import Manifest, Pod, named, of_kind, pods, selects, title

EXTERNAL_SECRETS = {"metrics-token", "redis-auth", "redis-tls"}
"""Made by whoever owns the cluster; deploy/README.md says how."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each thing that is named and is not there."""
    everything = list(pods(manifests))
    for manifest in manifests:
        yield from _names(manifest)
        yield from _selectors(manifest, everything)
        yield from _service_ports(manifest, everything)
        yield from _policy_ports(manifest, everything)
        yield from _monitor_ports(manifest, everything)
    for pod in everything:
        yield from _sources(pod, manifests)
        yield from _mounts(pod)
        yield from _probe_ports(pod)
    yield from _scale_targets(manifests)
    yield from _governing_services(manifests)


def _names(manifest: Manifest) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if not _NAME.fullmatch(name):
        yield f"{manifest['kind']}/{name}: metadata.name is no RFC 1123 label"


def _selectors(manifest: Manifest, everything: Sequence[Pod]) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind in ("Deployment", "StatefulSet"):
        labels = spec["template"]["metadata"]["labels"]
        if not selects(spec["selector"], labels):
            yield f"{title(manifest)}: selector does not match its own pods"
        return
    selector = _selector(kind, spec)
    if selector is not None and not any(selects(selector, pod.labels) for pod in everything):
        yield f"{title(manifest)}: selects no pod"


def _selector(kind: str, spec: Manifest) -> Manifest | None:
    """The LabelSelector by which an object of this kind finds pods, if it does."""
    match kind:
        case "Service":
            return {"matchLabels": spec["selector"]}
        case "NetworkPolicy":
            return dict(spec["podSelector"])
        case "PodDisruptionBudget" | "PodMonitor":
            return dict(spec["selector"])
    return None


def _service_ports(manifest: Manifest, everything: Sequence[Pod]) -> Iterator[str]:
    if manifest["kind"] != "Service":
        return
    spec = manifest["spec"]
    for pod in everything:
        if selects({"matchLabels": spec["selector"]}, pod.labels):
            for port in spec["ports"]:
                yield from _missing_port(title(manifest), port["targetPort"], [pod])


def _policy_ports(manifest: Manifest, everything: Sequence[Pod]) -> Iterator[str]:
    """A named port is one of the pods that are called: the selected ones, or the peers."""
    if manifest["kind"] != "NetworkPolicy":
        return
    spec = manifest["spec"]
    own = [pod for pod in everything if selects(spec["podSelector"], pod.labels)]
    for rule in spec.get("ingress", []):
        for port in rule.get("ports", []):
            yield from _missing_port(title(manifest), port["port"], own)
    for rule in spec.get("egress", []):
        peers = [
            pod
            for peer in rule.get("to", [])
            if "namespaceSelector" not in peer and "podSelector" in peer
            for pod in everything
            if selects(peer["podSelector"], pod.labels)
        ]
        for port in rule.get("ports", []):
            yield from _missing_port(title(manifest), port["port"], peers)


def _monitor_ports(manifest: Manifest, everything: Sequence[Pod]) -> Iterator[str]:
    if manifest["kind"] != "PodMonitor":
        return
    spec = manifest["spec"]
    chosen = [pod for pod in everything if selects(spec["selector"], pod.labels)]
    for endpoint in spec["podMetricsEndpoints"]:
        yield from _missing_port(title(manifest), endpoint["port"], chosen)


def _missing_port(who: str, port: str | int, among: Sequence[Pod]) -> Iterator[str]:
    """Names must lead somewhere; numbers are checked where they are the service's own."""
    if isinstance(port, str) and among and not any(port in _port_names(pod) for pod in among):
        yield f"{who}: port {port!r} is none of {', '.join(sorted({p.owner for p in among}))}"


def _port_names(pod: Pod) -> set[str]:
    return {port["name"] for each in pod.containers for port in each.get("ports", [])}


def _sources(pod: Pod, manifests: Sequence[Manifest]) -> Iterator[str]:
    known = {
        "ConfigMap": named(manifests, "ConfigMap"),
        "Secret": named(manifests, "Secret") | EXTERNAL_SECRETS | _issued(manifests),
        "PersistentVolumeClaim": named(manifests, "PersistentVolumeClaim"),
        "ServiceAccount": named(manifests, "ServiceAccount"),
        "PriorityClass": named(manifests, "PriorityClass"),
    }
    for kind, name in _wanted(pod):
        if name not in known[kind]:
            yield f"{pod.owner}: {kind} {name!r} is not there"


def _issued(manifests: Sequence[Manifest]) -> set[str]:
    """Secrets that cert-manager writes."""
    return {each["spec"]["secretName"] for each in of_kind(manifests, "Certificate")}


def _wanted(pod: Pod) -> Iterator[tuple[str, str]]:
    # A Job may come before all that an overlay has.
    if not pod.owner.startswith("Job/"):
        yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
        yield "PriorityClass", pod.spec.get("priorityClassName", "")
    for volume in pod.volumes.values():
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.every_container:
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                yield "Secret", source["secretKeyRef"]["name"]
            if "configMapKeyRef" in source:
                yield "ConfigMap", source["configMapKeyRef"]["name"]


def _mounts(pod: Pod) -> Iterator[str]:
    claimed = {"redis-data"} if pod.owner == "StatefulSet/redis" else set()
    for container in pod.every_container:
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in {*pod.volumes, *claimed}:
                yield f"{pod.owner}: {container['name']} mounts no volume {mount['name']!r}"
        if len(paths) != len(set(paths)):
            yield f"{pod.owner}: {container['name']} mounts two volumes at one path"
        names = [variable["name"] for variable in container.get("env", [])]
        if len(names) != len(set(names)):
            yield f"{pod.owner}: {container['name']} has two values for one variable"
        yield from _variables(pod, container, set(names))


def _variables(pod: Pod, container: Manifest, names: set[str]) -> Iterator[str]:
    """`$(NAME)` in a text stays as it stands where there is no such variable."""
    given = names | {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
    seen: set[str] = set()
    for variable in container.get("env", []):
        for name in re.findall(r"\$\(([A-Z0-9_]+)\)", variable.get("value", "")):
            if name not in seen:
                yield f"{pod.owner}: {variable['name']} uses $({name}), which no line above sets"
        seen.add(variable["name"])
    for word in [*container.get("command", []), *container.get("args", [])]:
        for name in re.findall(r"\$\(([A-Z0-9_]+)\)", word):
            if name not in given:
                yield f"{pod.owner}: {word} uses $({name}), which nothing sets"


def _probe_ports(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        numbers = {port["containerPort"] for port in container.get("ports", [])}
        names = {port["name"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            for handler in ("grpc", "tcpSocket", "httpGet"):
                port = probe.get(handler, {}).get("port")
                if port is not None and port not in numbers | names:
                    yield f"{pod.owner}: {kind} asks port {port!r}, which is not the container's"


def _scale_targets(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in of_kind(manifests, "ScaledObject"):
        target = manifest["spec"]["scaleTargetRef"]
        name = target["name"]
        found = [
            each for each in of_kind(manifests, target["kind"]) if each["metadata"]["name"] == name
        ]
        if not found:
            yield f"{title(manifest)}: scales {name!r}, which is not there"
        elif "replicas" in found[0]["spec"]:
            yield f"{title(found[0])}: an apply would undo what {title(manifest)} decided"
        for trigger in manifest["spec"]["triggers"]:
            wanted = trigger.get("authenticationRef", {}).get("name")
            if wanted is not None and wanted not in named(manifests, "TriggerAuthentication"):
                yield f"{title(manifest)}: TriggerAuthentication {wanted!r} is not there"


def _governing_services(manifests: Sequence[Manifest]) -> Iterator[str]:
    headless = {
        each["metadata"]["name"]
        for each in of_kind(manifests, "Service")
        if each["spec"].get("clusterIP") == "None"
    }
    for manifest in of_kind(manifests, "StatefulSet"):
        if manifest["spec"]["serviceName"] not in headless:
            yield f"{title(manifest)}: its serviceName is no headless Service"
    for manifest in of_kind(manifests, "Service"):
        is_grpc = any(port["name"] == "grpc" for port in manifest["spec"]["ports"])
        if is_grpc and manifest["metadata"]["name"] not in headless:
            yield f"{title(manifest)}: gRPC at one address goes to one pod; make it headless"
