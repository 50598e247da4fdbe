"""The verifier, started by the words and variables of its manifest, at a Redis as the base sets it.

What a cluster adds is stood in for: the pod's address is 127.0.0.1, the ports are free ones, and
the folders are temporary.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.__main__ import main
from services.cli.launch import free_port
from shared.lease import Registry
from shared.redis_connection import connect
from shared.redis_server import prepare_redis, until_redis_answers
from shared.redis_stream import key_prefix
from shared.rpc import open_channel
from shared.tasks.countdown import Countdown
from shared.tls import Credentials
from shared.tokenizer import save_characters
from tests.certificates import Authority
from tests.kubernetes.kustomize import KUBERNETES
from tests.kubernetes.manifests import Manifest, arguments, of_kind, parse
from tests.kubernetes.secured import mounted, secured, write_secrets
from tests.security.identities import TOKEN
from tests.security.services import CALL_SECONDS, address, get_status, serving

BASE = KUBERNETES / "base"
PASSWORD = secrets.token_hex(16)
START_SECONDS = 120.0

pytestmark = pytest.mark.integration

# A refused connection is tried again soon, as a probe does.
_OPTIONS = [("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with the base's own configuration and the users that deploy/README.md makes."""
    folder = tmp_path_factory.mktemp("redis")
    (folder / "verifier").write_text(PASSWORD, "utf8")
    assert main(["redis-users", str(folder)]) == 0
    port = free_port()
    text = (BASE / "redis.conf").read_text("utf8")
    text = text.replace("port 6379", f"port {port}").replace("dir /data", f"dir {folder}")
    text = text.replace("/etc/redis-auth/users.acl", str(folder / "users.acl"))
    (folder / "redis.conf").write_text(text, "utf8")
    bundled = prepare_redis(folder / "unused")
    server = subprocess.Popen([bundled.command[0], str(folder / "redis.conf")])
    try:
        url = f"redis://verifier:{PASSWORD}@127.0.0.1:{port}"
        asyncio.run(until_redis_answers(url, timeout_seconds=START_SECONDS))
        yield port
    finally:
        server.terminate()
        server.wait(20)
        bundled.remove_socket_folder()


async def test_nobody_gets_in_without_the_password(redis_port: int) -> None:
    client = connect(f"redis://127.0.0.1:{redis_port}", retries=0)
    with pytest.raises(Exception, match="Authentication required"):
        await client.ping()
    await client.aclose()


def deployment() -> Manifest:
    [found] = of_kind(parse((BASE / "verifier.yaml").read_text("utf8")), "Deployment")
    return found


def pod_of(workload: Manifest) -> Manifest:
    found: Manifest = workload["spec"]["template"]["spec"]
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """`$(NAME)` as the kubelet replaces it."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)


def environment(given: Manifest, redis_port: int, ports: dict[str, int]) -> dict[str, str]:
    """What the kubelet would set."""
    known = {
        "POD_NAME": "verifier-7d4b9-x2x8z",
        "ISENTROPE_HOST": "127.0.0.1",
        "REDIS_PASSWORD": PASSWORD,
        "ISENTROPE_PORT": str(ports["grpc"]),
        "ISENTROPE_METRICS_PORT": str(ports["metrics"]),
    }
    variables: dict[str, str] = {}
    for each in given["env"]:
        name = each["name"]
        variables[name] = known[name] if name in known else expand(each["value"], variables)
    variables["REDIS_URL"] = variables["REDIS_URL"].replace("redis:6379", f"127.0.0.1:{redis_port}")
    return variables


def write_run(folder: Path) -> Path:
    """A run file whose model is a tokenizer, which is all that a verifier needs of one."""
    task = Countdown()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2"}', "utf8")
    save_characters(task.alphabet, end=task.end, folder=folder / "model")
    run = folder / "run.toml"
    run.write_text(
        f'[run]\nname = "pod"\nnum_steps = 1\n[model]\npath = "{folder / "model"}"\n'
        "max_length = 64\n[rollout]\nmax_completion_tokens = 32\n",
        "utf8",
    )
    return run


async def health(port: int, service: str) -> str:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await stub.Check(request, timeout=START_SECONDS, wait_for_ready=True)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@contextmanager
def running(
    given: Manifest, variables: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The container's process; what it logged is printed at its end."""
    run = write_run(folder)
    words = [expand(word, variables) for word in arguments(given)]
    words = [word.replace("/etc/isentrope/run.toml", str(run)) for word in words]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        print((folder / "log").read_text("utf8"))


async def test_a_pod_becomes_ready_is_scraped_and_ends(redis_port: int, tmp_path: Path) -> None:
    [given] = pod_of(deployment())["containers"]
    ports = {"grpc": free_port(), "metrics": free_port()}
    variables = environment(given, redis_port, ports)
    with running(given, variables, tmp_path) as process:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = given[kind]["grpc"]["service"]
            assert await health(ports["grpc"], asked) == "SERVING", kind
        url = f"http://127.0.0.1:{ports['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=START_SECONDS) as reply:
            told = reply.read()
        assert b'isentrope_run_info{algorithm="vanilla"' in told
        assert b"isentrope_certificate_expiry_timestamp_seconds{" not in told
        client = connect(variables["REDIS_URL"])
        [member] = await Registry(client, prefix=key_prefix("pod")).members()
        await client.aclose()
        assert member.name == "verifier-7d4b9-x2x8z"
        assert member.address == f"127.0.0.1:{ports['grpc']}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_SECONDS) == 0


async def test_with_mtls_a_pod_becomes_ready_and_talks_to_who_has_a_certificate(
    redis_port: int, tmp_path: Path
) -> None:
    write_secrets(tmp_path, Authority(), token=TOKEN)
    pod = pod_of(secured(deployment()))
    [given] = pod["containers"]
    ports = {"grpc": free_port(), "metrics": free_port()}
    variables = environment(given, redis_port, ports)
    for path, folder in mounted(pod, tmp_path).items():
        variables = {name: value.replace(path, str(folder)) for name, value in variables.items()}
    place, operator = f"127.0.0.1:{ports['grpc']}", Credentials(tmp_path / "tls-operator")
    with running(given, variables, tmp_path) as process:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            await until_well(given[kind]["httpGet"], ports, process)
        asked = given["livenessProbe"]["httpGet"] | {"path": "/metrics"}
        assert await answer(asked, ports) == 401
        assert await answer(asked, ports, authorization=f"Bearer {TOKEN}") == 200
        async with open_channel(place, role="verifier", tls=operator) as channel:
            assert await get_status(channel, "verifier") == (grpc.StatusCode.OK, "")
        async with grpc.aio.insecure_channel(place, options=_OPTIONS) as channel:
            assert (await get_status(channel, "verifier"))[0] == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("caller", "role"), [("learner", "rollout"), ("operator", "learner")])
async def test_with_mtls_the_other_services_take_each_other_s_certificates(
    caller: str, role: str, tmp_path: Path
) -> None:
    write_secrets(tmp_path, Authority(), token=TOKEN)
    own = Credentials(tmp_path / f"tls-{caller}")
    async with (
        serving(role, Credentials.of_role(tmp_path / f"tls-{role}", role)) as server,
        open_channel(address(server), role=role, tls=own) as channel,
    ):
        assert await get_status(channel, role) == (grpc.StatusCode.OK, "")


async def until_well(
    probe: Manifest, ports: dict[str, int], process: subprocess.Popen[bytes]
) -> None:
    """As long as the process starts, nobody listens or health says 503."""
    async with asyncio.timeout(START_SECONDS):
        while process.poll() is None and await answer(probe, ports) != 200:
            await asyncio.sleep(0.1)
    assert process.poll() is None


async def answer(probe: Manifest, ports: dict[str, int], authorization: str = "") -> int:
    """The status by which a kubelet, which checks no certificate, judges; 0 without an answer."""
    assert probe["scheme"] == "HTTPS"
    url = f"https://127.0.0.1:{ports[probe['port']]}{probe['path']}"
    asked = urllib.request.Request(url, headers={"Authorization": authorization})

    def ask() -> int:
        unchecked = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(asked, timeout=CALL_SECONDS, context=unchecked) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, ConnectionError):
            return 0

    return await asyncio.to_thread(ask)


def test_the_readme_s_secret_is_the_one_that_is_used_here() -> None:
    text = (KUBERNETES.parent / "README.md").read_text("utf8")
    assert "isentrope redis-users redis-auth" in text
    assert "create secret generic redis-auth --from-file=redis-auth" in text
