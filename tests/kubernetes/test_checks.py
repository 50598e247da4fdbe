"""Each check of what manifests name, and of what they and the run file say, finds its fault."""

from __future__ import annotations

import pytest

from tests.kubernetes.breaks import (
    LEARNER,
    REDIS,
    ROLLOUT,
    VERIFIER,
    Break,
    container,
    found_after,
    pod,
    put,
)
from tests.kubernetes.check_manifests import problems
from tests.kubernetes.healthy import healthy
from tests.kubernetes.manifests import Manifest, quantity


def test_nothing_is_found_in_a_healthy_set() -> None:
    assert problems(healthy()) == []


def trigger(objects: dict[str, Manifest], name: str) -> Manifest:
    """What KEDA asks to scale a workload."""
    asked: Manifest = objects[f"ScaledObject/{name}"]["spec"]["triggers"][0]["metadata"]
    return asked


def data_mount(objects: dict[str, Manifest], owner: str) -> Manifest:
    """Where the volume of models and checkpoints is mounted."""
    mounts = container(objects, owner)["volumeMounts"]
    return next(mount for mount in mounts if mount["name"] == "data")


BREAKS: list[tuple[str, Break, str]] = [
    (
        "a selector that does not match its own pods",
        lambda o: put(o[VERIFIER]["spec"]["selector"]["matchLabels"], app="x"),
        "selector does not match",
    ),
    (
        "a budget for nobody",
        lambda o: put(
            o["PodDisruptionBudget/rollout"]["spec"], selector={"matchLabels": {"a": "b"}}
        ),
        "PodDisruptionBudget/rollout: selects no pod",
    ),
    (
        "a policy for nobody",
        lambda o: put(o["NetworkPolicy/verifier"]["spec"], podSelector={"matchLabels": {"a": "b"}}),
        "NetworkPolicy/verifier: selects no pod",
    ),
    (
        "a monitor for nobody",
        lambda o: put(o["PodMonitor/isentrope"]["spec"], selector={"matchLabels": {"a": "b"}}),
        "PodMonitor/isentrope: selects no pod",
    ),
    (
        "a service port that no container has",
        lambda o: put(o["Service/verifier"]["spec"]["ports"][0], targetPort="rpc"),
        "port 'rpc' is none of",
    ),
    (
        "a policy's port that the called pods do not have",
        lambda o: o["NetworkPolicy/verifier"]["spec"]["egress"].append(
            {**o["NetworkPolicy/verifier"]["spec"]["egress"][0], "ports": [{"port": "rediss"}]}
        ),
        "port 'rediss' is none of",
    ),
    (
        "a scraped port that no pod has",
        lambda o: put(o["PodMonitor/isentrope"]["spec"]["podMetricsEndpoints"][0], port="web"),
        "port 'web' is none of",
    ),
    (
        "a probe of a port that is not the container's",
        lambda o: put(container(o, REDIS)["livenessProbe"]["tcpSocket"], port=6380),
        "asks port 6380",
    ),
    (
        "a volume of a ConfigMap that is not there",
        lambda o: put(pod(o, REDIS)["volumes"][0]["configMap"], name="gone"),
        "ConfigMap 'gone' is not there",
    ),
    (
        "a variable from a Secret that nobody makes",
        lambda o: put(container(o, ROLLOUT)["env"][5]["valueFrom"]["secretKeyRef"], name="gone"),
        "Secret 'gone' is not there",
    ),
    (
        "a mount of no volume",
        lambda o: put(container(o, VERIFIER)["volumeMounts"][0], name="gone"),
        "mounts no volume 'gone'",
    ),
    (
        "two volumes at one path",
        lambda o: put(container(o, REDIS)["volumeMounts"][1], mountPath="/etc/isentrope"),
        "mounts two volumes at one path",
    ),
    (
        "two values for one variable",
        lambda o: container(o, REDIS)["env"].extend([{"name": "A", "value": "1"}] * 2),
        "has two values for one variable",
    ),
    (
        "a variable that is used above the line that sets it",
        lambda o: container(o, ROLLOUT)["env"].insert(0, container(o, ROLLOUT)["env"].pop(6)),
        "uses $(REDIS_PASSWORD), which no line above sets",
    ),
    (
        "an argument of a variable that nothing sets",
        lambda o: container(o, VERIFIER)["args"].append("--name=$(NODE_NAME)"),
        "uses $(NODE_NAME), which nothing sets",
    ),
    (
        "a service account that is not there",
        lambda o: put(pod(o, REDIS), serviceAccountName="gone"),
        "ServiceAccount 'gone' is not there",
    ),
    (
        "a priority that is not there",
        lambda o: put(pod(o, REDIS), priorityClassName="gone"),
        "PriorityClass 'gone' is not there",
    ),
    (
        "a scaled workload that is not there",
        lambda o: put(o["ScaledObject/verifier"]["spec"]["scaleTargetRef"], name="verifiers"),
        "scales 'verifiers', which is not there",
    ),
    (
        "a scaled workload whose number every apply puts back",
        lambda o: put(o[VERIFIER]["spec"], replicas=2),
        "an apply would undo what ScaledObject/verifier decided",
    ),
    (
        "a password that KEDA does not find",
        lambda o: put(
            o["ScaledObject/verifier"]["spec"]["triggers"][0]["authenticationRef"], name="gone"
        ),
        "TriggerAuthentication 'gone' is not there",
    ),
    (
        "gRPC behind one address",
        lambda o: o["Service/verifier"]["spec"].pop("clusterIP"),
        "make it headless",
    ),
    (
        "a stateful set of no service",
        lambda o: put(o[REDIS]["spec"], serviceName="gone"),
        "its serviceName is no headless Service",
    ),
    (
        "a name that is none",
        lambda o: put(o["Service/rollout"]["metadata"], name="Roll_out"),
        "is no RFC 1123 label",
    ),
    (
        "other GPUs than the run file says",
        lambda o: (
            container(o, ROLLOUT)["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
            put(pod(o, ROLLOUT), tolerations=[{"key": "nvidia.com/gpu"}]),
        ),
        "rollout.tensor_parallel_size = 1",
    ),
    (
        "other ranks than the run file says",
        lambda o: container(o, LEARNER)["args"].append("--nproc-per-node=2"),
        "learner.num_ranks = 1",
    ),
    (
        "a policy that is missing",
        lambda o: put(o["NetworkPolicy/learner"]["spec"], ingress=[]),
        "rollout cannot reach learner on grpc",
    ),
    (
        "a policy that opens too much",
        lambda o: (
            put(o["NetworkPolicy/verifier"]["spec"], egress=[{}]),
            put(o["NetworkPolicy/learner"]["spec"], ingress=[{}]),
        ),
        "verifier can reach learner on grpc",
    ),
    (
        "a port that a connection of the pod's own may have taken, and the broadcasts' rules open",
        lambda o: (
            put(container(o, ROLLOUT)["ports"][0], containerPort=40000),
            put(container(o, ROLLOUT)["env"][3], value="40000"),
        ),
        "port grpc is one that the kernel gives away",
    ),
    (
        "a rule for broadcasts that opens calls as well",
        lambda o: (
            o["NetworkPolicy/rollout"]["spec"]["ingress"][1]["ports"][0].update(port=1024)
            or o["NetworkPolicy/rollout"]["spec"]["egress"][2]["ports"][0].update(port=1024)
        ),
        "rollout can reach rollout on grpc",
    ),
    (
        "ports that the policies do not open",
        lambda o: put(pod(o, LEARNER)["securityContext"]["sysctls"][0], value="1024 65535"),
        "ip_local_port_range is 1024 65535",
    ),
    (
        "a run file that is wrong",
        lambda o: put(o["ConfigMap/run"]["data"], **{"run.toml": "[run]\nnam = 1\n"}),
        "run.toml: run.name: is missing",
    ),
    (
        "no run file",
        lambda o: o["ConfigMap/run"].pop("data"),
        "0 ConfigMaps hold a run.toml",
    ),
    (
        "a service that is another user",
        lambda o: put(
            container(o, VERIFIER)["env"][6], value="redis://learner:$(REDIS_PASSWORD)@r"
        ),
        "REDIS_URL is not that of user verifier",
    ),
    (
        "a service with another user's password",
        lambda o: put(container(o, VERIFIER)["env"][5]["valueFrom"]["secretKeyRef"], key="learner"),
        "REDIS_PASSWORD is that of user 'learner'",
    ),
    (
        "a Redis that evicts",
        lambda o: put(o["ConfigMap/redis"]["data"], **{"redis.conf": "appendonly yes\n"}),
        "maxmemory-policy is not noeviction",
    ),
    (
        "a Redis too small for full streams",
        lambda o: put(
            o["ConfigMap/redis"]["data"],
            **{"redis.conf": o["ConfigMap/redis"]["data"]["redis.conf"].replace("4608", "1000")},
        ),
        "maxmemory 1000mb, and full streams take 4326",
    ),
    (
        "a Redis without room to fork",
        lambda o: put(container(o, REDIS)["resources"]["limits"], memory="5Gi"),
        "no room to fork",
    ),
    (
        "the stream of another run",
        lambda o: put(
            trigger(o, "verifier"),
            stream="isentrope:{other}:rollouts",
        ),
        "and the run's is 'isentrope:{demo}:rollouts'",
    ),
    (
        "scaling by the lag alone",
        lambda o: put(
            trigger(o, "verifier"),
            consumerGroup="rollouts",
            lagCount="8",
        ),
        "only streamLength counts what waits and what is in work",
    ),
    (
        "verifiers that never hold enough to be followed by another",
        lambda o: put(trigger(o, "verifier"), streamLength="17"),
        "streamLength is above verifier.max_concurrent_groups",
    ),
    (
        "a number where KEDA wants a string",
        lambda o: put(trigger(o, "verifier"), streamLength=8),
        "8 is not of type 'string'",
    ),
    (
        "the Redis of another namespace",
        lambda o: put(o["Namespace/isentrope"]["metadata"], name="team-b"),
        "and Redis is at redis.team-b.svc.cluster.local:6379",
    ),
    (
        "the learner of another namespace",
        lambda o: put(
            trigger(o, "rollout"),
            query=trigger(o, "rollout")["query"].replace('"isentrope"', '"b"', 1),
        ),
        "isentrope_learner_phase_seconds_total of namespace 'b'",
    ),
    (
        "a share that may be 0 / 0",
        lambda o: put(
            trigger(o, "rollout"), query=trigger(o, "rollout")["query"].replace(" > 0)", ")")
        ),
        "0 / 0 is NaN",
    ),
    (
        "a question for what nobody exports",
        lambda o: put(
            trigger(o, "rollout"), query=trigger(o, "rollout")["query"].replace("_phase_", "_part_")
        ),
        "no series isentrope_learner_part_seconds_total",
    ),
    (
        "no answer that counts as no need",
        lambda o: trigger(o, "rollout").pop("ignoreNullValues"),
        "no answer counts as 0",
    ),
    (
        "a model on GPUs with the demo's patience",
        lambda o: container(o, ROLLOUT)["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
        "watchdog.stall_seconds is not set",
    ),
    (
        "a verifier that sees checkpoints",
        lambda o: put(data_mount(o, VERIFIER), mountPath="/data", subPath=""),
        "/data shows it the run's checkpoints",
    ),
    (
        "a verifier without its tokenizer",
        lambda o: put(data_mount(o, VERIFIER), mountPath="/data/data", subPath="data"),
        "models/policy, the model's folder, is not mounted",
    ),
    (
        "a verifier that finds another folder at the model's place",
        lambda o: put(data_mount(o, VERIFIER), subPath="runs"),
        "/data/models is another folder for the other services",
    ),
    (
        "a verifier that may change the model",
        lambda o: data_mount(o, VERIFIER).pop("readOnly"),
        "may write to /data/models",
    ),
    (
        "a collector that no policy leads to",
        lambda o: container(o, ROLLOUT)["env"].append(
            {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector.traces.svc:4317"}
        ),
        "cannot reach collector.traces.svc:4317",
    ),
    (
        "a collector without a namespace",
        lambda o: container(o, ROLLOUT)["env"].append(
            {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4317"}
        ),
        "cannot reach collector:4317",
    ),
    (
        "a field that a custom resource does not have",
        lambda o: put(o["ScaledObject/verifier"]["spec"], minReplicas=1),
        "'minReplicas' was unexpected",
    ),
    (
        "another service's module",
        lambda o: put(container(o, ROLLOUT), command=["python", "-m", "services.verifier"]),
        "does not start services.rollout",
    ),
    (
        "a variable that nobody reads",
        lambda o: container(o, ROLLOUT)["env"].append({"name": "ISENTROPE_HOSTS", "value": "x"}),
        "ISENTROPE_HOSTS is read by nobody",
    ),
    (
        "a pod that does not say where it is",
        lambda o: container(o, ROLLOUT)["env"].pop(1),
        "ISENTROPE_HOST is not set",
    ),
    (
        "a port that the service does not listen on",
        lambda o: put(container(o, ROLLOUT)["env"][4], value="9000"),
        "ISENTROPE_METRICS_PORT = 9000, port metrics is 9464",
    ),
]


@pytest.mark.parametrize(("make", "words"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_a_fault_is_found(make: Break, words: str) -> None:
    found = found_after(make)
    assert any(words in line for line in found), found


@pytest.mark.parametrize(
    ("text", "value"), [("250m", 0.25), ("2", 2), (3, 3), ("512Mi", 2**29), ("1Ti", 2**40)]
)
def test_a_quantity_is_read(text: str | float, value: float) -> None:
    assert quantity(text) == value


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="1 GB"):
        quantity("1 GB")
