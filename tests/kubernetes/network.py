"""Network policies, as a cluster reads them: who can open a connection to whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.kubernetes.manifests import Manifest, Pod, of_kind, pods, selects

Port = str | int


class Call(NamedTuple):
    """A connection from the pods of one name to those of another."""

    caller: str
    called: str
    port: Port


BROADCAST_PORTS = (32768, 60999)

NEEDED = [
    *[Call(caller, "redis", "redis") for caller in ("learner", "rollout", "verifier")],
    Call("learner", "rollout", "grpc"),
    Call("learner", "verifier", "grpc"),
    Call("rollout", "learner", "grpc"),
    *[Call("learner", "rollout", port) for port in BROADCAST_PORTS],
    *[Call("rollout", "learner", port) for port in BROADCAST_PORTS],
    *[Call("rollout", "rollout", port) for port in BROADCAST_PORTS],
]
RANKS = [Call("learner", "learner", port) for port in ("meeting", *BROADCAST_PORTS)]
"""Needed where ranks run on several nodes."""

REFUSED = [
    *[Call("verifier", called, "grpc") for called in ("learner", "rollout", "verifier")],
    *[Call(caller, "verifier", "grpc") for caller in ("rollout", "redis")],
    *[Call("redis", called, "grpc") for called in ("learner", "rollout", "verifier")],
    *[Call(caller, "rollout", 22) for caller in ("learner", "rollout", "verifier")],
    Call("rollout", "rollout", "grpc"),
    Call("redis", "redis", "redis"),
    *[Call("load-model", called, "grpc") for called in ("learner", "rollout", "verifier")],
    Call("load-model", "redis", "redis"),
]


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each connection that should be possible and is not, or the other way round."""
    policies = of_kind(manifests, "NetworkPolicy")
    by_name: dict[str, list[Pod]] = {}
    for pod in pods(manifests):
        by_name.setdefault(pod.name, []).append(pod)
    needed = [*NEEDED, *(RANKS if of_kind(manifests, "LeaderWorkerSet") else [])]
    for calls, is_needed in ((needed, True), (REFUSED, False)):
        for call in calls:
            # Of the learner's pods the first alone, the leader, answers calls.
            called = by_name.get(call.called, [])[:1]
            pairs = [(caller, each) for caller in by_name.get(call.caller, []) for each in called]
            if any(allows(policies, *pair, call.port) != is_needed for pair in pairs):
                word = "cannot" if is_needed else "can"
                yield f"{call.caller} {word} reach {call.called} on {call.port}"
    yield from _port_ranges(manifests)
    yield from _own_ports(manifests)
    yield from _traces(manifests)


def allows(policies: Sequence[Manifest], caller: Pod, called: Pod, port: Port) -> bool:
    """Whether the policies let `caller` connect; a pod that none selects is open.

    Args:
        port: a number, or a name of one of the called pod's.
    """
    number = _number(called, port)
    if number is None:
        return False

    def opens(direction: str, own: Pod, peer: Pod) -> bool:
        rules = _rules(policies, direction, own)
        return rules is None or any(
            _is_peer(peers, peer) and _is_port(ports, called, number) for peers, ports in rules
        )

    return opens("Egress", caller, called) and opens("Ingress", called, caller)


def _rules(
    policies: Sequence[Manifest], direction: str, own: Pod
) -> list[tuple[list[Manifest], list[Manifest]]] | None:
    """Peers and ports of each rule for a pod; None if no policy has a say."""
    side, end = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    mine = [
        policy["spec"]
        for policy in policies
        if selects(policy["spec"]["podSelector"], own.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    if not mine:
        return None
    return [
        (rule.get(end, []), rule.get("ports", [])) for spec in mine for rule in spec.get(side, [])
    ]


def _is_peer(peers: Sequence[Manifest], peer: Pod) -> bool:
    """An empty list is everybody; a namespace selector is never this namespace."""
    return not peers or any(
        "namespaceSelector" not in each and selects(each.get("podSelector", {}), peer.labels)
        for each in peers
    )


def _is_port(ports: Sequence[Manifest], called: Pod, number: int) -> bool:
    """An empty list is every port."""
    return not ports or any(number in _range(each, called) for each in ports)


def _range(port: Manifest, called: Pod) -> range:
    """The numbers that a policy's port opens on the called pod."""
    first = _number(called, port["port"])
    return range(0) if first is None else range(first, port.get("endPort", first) + 1)


def _number(pod: Pod, port: Port) -> int | None:
    if isinstance(port, int):
        return port
    named = {
        each["name"]: int(each["containerPort"])
        for container in pod.containers
        for each in container.get("ports", [])
    }
    return named.get(port)


def _port_ranges(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Broadcasts listen where the kernel lets them, which must be where the policies do."""
    for pod in pods(manifests):
        if pod.name not in ("learner", "rollout"):
            continue
        sysctls = pod.spec.get("securityContext", {}).get("sysctls", [])
        found = {each["name"]: each["value"] for each in sysctls}
        given = found.get("net.ipv4.ip_local_port_range", "the kernel's own")
        if given != "{} {}".format(*BROADCAST_PORTS):
            wanted = "-".join(str(port) for port in BROADCAST_PORTS)
            yield f"{pod.owner}: ip_local_port_range is {given}, and the policies open {wanted}"


def _own_ports(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A port of that range may be taken, and the broadcasts' rules would open it."""
    first, last = BROADCAST_PORTS
    for pod in pods(manifests):
        for container in pod.containers:
            for port in container.get("ports", []):
                if first <= port["containerPort"] <= last:
                    yield f"{pod.owner}: port {port['name']} is one that the kernel gives away"


def _traces(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Who sends traces reaches the collector's namespace; a connection that hangs says nothing."""
    policies = of_kind(manifests, "NetworkPolicy")
    for pod in pods(manifests):
        variables = {each["name"]: each.get("value") for each in pod.containers[0].get("env", [])}
        endpoint = urlsplit(variables.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "")
        if endpoint.hostname is None:
            continue
        namespace = endpoint.hostname.partition(".")[2].partition(".")[0]
        if not any(
            _leads_to(namespace, peers) and endpoint.port in {each["port"] for each in ports}
            for peers, ports in _rules(policies, "Egress", pod) or []
        ):
            yield f"{pod.owner}: cannot reach {endpoint.netloc} with its traces"


def _leads_to(namespace: str, peers: Sequence[Manifest]) -> bool:
    labels = {"kubernetes.io/metadata.name": namespace}
    return any(
        selects(each["namespaceSelector"], labels)
        for each in peers
        if len(each) == 1 and "namespaceSelector" in each
    )
