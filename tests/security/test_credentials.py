"""A folder that would fail its first peer is refused at the start, with the file and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from shared.config import Environment
from shared.errors import StartError
from shared.roles import ROLES
from shared.tls import Credentials
from tests.certificates import Authority, write_credentials
from tests.security.identities import leaf

OURS, THEIRS = Authority("ours"), Authority("theirs")
HOUR = timedelta(hours=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "tls", leaf(OURS, "learner"), OURS)


def test_a_healthy_folder_is_taken_and_says_whose_it_is(folder: Path) -> None:
    assert Credentials.of_role(folder, "learner").current().roles == ["learner"]


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_a_file_that_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StartError, match=f"{name}: No such file.*ISENTROPE_TLS names a folder"):
        Credentials(folder)


def encrypt(folder: Path) -> None:
    key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
    (folder / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


BREAKS: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "another certificate's key",
        lambda f: (f / "tls.key").write_bytes(leaf(OURS, "learner").key),
        "tls.crt, .*tls.key: not a certificate and its key.*issue them together",
    ),
    ("a key that asks for a password", encrypt, "without a password"),
    (
        "no PEM at all",
        lambda f: (f / "tls.crt").write_text("certificate"),
        "tls.crt, .*not a certificate",
    ),
    (
        "authorities that are none",
        lambda f: (f / "ca.crt").write_text(""),
        "ca.crt: no certificates in PEM",
    ),
    (
        "expired",
        lambda f: write_credentials(
            f, leaf(OURS, "learner", valid_from=-2 * HOUR, valid_until=-HOUR), OURS
        ),
        "tls.crt: a peer that trusts .*ca.crt refuses it .certificate has expired",
    ),
    (
        "not valid yet",
        lambda f: write_credentials(
            f, leaf(OURS, "learner", valid_from=HOUR, valid_until=2 * HOUR), OURS
        ),
        "not yet valid",
    ),
    (
        "of an authority that is not trusted",
        lambda f: write_credentials(f, leaf(THEIRS, "learner"), OURS),
        "tls.crt: a peer that trusts .*ca.crt refuses it .*by an authority in that file",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_files_that_do_not_hold_together(
    folder: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(folder)
    with pytest.raises(StartError, match=words):
        Credentials(folder)


def test_a_certificate_of_another_role(folder: Path) -> None:
    with pytest.raises(StartError, match="is not for a rollout; issue it with URI spiffe://isen"):
        Credentials.of_role(folder, "rollout")


def test_a_service_also_needs_the_name_that_its_callers_ask_for(tmp_path: Path) -> None:
    nameless = OURS.issue("learner", uris=["spiffe://isentrope/learner"])
    write_credentials(tmp_path, nameless, OURS)
    with pytest.raises(StartError, match=r"issue it with DNS learner\.isentrope among its alter"):
        Credentials.of_role(tmp_path, "learner")


def test_one_folder_may_hold_a_subfolder_for_each_role(tmp_path: Path) -> None:
    for role in ROLES:
        write_credentials(tmp_path / role, leaf(OURS, role), OURS)
    for role in ROLES:
        assert Credentials.of_role(tmp_path, role).current().roles == [role]


def test_a_chain_and_several_authorities_are_taken(tmp_path: Path) -> None:
    write_credentials(tmp_path, leaf(OURS, "learner"), THEIRS, OURS)
    assert Credentials(tmp_path).current().roles == ["learner"]


def test_the_environment_says_where_it_is() -> None:
    given = Environment.read({"ISENTROPE_TLS": "/tls", "ISENTROPE_METRICS_TOKEN_FILE": "/t"})
    assert (given.tls_folder, given.metrics_token_file) == (Path("/tls"), Path("/t"))
    for variables in ({}, {"ISENTROPE_TLS": "", "ISENTROPE_METRICS_TOKEN_FILE": ""}):
        given = Environment.read(variables)
        assert (given.tls_folder, given.metrics_token_file) == (None, None)
