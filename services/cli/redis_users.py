"""`isentrope redis-users`: passwords and the access list for a Redis server of one's own.

The folder holds a file for each user with nothing but the password, and `users.acl` for the server.
A password in `<user>.previous` is let in as well, so that services may change over one by one.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from shared.errors import ConfigError, StartError
from shared.redis_users import USERS, User, access_list

ACCESS_LIST = "users.acl"

_PASSWORD = re.compile(r"[A-Za-z0-9_-]{16,512}")
"""What stands in a URL as it is, and is not guessed."""


def write_users(folder: Path, *, run_id: str | None) -> None:
    """Make the passwords that are not there yet, and write the access list anew.

    Args:
        run_id: the only run that they are for; None: every run on that server.
    Raises:
        ConfigError: a file does not hold a password that is fit for a URL.
        StartError: the folder cannot be read or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        passwords = {user: _passwords(folder, user) for user in USERS}
        path = folder / ACCESS_LIST
        path.write_text(access_list(passwords, run_id=run_id), "utf8")
    except OSError as error:
        raise StartError(f"{folder}: {error}; make it readable and writable") from None
    print(f"{path}: {', '.join(USERS)}; their passwords are beside it")


def _passwords(folder: Path, user: User) -> list[str]:
    current, previous = folder / user, folder / f"{user}.previous"
    if not current.exists():
        descriptor = os.open(current, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(24))
    return [_read(path) for path in (current, previous) if path.exists()]


def _read(path: Path) -> str:
    text = path.read_bytes().decode("utf8", "replace")
    if not _PASSWORD.fullmatch(text):
        raise ConfigError(
            f"{path}: must hold 16 to 512 letters, digits, dashes or underscores, and nothing else,"
            " no newline either; delete it to have one made"
        )
    return text
