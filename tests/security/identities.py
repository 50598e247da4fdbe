"""Certificates of roles, as cert-manager issues them by the component `mtls`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.roles import METRICS_NAME, ROLES, role_uri, server_name
from shared.tls import Credentials
from tests.certificates import Authority, Leaf, write_credentials

TOKEN = "of these metrics"


def leaf(authority: Authority, role: str, **validity: Any) -> Leaf:
    """What a process of this role shows."""
    return authority.issue(
        role, dns=[server_name(role), METRICS_NAME], uris=[role_uri(role)], **validity
    )


def credentials(folder: Path, authority: Authority, role: str, **validity: Any) -> Credentials:
    """Of a process of this role, in a folder of its own."""
    write_credentials(folder / role, leaf(authority, role, **validity), authority)
    return Credentials(folder / role)


def secure_machine(folder: Path) -> dict[str, str]:
    """Credentials for every role and a token for metrics, under `folder`; the variables by which
    all processes of one machine are told of them."""
    tls, token = folder / "tls", folder / "metrics-token"
    if not tls.exists():
        authority = Authority()
        for role in ROLES:
            credentials(tls, authority, role)
        token.write_text(TOKEN)
    return {"ISENTROPE_TLS": str(tls), "ISENTROPE_METRICS_TOKEN_FILE": str(token)}
