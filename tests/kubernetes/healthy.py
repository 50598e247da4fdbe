"""A small set of manifests in which no check finds anything, for tests to break."""

from __future__ import annotations

from typing import Any

from tests.kubernetes.manifests import Manifest
from tests.kubernetes.workloads import SERVICES

RUN_TOML = '[run]\nname = "demo"\nnum_steps = 1\n\n[model]\npath = "models/policy"\n'
REDIS_CONF = (
    "port 6379\nappendonly yes\nmaxmemory 4608mb\nmaxmemory-policy noeviction\n"
    "aclfile /etc/redis-auth/users.acl\n"
)
POLICED = ("learner", "rollout", "verifier", "redis")


def healthy() -> list[Manifest]:
    """A fresh copy."""
    return [
        _object("v1", "ConfigMap", "run", data={"run.toml": RUN_TOML}),
        _object("v1", "ConfigMap", "redis", data={"redis.conf": REDIS_CONF}),
        _object("v1", "Namespace", "isentrope"),
        _object("v1", "ServiceAccount", "isentrope"),
        _object("v1", "PersistentVolumeClaim", "data"),
        _object("scheduling.k8s.io/v1", "PriorityClass", "isentrope", value=1),
        _object("apps/v1", "StatefulSet", "redis", spec=_workload("redis", _redis())),
        _object(
            "apps/v1", "StatefulSet", "learner", spec=_workload("learner", _service("learner"))
        ),
        _object("apps/v1", "Deployment", "rollout", spec=_workload("rollout", _service("rollout"))),
        _object(
            "apps/v1", "Deployment", "verifier", spec=_workload("verifier", _service("verifier"))
        ),
        *[_headless(name, "redis" if name == "redis" else "grpc") for name in POLICED],
        _object(
            "policy/v1",
            "PodDisruptionBudget",
            "rollout",
            spec={"maxUnavailable": 1, "selector": _labels("rollout")},
        ),
        *_policies(),
        _object(
            "monitoring.coreos.com/v1",
            "PodMonitor",
            "isentrope",
            spec={"selector": _labels("verifier"), "podMetricsEndpoints": [{"port": "metrics"}]},
        ),
        _object(
            "keda.sh/v1alpha1",
            "TriggerAuthentication",
            "redis",
            spec={
                "secretTargetRef": [
                    {"parameter": "password", "name": "redis-auth", "key": "monitor"}
                ]
            },
        ),
        _object("keda.sh/v1alpha1", "ScaledObject", "verifier", spec=_by_backlog()),
        _object("keda.sh/v1alpha1", "ScaledObject", "rollout", spec=_by_starvation()),
    ]


def _object(api_version: str, kind: str, name: str, **rest: Any) -> Manifest:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, **rest}


def _labels(name: str) -> Manifest:
    return {"matchLabels": {"app.kubernetes.io/name": name}}


def _workload(name: str, container: Manifest) -> Manifest:
    return {
        "selector": _labels(name),
        "serviceName": name,
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": name}},
            "spec": {
                "serviceAccountName": "isentrope",
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "priorityClassName": "isentrope",
                "terminationGracePeriodSeconds": 600,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "seccompProfile": {"type": "RuntimeDefault"},
                    "sysctls": [{"name": "net.ipv4.ip_local_port_range", "value": "32768 60999"}],
                },
                "containers": [container],
                "volumes": [
                    {"name": "run", "configMap": {"name": "run"}},
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
                    {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
                ],
            },
        },
    }


def _container(name: str) -> Manifest:
    return {
        "name": name,
        "image": f"isentrope/{name}:1",
        "env": [],
        "resources": {
            "requests": {"cpu": "100m", "memory": "1Gi"},
            "limits": {"memory": "8Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "run", "mountPath": "/etc/isentrope"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _redis() -> Manifest:
    return {
        **_container("redis"),
        "command": ["valkey-server"],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "livenessProbe": {"tcpSocket": {"port": "redis"}},
    }


def _service(name: str) -> Manifest:
    ready: Manifest = {"grpc": {"port": 7070, "service": SERVICES[name]}}
    container = _container(name)
    container["volumeMounts"].append(
        {"name": "data", "mountPath": "/data/models", "subPath": "models", "readOnly": True}
    )
    return {
        **container,
        "workingDir": "/data",
        "command": ["python", "-m", f"services.{name}"],
        "args": ["--config=/etc/isentrope/run.toml", "--name=$(POD_NAME)"],
        "ports": [
            {"name": "grpc", "containerPort": 7070},
            {"name": "metrics", "containerPort": 9464},
        ],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "ISENTROPE_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "ISENTROPE_BIND", "value": "0.0.0.0"},
            {"name": "ISENTROPE_PORT", "value": "7070"},
            {"name": "ISENTROPE_METRICS_PORT", "value": "9464"},
            {
                "name": "REDIS_PASSWORD",
                "valueFrom": {"secretKeyRef": {"name": "redis-auth", "key": name}},
            },
            {"name": "REDIS_URL", "value": f"redis://{name}:$(REDIS_PASSWORD)@redis:6379/0"},
        ],
        "startupProbe": ready,
        "readinessProbe": ready,
        "livenessProbe": {"grpc": {"port": 7070, "service": "isentrope.progress"}},
    }


def _headless(name: str, port: str) -> Manifest:
    ports = [{"name": port, "port": 1, "targetPort": port}]
    spec = {"clusterIP": "None", "selector": _labels(name)["matchLabels"], "ports": ports}
    return _object("v1", "Service", name, spec=spec)


def _policies() -> list[Manifest]:
    """Deny, and what is needed."""
    wide = [{"port": 32768, "endPort": 60999}]
    grpc = [{"port": "grpc"}]
    redis = {"to": [_peer("redis")], "ports": [{"port": "redis"}]}
    everybody = [_peer(name) for name in ("learner", "rollout", "verifier")]
    return [
        _policy("deny", {}, [], []),
        _policy("redis", _labels("redis"), [{"from": everybody, "ports": [{"port": "redis"}]}], []),
        _policy(
            "verifier",
            _labels("verifier"),
            [{"from": [_peer("learner")], "ports": grpc}],
            [redis],
        ),
        _policy(
            "rollout",
            _labels("rollout"),
            [
                {"from": [_peer("learner")], "ports": grpc},
                {"from": [_peer("learner"), _peer("rollout")], "ports": wide},
            ],
            [
                redis,
                {"to": [_peer("learner")], "ports": grpc},
                {"to": [_peer("learner"), _peer("rollout")], "ports": wide},
            ],
        ),
        _policy(
            "learner",
            _labels("learner"),
            [{"from": [_peer("rollout")], "ports": grpc + wide}],
            [
                redis,
                {"to": [_peer("rollout")], "ports": grpc + wide},
                {"to": [_peer("verifier")], "ports": grpc},
            ],
        ),
    ]


def _peer(name: str) -> Manifest:
    return {"podSelector": _labels(name)}


def _policy(
    name: str, selector: Manifest, ingress: list[Manifest], egress: list[Manifest]
) -> Manifest:
    spec = {
        "podSelector": selector,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)


def _by_backlog() -> Manifest:
    return {
        "scaleTargetRef": {"kind": "Deployment", "name": "verifier"},
        "triggers": [
            {
                "type": "redis-streams",
                "metadata": {
                    "address": "redis.isentrope.svc.cluster.local:6379",
                    "stream": "isentrope:{demo}:rollouts",
                    "streamLength": "8",
                },
                "authenticationRef": {"name": "redis"},
            }
        ],
    }


def _by_starvation() -> Manifest:
    phases = 'sum(rate(isentrope_learner_phase_seconds_total{namespace="isentrope"}[15m]))'
    waits = phases.replace('isentrope"', 'isentrope",phase="wait_data"')
    return {
        "scaleTargetRef": {"kind": "Deployment", "name": "rollout"},
        "triggers": [
            {
                "type": "prometheus",
                "metricType": "Value",
                "metadata": {
                    "serverAddress": "http://prometheus:9090",
                    "query": f"{waits} / ({phases} > 0)",
                    "threshold": "0.2",
                    "ignoreNullValues": "false",
                },
            }
        ],
    }
