"""Whatever opens a port or a channel in a service is given that process's credentials."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.process import ServiceArguments, run_service
from tests.certificates import Authority, write_credentials
from tests.security.identities import leaf

ROOT = Path(__file__).parent.parent.parent
OPENERS = {"serve", "serve_metrics", "open_channel", "Fleet", "Observer"}
BARE = ("insecure_channel", "add_insecure_port")
OURS = Authority("ours")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Call):
            named = node.func
            name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", "")
            yield name, node


def test_every_port_and_channel_of_the_services_is_given_credentials() -> None:
    bare, seen = [], set()
    for path in [*sorted((ROOT / "services").rglob("*.py")), ROOT / "shared/presence.py"]:
        for name, call in calls(path):
            if name in OPENERS and isinstance(call.func, ast.Name) and call.keywords:
                seen.add(name)
                if "tls" not in {keyword.arg for keyword in call.keywords}:
                    bare.append(f"{path.name}:{call.lineno} {name}")
            if name in BARE:
                bare.append(f"{path.name}:{call.lineno} {name}")
    assert (bare, seen) == ([], OPENERS)


def test_plain_text_has_two_places_and_both_ask_whether_there_are_credentials() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "shared").rglob("*.py")
        for name, _ in calls(path)
        if name in BARE
    }
    assert found == {"shared/rpc.py", "shared/weight_stream.py"}


RUN = """
[run]
name = "tls"
num_steps = 1
[model]
path = "none"
max_length = 64
[rollout]
max_completion_tokens = 8
[network]
host = "{host}"
"""


def start(folder: Path, host: str, monkeypatch: pytest.MonkeyPatch, **given: str) -> list[object]:
    """What a rollout service that is started so is given; its exit status if it is not."""
    for name in ("ISENTROPE_TLS", "ISENTROPE_HOST", "ISENTROPE_BIND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run = folder / "run.toml"
    run.write_text(RUN.format(host=host))
    seen: list[object] = []

    async def main(arguments: ServiceArguments, stop: object) -> None:
        seen.append(arguments.tls)

    status = run_service("rollout", main, [f"--config={run}"])
    return seen or [status]


def test_a_service_takes_its_credentials_from_the_folder_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_credentials(tmp_path / "tls", leaf(OURS, "rollout"), OURS)
    [tls] = start(tmp_path, "127.0.0.1", monkeypatch, ISENTROPE_TLS=str(folder))
    assert getattr(tls, "folder", None) == folder
    write_credentials(folder, leaf(OURS, "verifier"), OURS)
    assert start(tmp_path, "127.0.0.1", monkeypatch, ISENTROPE_TLS=str(folder)) == [1]
    assert f"error: {folder / 'tls.crt'}: is not for a rollout" in capfd.readouterr().err


@pytest.mark.parametrize(("host", "is_warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_plain_text_that_others_can_reach_is_warned_of_once(
    host: str,
    is_warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert start(tmp_path, host, monkeypatch, ISENTROPE_HOST="127.0.0.1") == [None]
    said = capfd.readouterr().err
    assert said.count("in plain text, by anybody: set ISENTROPE_TLS") == int(is_warned)
