"""Who may call what: the roles that certificates name, and the one table of their rights.

A role is a URI in the certificate, `spiffe://isentrope/<role>`. A service also shows the DNS name
`<role>.isentrope`, which its callers ask for: replicas are reached by addresses that change, so
what a caller checks is which role answers there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

logger = logging.getLogger(__name__)

LEARNER = "learner"
ROLLOUT = "rollout"
VERIFIER = "verifier"
OPERATOR = "operator"
"""A person, or what acts for one."""
CLIENT = "client"
"""Whoever samples or scores by direct calls, outside of the streams."""

SERVING = frozenset({LEARNER, ROLLOUT, VERIFIER})
ROLES = SERVING | {OPERATOR, CLIENT}

METRICS_NAME = "metrics.isentrope"
"""The DNS name that every service shows on its metrics port, where one scraper asks all roles."""

# `isentrope status` in the learner's pod has the learner's certificate.
_WATCHERS = frozenset({LEARNER, OPERATOR})

PERMISSIONS: Mapping[str, frozenset[str]] = {
    "/isentrope.v1.Learner/GetStatus": _WATCHERS,
    "/isentrope.v1.Learner/Pause": frozenset({OPERATOR}),
    "/isentrope.v1.Learner/Resume": frozenset({OPERATOR}),
    "/isentrope.v1.Learner/Checkpoint": frozenset({OPERATOR}),
    "/isentrope.v1.Learner/Stop": frozenset({OPERATOR}),
    "/isentrope.v1.Learner/FetchWeights": frozenset({ROLLOUT}),
    "/isentrope.v1.Rollout/GetStatus": _WATCHERS,
    "/isentrope.v1.Rollout/JoinBroadcast": frozenset({LEARNER}),
    "/isentrope.v1.Rollout/BeginUpdate": frozenset({LEARNER}),
    "/isentrope.v1.Rollout/CommitUpdate": frozenset({LEARNER}),
    "/isentrope.v1.Rollout/Serve": frozenset({LEARNER}),
    "/isentrope.v1.Rollout/AbortUpdate": frozenset({LEARNER}),
    "/isentrope.v1.Rollout/Drain": frozenset({OPERATOR}),
    "/isentrope.v1.Rollout/Generate": frozenset({CLIENT, OPERATOR}),
    "/isentrope.v1.Verifier/Score": frozenset({CLIENT, OPERATOR}),
    "/isentrope.v1.Verifier/GetStatus": _WATCHERS,
    "/grpc.health.v1.Health/Check": ROLES,
    "/grpc.health.v1.Health/Watch": ROLES,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset({OPERATOR}),
}
"""The roles that may call each method; what is not here nobody may."""

_URI = "spiffe://isentrope/"


def role_uri(role: str) -> str:
    """What a certificate of this role names."""
    return _URI + role


def server_name(role: str) -> str:
    """What the certificate of a service of this role names besides, for its callers."""
    return f"{role}.isentrope"


def peer_options(role: str) -> list[tuple[str, str]]:
    """Options of a channel whose server must have this role, whatever its address is."""
    return [("grpc.default_authority", server_name(role))]


def role_of(uri: str) -> str | None:
    """The role that a certificate's URI names; None if it is none of ours."""
    role = uri.removeprefix(_URI)
    return role if uri.startswith(_URI) and role in ROLES else None


class Guard(grpc.aio.ServerInterceptor):
    """Refuses calls of roles that the table does not let: PERMISSION_DENIED.

    Only for servers that ask every peer for a certificate.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler, handler_call_details.method)


async def _check(context: Any, method: str) -> None:
    """Abort the call unless its peer may make it."""
    uris = [uri.decode("utf8", "replace") for uri in context.auth_context().get("peer_uri", ())]
    allowed = PERMISSIONS.get(method, frozenset())
    if any(role_of(uri) in allowed for uri in uris):
        return
    logger.warning("refused %s to %s at %s", method, uris or "nobody", context.peer())
    known = ", ".join(sorted(filter(None, map(role_of, uris)))) or "none"
    await context.abort(
        grpc.StatusCode.PERMISSION_DENIED,
        f"{method}: for {', '.join(sorted(allowed)) or 'nobody'}; the caller's role is {known}",
    )


def _guarded(handler: Any, method: str) -> Any:
    """The same handler, behind the check."""
    kind = f"{_number(handler.request_streaming)}_{_number(handler.response_streaming)}"
    inner = getattr(handler, kind)

    async def answer(request: Any, context: Any) -> Any:
        await _check(context, method)
        return await inner(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await _check(context, method)
        async for message in inner(request, context):
            yield message

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        stream if inspect.isasyncgenfunction(inner) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _number(is_streaming: bool) -> str:
    return "stream" if is_streaming else "unary"
