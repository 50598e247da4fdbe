"""A real Prometheus beside a run on this machine: `make monitor RUN=runs/ID`.

Asks the run's leases who serves metrics and where, every few seconds, and writes that down for
Prometheus, which reads it again by itself. Prometheus keeps its data in the run's folder, so it can
be looked at after the run. Ends with Ctrl-C or SIGTERM, and ends Prometheus with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli.run_folder import RunFolder, existing_run
from services.cli.status import redis_url_of
from shared.config import Environment
from shared.errors import IsentropeError, StartError, StreamError
from shared.lease import Member, Registry
from shared.redis_connection import connect
from shared.redis_stream import key_prefix
from shared.roles import METRICS_NAME, OPERATOR
from shared.tls import AUTHORITIES, Credentials

LOOK_SECONDS = 5.0
GRACE_SECONDS = 10.0
_HERE = Path(__file__).parent


def find_prometheus() -> str:
    """The binary: `$PROMETHEUS`, or the one on the path.

    Raises:
        StartError: there is none.
    """
    given = os.environ.get("PROMETHEUS", "prometheus")
    found = shutil.which(given)
    if found is None:
        raise StartError(
            f"PROMETHEUS = {given!r}: not found; on Debian: apt-get install prometheus"
            " (stop its service), or set PROMETHEUS to the binary"
        )
    return found


def write_targets(path: Path, members: Sequence[Member]) -> None:
    """Write who is to be scraped, by its name; Prometheus never sees half a file."""
    targets = [
        {"targets": [member.metrics_address], "labels": {"instance": member.name}}
        for member in members
    ]
    text = json.dumps(targets, indent=1) + "\n"
    if path.exists() and path.read_text("utf8") == text:
        return
    new = path.with_suffix(".new")
    new.write_text(text, "utf8")
    new.replace(path)


async def monitor(folder: RunFolder, *, binary: str, port: int) -> int:
    """Run Prometheus until it ends or this is told to; its exit status, 0 when told.

    Raises:
        StartError: the run does not run.
    """
    client = connect(redis_url_of(folder), timeout_seconds=2.0, retries=0)
    registry = Registry(client, prefix=key_prefix(folder.run_id))
    place = _lay_out(folder)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await _look(registry, place)
    process = await asyncio.create_subprocess_exec(
        binary,
        f"--config.file={place / 'prometheus.yml'}",
        f"--storage.tsdb.path={place / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
        # Ctrl-C in a terminal is for this process, which then ends Prometheus.
        start_new_session=True,
    )
    print(f"Prometheus at http://127.0.0.1:{port} (alerts: /alerts); Ctrl-C ends it", flush=True)
    ended = asyncio.create_task(process.wait())
    try:
        while not (ended.done() or stopping.is_set()):
            await _wait(stopping, ended)
            await _look(registry, place)
        return 0 if stopping.is_set() else await ended
    finally:
        await _end(process)
        await client.aclose()


def _lay_out(folder: RunFolder) -> Path:
    """The configuration beside the targets, since Prometheus reads both from one folder."""
    place = folder.path / "prometheus"
    place.mkdir(exist_ok=True)
    shutil.copyfile(_HERE / "rules.yml", place / "rules.yml")
    configuration = (_HERE / "prometheus.yml").read_text("utf8")
    (place / "prometheus.yml").write_text(configuration + _access(Environment.read()), "utf8")
    return place


def _access(environment: Environment) -> str:
    """What the last job, the run's, needs where services ask for a token, or serve by TLS."""
    lines = []
    if (folder := environment.tls_folder) is not None:
        authorities = Credentials.find(folder, OPERATOR).folder / AUTHORITIES
        lines += ["    scheme: https", "    tls_config:", f"      ca_file: {authorities}"]
        lines += [f"      server_name: {METRICS_NAME}"]
    if (token := environment.metrics_token_file) is not None:
        lines += ["    authorization:", f"      credentials_file: {token.absolute()}"]
    return "".join(f"{line}\n" for line in lines)


async def _look(registry: Registry, place: Path) -> None:
    try:
        members = await registry.members()
    except StreamError as error:
        print(f"the run does not answer, its targets stay as they are: {error}", file=sys.stderr)
    else:
        write_targets(place / "targets.json", members)


async def _wait(stopping: asyncio.Event, ended: asyncio.Task[int]) -> None:
    told = asyncio.create_task(stopping.wait())
    await asyncio.wait({told, ended}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


def main() -> int:
    """Do what the arguments say; 2 for bad input, else Prometheus' own status."""
    parser = argparse.ArgumentParser(prog="monitor.py", description="Prometheus beside a run.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus, on 127.0.0.1")
    given = parser.parse_args()
    try:
        return asyncio.run(
            monitor(existing_run(given.folder), binary=find_prometheus(), port=given.port)
        )
    except IsentropeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
