"""On each service's port: who is refused, with which words, and who is served."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from shared.roles import peer_options
from shared.rpc import open_channel
from shared.tls import Credentials
from tests.certificates import Authority, write_credentials
from tests.security.identities import credentials, leaf
from tests.security.services import SERVICES, address, get_status, serving

OURS, THEIRS = Authority("ours"), Authority("theirs")
YESTERDAY = {"valid_from": timedelta(hours=-2), "valid_until": timedelta(hours=-1)}

Stranger = Callable[[str, str], grpc.aio.Channel]


def _secure(
    place: str, role: str, key: bytes | None, certificate: bytes | None
) -> grpc.aio.Channel:
    made = grpc.ssl_channel_credentials(OURS.certificate, key, certificate)
    return grpc.aio.secure_channel(place, made, options=peer_options(role))


def plaintext(place: str, role: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(place)


def without_certificate(place: str, role: str) -> grpc.aio.Channel:
    return _secure(place, role, None, None)


def of_another_authority(place: str, role: str) -> grpc.aio.Channel:
    shown = leaf(THEIRS, "operator")
    return _secure(place, role, shown.key, shown.certificate)


def expired(place: str, role: str) -> grpc.aio.Channel:
    shown = leaf(OURS, "operator", **YESTERDAY)
    return _secure(place, role, shown.key, shown.certificate)


def of_no_role(place: str, role: str) -> grpc.aio.Channel:
    shown = OURS.issue("x", dns=["operator.isentrope"], uris=["spiffe://elsewhere/operator"])
    return _secure(place, role, shown.key, shown.certificate)


def of_a_role_in_a_wrong_kind_of_name(place: str, role: str) -> grpc.aio.Channel:
    shown = OURS.issue("spiffe://isentrope/operator", dns=["operator"])
    return _secure(place, role, shown.key, shown.certificate)


STRANGERS: list[tuple[Stranger, grpc.StatusCode]] = [
    (plaintext, grpc.StatusCode.UNAVAILABLE),
    (without_certificate, grpc.StatusCode.UNAVAILABLE),
    (of_another_authority, grpc.StatusCode.UNAVAILABLE),
    (expired, grpc.StatusCode.UNAVAILABLE),
    (of_no_role, grpc.StatusCode.PERMISSION_DENIED),
    (of_a_role_in_a_wrong_kind_of_name, grpc.StatusCode.PERMISSION_DENIED),
]


@pytest.mark.parametrize("role", SERVICES)
async def test_strangers_are_refused_and_an_operator_is_served(role: str, tmp_path: Path) -> None:
    operator = credentials(tmp_path, OURS, "operator")
    async with serving(role, credentials(tmp_path, OURS, role)) as server:
        for stranger, code in STRANGERS:
            async with stranger(address(server), role) as channel:
                assert (await get_status(channel, role))[0] == code, stranger.__name__
        async with open_channel(address(server), role=role, tls=operator) as channel:
            assert await get_status(channel, role) == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize(
    ("role", "caller"), [("learner", "verifier"), ("rollout", "client"), ("verifier", "rollout")]
)
async def test_a_wrong_role_reads_what_it_would_need(
    role: str, caller: str, tmp_path: Path
) -> None:
    own = credentials(tmp_path, OURS, caller)
    async with (
        serving(role, credentials(tmp_path, OURS, role)) as server,
        open_channel(address(server), role=role, tls=own) as channel,
    ):
        code, words = await get_status(channel, role)
    assert code == grpc.StatusCode.PERMISSION_DENIED
    assert words == (
        f"/{SERVICES[role].full_name}/GetStatus: for learner, operator;"
        f" the caller's role is {caller}"
    )


@pytest.mark.parametrize("role", SERVICES)
async def test_a_server_of_another_role_or_authority_is_not_called(
    role: str, tmp_path: Path
) -> None:
    operator = credentials(tmp_path, OURS, "operator")
    other = "verifier" if role == "rollout" else "rollout"
    impostors = [
        credentials(tmp_path / "role", OURS, other),
        # It trusts our authority, so that it is the caller who refuses.
        Credentials(write_credentials(tmp_path / "issuer", leaf(THEIRS, role), THEIRS, OURS)),
    ]
    for impostor in impostors:
        async with (
            serving(role, impostor) as server,
            open_channel(address(server), role=role, tls=operator) as channel,
        ):
            code, words = await get_status(channel, role)
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "Hostname Verification" in words or "CERTIFICATE_VERIFY_FAILED" in words


async def test_without_credentials_a_server_speaks_plain_text(tmp_path: Path) -> None:
    async with (
        serving("verifier", None) as server,
        open_channel(address(server)) as channel,
    ):
        assert (await get_status(channel, "verifier"))[0] == grpc.StatusCode.OK
