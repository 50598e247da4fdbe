"""Certificates: each pod shows the one of its role, and all hold the name that a scraper wants."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from shared.roles import METRICS_NAME, role_uri, server_name
from tests.kubernetes.manifests import Manifest, Pod, named, of_kind, pods, title

_SECONDS = {"h": 3600, "m": 60, "s": 1}


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each certificate that a peer would refuse."""
    certificates = {each["spec"]["secretName"]: each for each in of_kind(manifests, "Certificate")}
    for certificate in certificates.values():
        yield from _issue(certificate, manifests)
    for pod in pods(manifests):
        secret = _shown(pod)
        if secret is None:
            continue
        if secret not in certificates:
            yield f"{pod.owner}: ISENTROPE_TLS leads to {secret!r}, which no Certificate fills"
            continue
        yield from _names(pod, certificates[secret]["spec"])
    for monitor in of_kind(manifests, "PodMonitor"):
        yield from _scrape(monitor, is_tls=any(map(_shown, pods(manifests))))


def _shown(pod: Pod) -> str | None:
    """The Secret that is mounted where ISENTROPE_TLS says; None without that variable."""
    for container in pod.containers:
        values = {each["name"]: each.get("value") for each in container.get("env", [])}
        if "ISENTROPE_TLS" in values:
            mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            volume = pod.volumes.get(mounts.get(str(values["ISENTROPE_TLS"]), ""), {})
            return str(volume.get("secret", {}).get("secretName", "nothing"))
    return None


def _names(pod: Pod, spec: Manifest) -> Iterator[str]:
    """One role exactly: with a second one, a service could do what is another's."""
    if spec.get("uris") != [role_uri(pod.name)]:
        yield f"{pod.owner}: shows the certificate of {spec.get('uris')}"
    missing = {server_name(pod.name), METRICS_NAME} - set(spec.get("dnsNames", []))
    if missing:
        yield f"{pod.owner}: its certificate lacks the name {', '.join(sorted(missing))}"


def _issue(certificate: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    spec, who = certificate["spec"], title(certificate)
    issuer = spec["issuerRef"]
    if issuer.get("kind", "Issuer") == "Issuer" and issuer["name"] not in named(
        manifests, "Issuer"
    ):
        yield f"{who}: Issuer {issuer['name']!r} is not there"
    if spec.get("isCA"):
        if spec.get("privateKey", {}).get("rotationPolicy") != "Never":
            yield f"{who}: a new key would make all that it issued worthless at once"
        return
    if not {"server auth", "client auth"} <= set(spec.get("usages", [])):
        yield f"{who}: is not for both ends of a connection"
    if _seconds(spec["renewBefore"]) * 2 > _seconds(spec["duration"]):
        yield f"{who}: is renewed before half of its life"


def _seconds(text: str) -> int:
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


def _scrape(monitor: Manifest, *, is_tls: bool) -> Iterator[str]:
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        if (endpoint.get("scheme") == "https") != is_tls:
            yield f"{title(monitor)}: scrapes {'plain text' if is_tls else 'TLS'}, services do not"
        if is_tls and endpoint.get("tlsConfig", {}).get("serverName") != METRICS_NAME:
            yield f"{title(monitor)}: asks for another name than {METRICS_NAME}"
        if is_tls and "authorization" not in endpoint:
            yield f"{title(monitor)}: has no token"
