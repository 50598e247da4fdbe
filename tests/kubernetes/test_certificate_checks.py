"""Each check of the component `mtls` finds the fault that it is for."""

from __future__ import annotations

import pytest

from tests.kubernetes.breaks import LEARNER, ROLLOUT, VERIFIER, Break, container, pod, put
from tests.kubernetes.check_manifests import problems
from tests.kubernetes.healthy import healthy
from tests.kubernetes.kustomize import KUBERNETES
from tests.kubernetes.manifests import Manifest, parse, title

MTLS = KUBERNETES / "components" / "mtls"


def secured() -> dict[str, Manifest]:
    """The healthy set as the component makes it, with the component's own certificates."""
    objects = {title(each): each for each in healthy()}
    for name in ("issuer.yaml", "certificates.yaml"):
        objects |= {title(each): each for each in parse((MTLS / name).read_text("utf8"))}
    for owner in (LEARNER, ROLLOUT, VERIFIER):
        first, spec = container(objects, owner), pod(objects, owner)
        first["env"].append({"name": "ISENTROPE_TLS", "value": "/tls"})
        first["volumeMounts"].append({"name": "tls", "mountPath": "/tls"})
        role = owner.split("/")[1]
        spec["volumes"].append({"name": "tls", "secret": {"secretName": f"tls-{role}"}})
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = "/health/isentrope.progress" if kind == "livenessProbe" else "/health/"
            first[kind] = {"httpGet": {"path": path, "port": "metrics", "scheme": "HTTPS"}}
    endpoint(objects).update(
        scheme="https",
        tlsConfig={
            "serverName": "metrics.isentrope",
            "ca": {"secret": {"name": "tls-operator", "key": "ca.crt"}},
        },
        authorization={"credentials": {"name": "metrics-token", "key": "token"}},
    )
    return objects


def endpoint(objects: dict[str, Manifest]) -> Manifest:
    found: Manifest = objects["PodMonitor/isentrope"]["spec"]["podMetricsEndpoints"][0]
    return found


def certificate(objects: dict[str, Manifest], name: str) -> Manifest:
    spec: Manifest = objects[f"Certificate/{name}"]["spec"]
    return spec


def show(objects: dict[str, Manifest], owner: str, secret: str) -> None:
    pod(objects, owner)["volumes"][-1]["secret"]["secretName"] = secret


def test_nothing_is_found_in_a_secured_set() -> None:
    assert problems(list(secured().values())) == []


BREAKS: list[tuple[str, Break, str]] = [
    (
        "a verifier that could pass as the learner",
        lambda o: show(o, VERIFIER, "tls-learner"),
        "Deployment/verifier: shows the certificate of ['spiffe://isentrope/learner']",
    ),
    (
        "a certificate of two roles",
        lambda o: certificate(o, "tls-rollout")["uris"].append("spiffe://isentrope/learner"),
        "Deployment/rollout: shows the certificate of",
    ),
    (
        "a certificate that nobody issues",
        lambda o: o.pop("Certificate/tls-rollout"),
        "leads to 'tls-rollout', which no Certificate fills",
    ),
    (
        "a server without the name that is asked for",
        lambda o: put(certificate(o, "tls-learner"), dnsNames=["metrics.isentrope"]),
        "its certificate lacks the name learner.isentrope",
    ),
    (
        "a certificate for servers alone",
        lambda o: put(certificate(o, "tls-learner"), usages=["server auth"]),
        "is not for both ends",
    ),
    (
        "an issuer that is not there",
        lambda o: put(certificate(o, "tls-learner"), issuerRef={"name": "nobody"}),
        "Issuer 'nobody' is not there",
    ),
    (
        "hardly any time between two certificates",
        lambda o: put(certificate(o, "tls-learner"), renewBefore="23h30m"),
        "is renewed before half of its life",
    ),
    (
        "an authority that changes its key",
        lambda o: put(certificate(o, "isentrope-ca")["privateKey"], rotationPolicy="Always"),
        "worthless at once",
    ),
    (
        "a kubelet that asks where it needs a certificate",
        lambda o: put(
            container(o, ROLLOUT), readinessProbe={"grpc": {"port": 7070, "service": "x"}}
        ),
        "readinessProbe asks None; a kubelet, without a certificate, needs",
    ),
    (
        "liveness that asks for readiness",
        lambda o: put(container(o, LEARNER)["livenessProbe"]["httpGet"], path="/health/"),
        "StatefulSet/learner: livenessProbe asks",
    ),
    ("metrics in plain text", lambda o: put(endpoint(o), scheme="http"), "scrapes plain text"),
    ("metrics without a token", lambda o: endpoint(o).pop("authorization"), "has no token"),
    (
        "a scraper that asks for one role",
        lambda o: put(endpoint(o)["tlsConfig"], serverName="learner.isentrope"),
        "asks for another name",
    ),
    (
        "a field that a Certificate does not have",
        lambda o: put(certificate(o, "tls-learner"), dnsName="x"),
        "Certificate/tls-learner: spec: Additional properties are not allowed",
    ),
]


@pytest.mark.parametrize(("make", "words"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_a_fault_is_found(make: Break, words: str) -> None:
    objects = secured()
    make(objects)
    found = problems(list(objects.values()))
    assert any(words in line for line in found), found
