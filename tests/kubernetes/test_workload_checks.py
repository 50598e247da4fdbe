"""Each check of how pods are run finds the fault that it is for."""

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

BREAKS: list[tuple[str, Break, str]] = [
    (
        "no memory limit",
        lambda o: put(container(o, REDIS)["resources"], limits={"cpu": "1"}),
        "has no memory limit",
    ),
    (
        "more requested than the limit",
        lambda o: put(container(o, VERIFIER)["resources"]["requests"], memory="9Gi"),
        "requests more memory than its limit",
    ),
    (
        "a request left out",
        lambda o: container(o, VERIFIER)["resources"]["requests"].pop("cpu"),
        "requests no cpu",
    ),
    (
        "GPUs on nodes whose taint is not tolerated",
        lambda o: container(o, ROLLOUT)["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
        "does not tolerate",
    ),
    (
        "GPUs under requests",
        lambda o: container(o, ROLLOUT)["resources"]["requests"].update({"nvidia.com/gpu": "1"}),
        "they stand under limits alone",
    ),
    (
        "an image without a version",
        lambda o: put(container(o, REDIS), image="registry:5000/valkey"),
        "names no version",
    ),
    (
        "the newest image, whatever it is",
        lambda o: put(container(o, REDIS), image="valkey:latest"),
        "names no version",
    ),
    (
        "a way to gain privileges",
        lambda o: put(container(o, REDIS)["securityContext"], allowPrivilegeEscalation=True),
        "may gain privileges",
    ),
    (
        "capabilities kept",
        lambda o: put(container(o, REDIS)["securityContext"], capabilities={}),
        "keeps capabilities",
    ),
    (
        "a capability that no component needs",
        lambda o: put(container(o, REDIS)["securityContext"]["capabilities"], add=["SYS_ADMIN"]),
        "adds capabilities",
    ),
    (
        "a root file system to write to",
        lambda o: put(container(o, REDIS)["securityContext"], readOnlyRootFilesystem=False),
        "may write to its root file system",
    ),
    ("root", lambda o: put(pod(o, REDIS)["securityContext"], runAsUser=0), "may run as root"),
    (
        "no seccomp profile",
        lambda o: pod(o, REDIS)["securityContext"].pop("seccompProfile"),
        "has no seccomp profile",
    ),
    (
        "a token for the API server",
        lambda o: pod(o, REDIS).pop("automountServiceAccountToken"),
        "is given a token",
    ),
    ("the host's network", lambda o: put(pod(o, ROLLOUT), hostNetwork=True), "hostNetwork is on"),
    (
        "a probe with two handlers",
        lambda o: put(container(o, REDIS)["livenessProbe"], exec={"command": ["true"]}),
        "must have one handler",
    ),
    (
        "no startup probe",
        lambda o: container(o, ROLLOUT).pop("startupProbe"),
        "has no startupProbe",
    ),
    (
        "liveness that restarts who waits for others",
        lambda o: put(container(o, LEARNER), livenessProbe=container(o, LEARNER)["readinessProbe"]),
        "livenessProbe asks for the health of 'isentrope.v1.Learner'",
    ),
    (
        "shared memory on a disk",
        lambda o: pod(o, ROLLOUT)["volumes"][1]["emptyDir"].pop("medium"),
        "/dev/shm is not an emptyDir in memory",
    ),
    (
        "more shared memory than memory",
        lambda o: put(pod(o, ROLLOUT)["volumes"][1]["emptyDir"], sizeLimit="9Gi"),
        "/dev/shm is larger than the memory limit",
    ),
    (
        "an end that takes longer than the grace",
        lambda o: put(pod(o, VERIFIER), terminationGracePeriodSeconds=30),
        "a grace of 30 s",
    ),
    (
        "ranks that are killed in the middle of their checkpoint",
        lambda o: put(container(o, LEARNER), command=["torchrun"], args=["-m", "services.learner"]),
        "torchrun kills its ranks 30 s after SIGTERM",
    ),
]


@pytest.mark.parametrize(("make", "words"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_a_fault_is_found(make: Break, words: str) -> None:
    found = found_after(make)
    assert any(words in line for line in found), found
