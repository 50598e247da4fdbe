"""The only place that reads the process environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError

_MAX_PORT = 65535

_HARMLESS = frozenset(
    (
        "PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
        "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    )
)  # fmt: skip
_HARMLESS_BEGINNINGS = ("LC_", "PYTHON")
_HARMLESS_END = "_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Environment:
    """What the launcher or the cluster tells a process.

    Attributes:
        redis_url: `REDIS_URL`; wins over the run file.
        advertised_host: `ISENTROPE_HOST`; address peers reach this process at (a pod's IP).
        bind_host, port, metrics_port: `ISENTROPE_BIND`, `ISENTROPE_PORT`, `ISENTROPE_METRICS_PORT`;
            win over the `[network]` of the run file, which then is the same everywhere.
        rank, local_rank, world_size: `RANK`, `LOCAL_RANK`, `WORLD_SIZE` as torchrun sets them.
        tls_folder: `ISENTROPE_TLS`; folder with tls.crt, tls.key and ca.crt, or with a subfolder of
            these for each role. Unset is plain text.
        metrics_token_file: `ISENTROPE_METRICS_TOKEN_FILE`; who asks for metrics must know what it
            holds. Unset is nobody's need.
        traces_endpoint: `OTEL_EXPORTER_OTLP_ENDPOINT`; where traces go. Unset is nowhere.
        master_address, master_port: `MASTER_ADDR`, `MASTER_PORT` of the learner's ranks.
    """

    redis_url: str | None
    advertised_host: str | None
    rank: int
    local_rank: int
    world_size: int
    master_address: str
    master_port: int
    bind_host: str | None = None
    port: int | None = None
    metrics_port: int | None = None
    tls_folder: Path | None = None
    metrics_token_file: Path | None = None
    traces_endpoint: str | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """From `variables`, or the process environment.

        Raises:
            ConfigError: a number is not one, or out of its range.
        """
        given = os.environ if variables is None else variables
        rank = _integer(given, "RANK", 0)
        world_size = _integer(given, "WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK = {rank}: must be below WORLD_SIZE = {world_size}")
        return cls(
            redis_url=given.get("REDIS_URL") or None,
            advertised_host=given.get("ISENTROPE_HOST") or None,
            rank=rank,
            local_rank=_integer(given, "LOCAL_RANK", 0),
            world_size=world_size,
            master_address=given.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(given, "MASTER_PORT", 0),
            bind_host=given.get("ISENTROPE_BIND") or None,
            port=_port(given, "ISENTROPE_PORT"),
            metrics_port=_port(given, "ISENTROPE_METRICS_PORT"),
            tls_folder=_path(given, "ISENTROPE_TLS"),
            metrics_token_file=_path(given, "ISENTROPE_METRICS_TOKEN_FILE"),
            traces_endpoint=given.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        )


def without_secrets(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of `variables`, or the process environment, what a program needs to run, and no more.

    Names what stays, since nobody knows what else a deployment sets: addresses with passwords,
    tokens of others.
    """
    given = os.environ if variables is None else variables
    return {
        name: value
        for name, value in given.items()
        if name in _HARMLESS
        or name.startswith(_HARMLESS_BEGINNINGS)
        or name.endswith(_HARMLESS_END)
    }


def _integer(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: must be a whole number") from None


def _path(variables: Mapping[str, str], name: str) -> Path | None:
    return Path(variables[name]) if variables.get(name) else None


def _port(variables: Mapping[str, str], name: str) -> int | None:
    if not variables.get(name):
        return None
    port = _integer(variables, name, 0)
    if not 0 <= port <= _MAX_PORT:
        raise ConfigError(f"{name} = {port}: must be a port, 0 to {_MAX_PORT}")
    return port
