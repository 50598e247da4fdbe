"""A service's process takes its addresses from where it was put."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared.process import ServiceArguments, run_service

RUN = '[run]\nname = "here"\nnum_steps = 1\n[warmup]\n[network]\nrollout_port = 7\n'


def started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str, *words: str, **variables: str
) -> tuple[int, list[ServiceArguments]]:
    """Exit status and arguments of a service that ends at once."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.toml").write_text(RUN, "utf8")
    given: list[ServiceArguments] = []

    async def main(arguments: ServiceArguments, stop: asyncio.Event) -> None:
        given.append(arguments)

    return run_service(role, main, ["--config", str(tmp_path / "run.toml"), *words]), given


def test_the_cluster_s_addresses_win_over_the_run_file_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, [given] = started(
        monkeypatch,
        tmp_path,
        "rollout",
        ISENTROPE_BIND="0.0.0.0",
        ISENTROPE_HOST="10.1.2.3",
        ISENTROPE_PORT="7070",
        ISENTROPE_METRICS_PORT="9464",
    )
    network = given.config.network
    assert code == 0
    assert (network.host, network.rollout_port, network.metrics_port) == ("0.0.0.0", 7070, 9464)
    assert network.verifier_port == 0
    assert given.host == "10.1.2.3"


def test_without_a_cluster_the_run_file_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, [given] = started(monkeypatch, tmp_path, "rollout")
    network = given.config.network
    assert (given.host, network.rollout_port, network.metrics_port) == ("127.0.0.1", 7, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_peers_are_never_told_an_address_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    host: str,
) -> None:
    code, given = started(monkeypatch, tmp_path, "verifier", ISENTROPE_BIND=host)
    assert (code, given) == (2, [])
    assert "set ISENTROPE_HOST" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["many", "65536", "-1"])
def test_a_port_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    code, _ = started(monkeypatch, tmp_path, "verifier", ISENTROPE_PORT=port)
    assert code == 2
    assert f"error: ISENTROPE_PORT = {port!r}" in (said := capsys.readouterr().err) or (
        f"error: ISENTROPE_PORT = {port}:" in said
    )


def test_only_a_learner_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, [given] = started(monkeypatch, tmp_path, "learner", "--stay")
    assert given.stays
    with pytest.raises(SystemExit):
        started(monkeypatch, tmp_path, "rollout", "--stay")
