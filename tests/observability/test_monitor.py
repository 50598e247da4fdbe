"""`make monitor` without a Prometheus, and the rules for the operator of one.

With one it stands beside a whole run, in tests/end_to_end/test_whole_run.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.observability.catalogue import ROOT
from tests.security.identities import secure_machine

MONITOR = ROOT / "deploy/prometheus/monitor.py"


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
