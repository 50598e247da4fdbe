"""What the run file says and what the manifests give agree; names are those of the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from services.cli.check import describe
from shared.config import Environment, RunConfig, parse_run
from shared.errors import ConfigError
from tests.kubernetes.manifests import Manifest, Pod, arguments, of_kind, option, pods, quantity
from tests.kubernetes.workloads import GPU, SERVICES

RUN_FILE = "run.toml"
_FRAGMENTATION = 1.3
_PLATFORM = {"HOME", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "POD_NAME", "REDIS_PASSWORD"}
"""Variables that are not for our code."""


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One line for each disagreement."""
    texts = list(run_files(manifests))
    if len(texts) != 1:
        yield f"{len(texts)} ConfigMaps hold a {RUN_FILE}; there must be one"
        return
    try:
        config = parse_run(texts[0])
        describe(config)
    except ConfigError as error:
        yield f"{RUN_FILE}: {error}"
        return
    yield from _gpus(config, manifests)
    yield from _redis(config, manifests)
    yield from _liveness(config, manifests)
    yield from _model(config, manifests)
    for pod in pods(manifests):
        if pod.name in SERVICES:
            yield from _command(pod)


def run_files(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The run files of all ConfigMaps."""
    for manifest in of_kind(manifests, "ConfigMap"):
        if RUN_FILE in manifest.get("data", {}):
            yield manifest["data"][RUN_FILE]


def _gpus(config: RunConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    num_ranks = 0
    for pod in pods(manifests):
        if pod.name not in ("learner", "rollout"):
            continue
        limits = pod.containers[0]["resources"]["limits"]
        num_gpus = int(quantity(limits.get(GPU, 0)))
        if pod.name == "rollout" and num_gpus not in (0, config.rollout.tensor_parallel_size):
            yield (
                f"{pod.owner}: {num_gpus} GPUs, and rollout.tensor_parallel_size ="
                f" {config.rollout.tensor_parallel_size}"
            )
        if pod.name == "learner":
            ranks = int(option(arguments(pod.containers[0]), "nproc-per-node") or 1)
            num_ranks += ranks * _num_pods(pod, manifests)
            if num_gpus not in (0, ranks):
                yield f"{pod.owner}: {ranks} ranks on {num_gpus} GPUs"
    if num_ranks != config.learner.num_ranks:
        yield f"learner: {num_ranks} ranks, and learner.num_ranks = {config.learner.num_ranks}"


def _num_pods(pod: Pod, manifests: Sequence[Manifest]) -> int:
    """Of this template: a group has one leader, and its other pods are workers."""
    for group in of_kind(manifests, "LeaderWorkerSet"):
        size = int(group["spec"]["leaderWorkerTemplate"]["size"])
        is_leader = any(port["name"] == "grpc" for port in pod.containers[0]["ports"])
        return 1 if is_leader else size - 1
    return 1


def _redis(config: RunConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in of_kind(manifests, "ConfigMap"):
        text = manifest.get("data", {}).get("redis.conf")
        if text is None:
            continue
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        settings = dict(line.split(maxsplit=1) for line in lines)
        if settings.get("maxmemory-policy") != "noeviction":
            yield "redis.conf: maxmemory-policy is not noeviction, and a full server loses streams"
        if settings.get("appendonly") != "yes":
            yield "redis.conf: appendonly is not yes, and a restart loses streams"
        if "aclfile" not in settings:
            yield "redis.conf: no aclfile, and anybody may log in"
        given = int(settings.get("maxmemory", "0mb").removesuffix("mb"))
        redis = config.redis
        needed = _FRAGMENTATION * (3 * redis.max_groups_mib + redis.max_prompts_mib)
        if given < needed:
            yield f"redis.conf: maxmemory {given}mb, and full streams take {needed:.0f}"
        for pod in pods(manifests):
            limit = pod.containers[0]["resources"]["limits"].get("memory", 0)
            if pod.name == "redis" and quantity(limit) < 1.5 * given * 2**20:
                yield "redis: the memory limit is below 1.5 times maxmemory: no room to fork"


def _liveness(config: RunConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    """The default suits a step of the demo; a longer step or checkpoint would be ended by it."""
    has_gpus = any(
        GPU in container["resources"].get("limits", {})
        for pod in pods(manifests)
        for container in pod.containers
    )
    if has_gpus and "stall_seconds" not in config.watchdog.model_fields_set:
        yield (
            f"{RUN_FILE}: watchdog.stall_seconds is not set, and liveness ends who makes no"
            f" progress within {config.watchdog.stall_seconds:.0f} s"
        )


def _model(config: RunConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    """A verifier, which runs what models wrote, reads the tokenizer and no checkpoint."""
    for pod in pods(manifests):
        if pod.name != "verifier":
            continue
        container = pod.containers[0]
        working = PurePosixPath(container["workingDir"])
        model = working / config.model_path
        run = working / config.run.directory / config.run.name
        mounts = [
            (PurePosixPath(mount["mountPath"]), mount)
            for mount in container["volumeMounts"]
            if "persistentVolumeClaim" in pod.volumes.get(mount["name"], {})
        ]
        if not any(model.is_relative_to(path) for path, _ in mounts):
            yield f"{pod.owner}: {config.model_path}, the model's folder, is not mounted"
        for path, mount in mounts:
            if run.is_relative_to(path) or path.is_relative_to(run):
                yield f"{pod.owner}: {path} shows it the run's checkpoints"
            if path != working / mount.get("subPath", ""):
                yield f"{pod.owner}: {path} is another folder for the other services"
            if mount.get("readOnly") is not True:
                yield f"{pod.owner}: may write to {path}"


def _command(pod: Pod) -> Iterator[str]:
    """The service's own module, with arguments and variables that it reads."""
    container = pod.containers[0]
    words = arguments(container)
    if f"services.{pod.name}" not in words:
        yield f"{pod.owner}: does not start services.{pod.name}"
    known = set(re.findall(r'"([A-Z_]+)"', inspect.getsource(Environment.read)))
    given = {variable["name"] for variable in container["env"]}
    for name in sorted(given - known - _PLATFORM):
        if not name.startswith(("NCCL_", "GLOO_")):
            yield f"{pod.owner}: {name} is read by nobody"
    for name in ("REDIS_URL", "ISENTROPE_HOST", "ISENTROPE_BIND"):
        if name not in given:
            yield f"{pod.owner}: {name} is not set"
    yield from _redis_user(container, pod)
    yield from _ports(container, pod)


def _redis_user(container: Manifest, pod: Pod) -> Iterator[str]:
    """Each service is the user of its own name, with that user's password."""
    for variable in container["env"]:
        if variable["name"] == "REDIS_URL" and f"://{pod.name}:$(" not in variable["value"]:
            yield f"{pod.owner}: REDIS_URL is not that of user {pod.name}"
        if variable["name"] == "REDIS_PASSWORD":
            key = variable["valueFrom"]["secretKeyRef"]["key"]
            if key != pod.name:
                yield f"{pod.owner}: REDIS_PASSWORD is that of user {key!r}"


def _ports(container: Manifest, pod: Pod) -> Iterator[str]:
    variables = {each["name"]: each.get("value") for each in container["env"]}
    ports = {each["name"]: str(each["containerPort"]) for each in container["ports"]}
    for name, variable in (("grpc", "ISENTROPE_PORT"), ("metrics", "ISENTROPE_METRICS_PORT")):
        given = variables.get(variable)
        if name in ports and given != ports[name]:
            yield f"{pod.owner}: {variable} = {given}, port {name} is {ports[name]}"
