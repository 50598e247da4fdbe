"""`make lint`'s look at the packages, asked of a service that a test answers for."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "deploy/requirements/audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def service(vulnerable: str) -> Iterator[str]:
    """An advisory service that knows of one package."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            found = [
                {"vulns": [{"id": "PYSEC-1"}]} if each["package"]["name"] == vulnerable else {}
                for each in asked
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": found}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


PINS = [("grpcio", "1.85.1"), ("torch", "2.13.0+cpu")]


def test_a_known_vulnerability_is_a_fault_unless_it_was_looked_at(audit: ModuleType) -> None:
    with service("torch") as url:
        assert audit.vulnerable(PINS, url, {}) == ["torch==2.13.0+cpu: PYSEC-1"]
        assert audit.vulnerable(PINS, url, {"PYSEC-1": "not on a CPU"}) == []


def test_without_a_service_it_says_that_nothing_was_audited_and_is_content(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.vulnerable(PINS, "http://127.0.0.1:1", {}) == []
    assert capsys.readouterr().out.startswith("not audited: no advisory service reachable (http:")


def test_every_pin_of_ours_is_exact_and_says_the_same_in_each_file(audit: ModuleType) -> None:
    pins = {path.name: audit.read_pins(path) for path in audit.HERE.glob("*.txt")}
    assert not any(bad for _, bad in pins.values())
    assert not list(audit.contradictions({name: found for name, (found, _) in pins.items()}))


def test_what_is_no_exact_pin_is_told(audit: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "cpu.txt"
    path.write_text("# why\nA.b_c==1.0\nd>=2\ne\nf==1.*\n")
    assert audit.read_pins(path) == ({"a-b-c": "1.0"}, ["d>=2", "e", "f==1.*"])


def test_two_versions_in_one_environment_are_told(audit: ModuleType) -> None:
    pins: dict[str, dict[str, str]] = {name: {} for each in audit.ENVIRONMENTS for name in each}
    assert not list(audit.contradictions({**pins, "ops.txt": {"a": "1"}, "cpu.txt": {"a": "2"}}))
    found = list(audit.contradictions({**pins, "verifier.txt": {"a": "1"}, "cpu.txt": {"a": "2"}}))
    assert found == ["verifier.txt: a==1, but 2 beside it"]


def test_a_licence_nobody_agreed_to_is_told(audit: ModuleType) -> None:
    def package(**fields: str) -> Any:
        metadata = Message()
        for name, value in fields.items():
            metadata[name.replace("_", "-")] = value
        return SimpleNamespace(metadata=metadata)

    packages = [
        package(Name="a", License_Expression="MIT AND Apache-2.0"),
        package(Name="b", Classifier="License :: OSI Approved :: BSD License"),
        package(Name="c", License="AGPL-3.0"),
        package(Name="d"),
    ]
    assert list(audit.unknown_licences(iter(packages))) == [
        "c: licence 'AGPL-3.0' is not among those agreed to",
        "d: licence '' is not among those agreed to",
    ]
