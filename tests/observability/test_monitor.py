"""`make monitor` against a run's leases, with a real Prometheus where there is one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, Info, make_wsgi_app

from shared.lease import Registry
from shared.metrics_server import MetricsServer
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from shared.tls import Credentials
from tests.observability.catalogue import ROOT
from tests.security.identities import secure_machine

MONITOR = ROOT / "deploy/prometheus/monitor.py"
PROMETHEUS = shutil.which(os.environ.get("PROMETHEUS", "prometheus"))


def make_run(folder: Path, redis_url: str) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "redis-url").write_text(redis_url)


async def start(folder: Path, port: int, binary: str, **told: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(MONITOR),
        str(folder),
        f"--port={port}",
        env=os.environ | {"PROMETHEUS": binary} | told,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_without_prometheus_it_says_how_to_get_it(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "redis://127.0.0.1:1/0")
    process = await start(tmp_path / "a", free_port(), "no-such-prometheus")
    _, error = await process.communicate()
    assert process.returncode == 1
    assert b"no-such-prometheus" in error and b"apt-get install prometheus" in error


async def test_it_is_told_how_services_that_are_secured_are_asked(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "redis://127.0.0.1:1/0")
    for told in ({}, secure_machine(tmp_path)):
        process = await start(tmp_path / "a", free_port(), "true", **told)
        await process.communicate()
        written = (tmp_path / "a/prometheus/prometheus.yml").read_text("utf8")
        [job] = yaml.safe_load(written)["scrape_configs"]
        secured = {key: job.get(key) for key in ("scheme", "tls_config", "authorization")}
        assert secured == (access(tmp_path) if told else dict.fromkeys(secured))


def access(folder: Path) -> dict[str, Any]:
    return {
        "scheme": "https",
        "tls_config": {
            "ca_file": str(folder / "tls/operator/ca.crt"),
            "server_name": "metrics.isentrope",
        },
        "authorization": {"credentials_file": str(folder / "metrics-token")},
    }


@pytest.mark.integration
@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus; Debian has it")
async def test_prometheus_scrapes_who_holds_a_lease_and_judges_it(
    tmp_path: Path, redis_url: str
) -> None:
    """A learner that says that it is stalled comes out of Prometheus as a pending alert, also where
    metrics need TLS and a token."""
    make_run(tmp_path / "a", redis_url)
    metrics = CollectorRegistry()
    Info("isentrope_run", "?", registry=metrics).info({"run": "a"})
    Gauge("isentrope_learner_stalled", "?", registry=metrics).set(1)
    told = secure_machine(tmp_path)
    server = MetricsServer(
        "127.0.0.1",
        0,
        metrics=make_wsgi_app(metrics),
        tls=Credentials.of_role(Path(told["ISENTROPE_TLS"]), "learner"),
        token_file=Path(told["ISENTROPE_METRICS_TOKEN_FILE"]),
    )
    client, port = connect(redis_url), free_port()
    registry = Registry(client, prefix=key_prefix("a"))
    address = f"127.0.0.1:{server.port}"
    async with registry.hold(
        "learner", "learner", address="127.0.0.1:1", metrics_address=address, seconds=60
    ):
        process = await start(tmp_path / "a", port, str(PROMETHEUS), **told)
        try:
            query = "ALERTS%7Balertname%3D%22IsentropeLearnerStalled%22%7D"
            async with asyncio.timeout(120):
                while not (found := await ask(port, query)):
                    assert process.returncode is None
                    await asyncio.sleep(0.5)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.communicate()
    server.close()
    await client.aclose()
    assert process.returncode == 0
    assert found[0]["metric"]["run"] == "a"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5)
    targets = json.loads((tmp_path / "a/prometheus/targets.json").read_text())
    assert targets == [{"targets": [address], "labels": {"instance": "learner"}}]


async def ask(port: int, query: str) -> list[Any]:
    def get() -> list[Any]:
        url = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
                return found
        except OSError:
            return []

    return await asyncio.to_thread(get)


async def test_the_rules_become_an_object_of_the_prometheus_operator() -> None:
    made = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "deploy/prometheus/kubernetes.py"),
        stdout=asyncio.subprocess.PIPE,
    )
    text, _ = await made.communicate()
    manifest = yaml.safe_load(text)
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text("utf8"))
    assert manifest["kind"] == "PrometheusRule"
    assert manifest["spec"] == rules
    assert re.fullmatch(r"[a-z-]+", manifest["metadata"]["name"])
