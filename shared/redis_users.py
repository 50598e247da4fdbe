"""Who may do what on the Redis server: one user for each role, as an access control list.

What a role needs stands here once. `isentrope up` gives these users to the server that it starts,
`isentrope redis-users` writes them for a server of one's own. Redis lets a call pass if one of a
user's selectors, the parts in brackets, covers its command and all its keys. Commands inside a
script are checked like those outside, so a role that may call a script can also call its commands
one by one: a password opens the role's own streams, and nothing else.

Key permissions by reading and writing came with Redis 7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from shared.stream import DEAD_LETTER, PROMPTS, ROLLOUTS, SCORED

User = Literal["learner", "rollout", "verifier", "operator", "monitor"]
"""The services; a person with `isentrope status` and `dead-letters`; what scrapes and scales."""

USERS: tuple[User, ...] = get_args(User)

_STREAMS = (PROMPTS, ROLLOUTS, SCORED, DEAD_LETTER)

_HANDLED: Mapping[User, Sequence[str]] = {
    "learner": _STREAMS,
    "rollout": (PROMPTS, ROLLOUTS, DEAD_LETTER),
    "verifier": (ROLLOUTS, SCORED, DEAD_LETTER),
    "operator": _STREAMS,
}
"""The streams whose entries a user puts, moves, counts or removes."""

_CONSUMED: Mapping[User, str] = {"learner": SCORED, "rollout": PROMPTS, "verifier": ROLLOUTS}
"""The stream that a service takes work from."""

_HANDLE = (
    "evalsha",
    "xlen", "xrange", "xadd", "xack", "xdel", "xpending",
    "hlen", "hget", "hgetall", "hexists", "hset", "hdel", "hincrby", "expire", "del",
    "zscore", "zadd", "zremrangebyscore", "zremrangebyrank",
)  # fmt: skip
"""Of the scripts in `shared.redis_scripts` and `shared.redis_partials`, and what is called bare."""
_CONSUME = ("xreadgroup", "xpending", "xclaim")
_HOLD_LEASE = ("evalsha", "get", "set", "del", "sadd", "srem")
_COUNT = ("xlen", "xpending", "xinfo|groups", "xinfo|consumers")


def access_list(passwords: Mapping[User, Sequence[str]], *, run_id: str | None = None) -> str:
    """The text of an ACL file; there is no other user, and nobody gets in without a password.

    Args:
        passwords: by which each user may prove who it is; a user without one is left out.
        run_id: the only run whose keys they may touch, or None for every run's.
    """
    prefix = f"isentrope:{{{run_id or '*'}}}:"
    lines = ["user default reset off"]
    for user, secrets in passwords.items():
        hashes = [f"#{hashlib.sha256(secret.encode()).hexdigest()}" for secret in secrets]
        if hashes:
            lines.append(" ".join(["user", user, "reset", "on", *hashes, *_rules(user, prefix)]))
    return "\n".join(lines) + "\n"


def _rules(user: User, prefix: str) -> Iterator[str]:
    streams = [prefix + name for name in _STREAMS]
    if user == "monitor":
        yield from _commands(("ping", "info"))
        yield _selector(_COUNT, [f"%R~{stream}" for stream in streams])
        return
    yield from _commands(("ping", "script|load"))
    # Whoever starts first makes all streams; this neither reads nor changes what is in them.
    yield _selector(["xgroup|create"], [f"~{stream}" for stream in streams])
    handled = [prefix + name for name in _HANDLED[user]]
    yield _selector(_HANDLE, [f"~{each}{end}" for each in handled for end in _PARTS])
    yield _selector(["smembers", "mget"], [f"%R~{prefix}leases", f"%R~{prefix}lease:*"])
    if user in _CONSUMED:
        yield _selector(_CONSUME, [f"~{prefix}{_CONSUMED[user]}"])
        own = [f"~{prefix}lease:{user}:*", f"~{prefix}leases"]
        yield _selector(_HOLD_LEASE, own)
    if user == "learner":
        yield from _commands(["info"])
        yield _selector(["set"], [f"~{prefix}policy_version"])


_PARTS = ("", ":*")
"""A stream, and the keys beside it."""


def _commands(names: Iterable[str]) -> list[str]:
    return [f"+{name}" for name in names]


def _selector(commands: Iterable[str], keys: Iterable[str]) -> str:
    return f"({' '.join([*_commands(commands), *keys])})"
