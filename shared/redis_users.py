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

_FILLED: Mapping[User, Sequence[str]] = {
    "learner": (PROMPTS, DEAD_LETTER),
    "rollout": (ROLLOUTS, DEAD_LETTER),
    "verifier": (SCORED, DEAD_LETTER),
    "operator": _STREAMS,
}
"""The streams to which a user appends: an entry's id can be such that no other may follow."""

_HANDLE: Mapping[str, Sequence[str]] = {
    "": ("xlen", "xrange", "xack", "xdel", "xpending"),
    ":sizes": ("hlen", "hget", "hexists", "hset", "hdel", "hincrby", "del"),
    ":labels": ("hget", "hgetall", "hset", "hdel"),
    ":recent": ("zscore", "zadd", "zremrangebyscore", "zremrangebyrank"),
}
"""Of the scripts in `shared.redis_scripts`, by the key beside a stream, and what is called bare.
No key can be made another kind of key, which would end whoever reads it."""
_KEEP_PIECES = ("hgetall", "hset", "expire", "del")
"""Of the scripts in `shared.redis_partials`."""
_CONSUME = ("xreadgroup", "xpending", "xclaim")
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
    handled = [f"~{prefix}{name}" for name in _HANDLED[user]]
    yield _selector(["evalsha"], [each + end for each in handled for end in ("", ":*")])
    for end, commands in _HANDLE.items():
        yield _selector(commands, [each + end for each in handled])
    yield _selector(["xadd"], [f"~{prefix}{name}" for name in _FILLED[user]])
    if user == "rollout":
        yield _selector(_KEEP_PIECES, [f"~{prefix}{PROMPTS}:pieces:*"])
        yield _selector(["get"], [f"%R~{prefix}policy_version"])
    yield _selector(["sunion"], [f"%R~{prefix}leases:*"])
    yield _selector(["mget"], [f"%R~{prefix}lease:*"])
    if user in _CONSUMED:
        yield _selector(_CONSUME, [f"~{prefix}{_CONSUMED[user]}"])
        lease, index = f"~{prefix}lease:{user}:*", f"~{prefix}leases:{user}"
        yield _selector(["evalsha"], [lease, index])
        yield _selector(["get", "set", "del"], [lease])
        yield _selector(["sadd", "srem"], [index])
    if user == "learner":
        yield from _commands(["info"])
        yield _selector(["set"], [f"~{prefix}policy_version"])


def _commands(names: Iterable[str]) -> list[str]:
    return [f"+{name}" for name in names]


def _selector(commands: Iterable[str], keys: Iterable[str]) -> str:
    return f"({' '.join([*_commands(commands), *keys])})"
