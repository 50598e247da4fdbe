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
from prometheus_client import CollectorRegistry, Gauge, Info, start_http_server

from shared.lease import Registry
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from tests.observability.catalogue import ROOT

MONITOR = ROOT / "deploy/prometheus/monitor.py"
PROMETHEUS = shutil.which(os.environ.get("PROMETHEUS", "prometheus"))


def make_run(folder: Path, redis_url: str) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "redis-url").write_text(redis_url)


async def start(folder: Path, port: int, binary: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(MONITOR),
        str(folder),
        f"--port={port}",
        env=os.environ | {"PROMETHEUS": binary},
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


@pytest.mark.integration
@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus; Debian has it")
async def test_prometheus_scrapes_who_holds_a_lease_and_judges_it(
    tmp_path: Path, redis_url: str
) -> None:
    """A learner that says that it is stalled comes out of Prometheus as a pending alert."""
    make_run(tmp_path / "a", redis_url)
    metrics = CollectorRegistry()
    Info("isentrope_run", "?", registry=metrics).info({"run": "a"})
    Gauge("isentrope_learner_stalled", "?", registry=metrics).set(1)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=metrics)
    client, port = connect(redis_url), free_port()
    registry = Registry(client, prefix=key_prefix("a"))
    address = f"127.0.0.1:{server.server_port}"
    async with registry.hold(
        "learner", "learner", address="127.0.0.1:1", metrics_address=address, seconds=60
    ):
        process = await start(tmp_path / "a", port, str(PROMETHEUS))
        try:
            query = "ALERTS%7Balertname%3D%22IsentropeLearnerStalled%22%7D"
            async with asyncio.timeout(120):
                while not (found := await ask(port, query)):
                    assert process.returncode is None
                    await asyncio.sleep(0.5)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.communicate()
    server.shutdown()
    server.server_close()
    thread.join()
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
