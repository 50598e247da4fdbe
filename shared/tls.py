"""The certificate that a process shows, and the authorities that it trusts: a folder's, always.

The folder holds `tls.crt`, `tls.key` and `ca.crt`, as cert-manager writes them and Kubernetes
mounts them. What changes there is used for the next connection, without a restart: a new pair, and
a new authority, which stands in `ca.crt` beside the old one while both are in use. What does not
hold together is refused at the start, and later left alone in favour of what was read before.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from shared.errors import StartError
from shared.roles import SERVING, role_of, role_uri, server_name

logger = logging.getLogger(__name__)

_MAX_TURNS = 16
"""Of each end of a handshake; three do. Nothing waits in memory, so that turns are its deadline."""

CERTIFICATE, KEY, AUTHORITIES = _FILES = ("tls.crt", "tls.key", "ca.crt")


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """One state of the folder, found to hold together.

    Attributes:
        https: for servers that ask no certificate of their peers.
        names: pairs of kind and name, as `("DNS", "learner.isentrope")`.
        expiry: of the certificate, seconds since 1970.
        authorities_expiry: of that authority among those trusted which stays good longest.
    """

    certificate: bytes
    key: bytes
    authorities: bytes
    https: ssl.SSLContext
    names: Sequence[tuple[str, str]]
    expiry: float
    authorities_expiry: float

    @property
    def roles(self) -> list[str]:
        """Those of ours that the certificate names."""
        named = [role_of(name) for kind, name in self.names if kind == "URI"]
        return [role for role in named if role is not None]

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is opened now."""
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """For connections that a server takes from now on."""
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.certificate)], self.authorities
        )


class Credentials:
    """The present state of a folder; follows its changes.

    Args:
        folder: with the three files.
    Raises:
        StartError: a file is missing, or they do not hold together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._seen = _marks(folder)
        self._material = read_material(folder)

    @classmethod
    def find(cls, folder: Path, role: str) -> Credentials:
        """Those in the subfolder of the role's name, where one folder serves a whole machine; else
        those in `folder`.

        Raises:
            StartError: as above.
        """
        own = folder / role
        return cls((own if own.is_dir() else folder).absolute())

    @classmethod
    def of_role(cls, folder: Path, role: str) -> Credentials:
        """Those of a process of this role.

        Raises:
            StartError: as above, or the certificate is another role's.
        """
        credentials = cls.find(folder, role)
        material = credentials.current()
        wanted = [("URI", role_uri(role))]
        if role in SERVING:
            wanted.append(("DNS", server_name(role)))
        missing = [f"{kind} {name}" for kind, name in wanted if (kind, name) not in material.names]
        if missing:
            raise StartError(
                f"{credentials.folder / CERTIFICATE}: is not for a {role}; issue it with"
                f" {' and '.join(missing)} among its alternative names"
            )
        return credentials

    def current(self) -> Material:
        """What the folder holds, as far as it holds together; never raises."""
        with self._lock:
            marks = _marks(self.folder)
            if marks != self._seen:
                # Remembered also where it is refused: said once, until the files change again.
                self._seen = marks
                self._reload()
            return self._material

    def _reload(self) -> None:
        try:
            self._material = read_material(self.folder)
        except StartError as error:
            logger.warning("the certificate in use stays, good until %s: %s", self._until, error)
        else:
            logger.info("took the new certificate in %s, good until %s", self.folder, self._until)

    @property
    def _until(self) -> str:
        return datetime.fromtimestamp(self._material.expiry, UTC).isoformat()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that asks every peer for a certificate; follows the folder."""
        given = self.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            now = self.current()
            if now is given:
                return None
            given = now
            return now.server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            given.server_configuration(),
            changed,  # type: ignore[arg-type]  # None is "as before"; the stubs do not know
            require_client_authentication=True,
        )


def read_material(folder: Path) -> Material:
    """The folder as it is now, after a handshake of it with itself: what a peer would refuse, be it
    for its dates, its issuer, its purposes or its key, is refused here.

    Raises:
        StartError: names the file and the remedy.
    """
    certificate, key, authorities = (_read(folder / name) for name in _FILES)
    shown = _shake_hands(folder)
    trusted = _trusting(ssl.PROTOCOL_TLS_CLIENT, folder).get_ca_certs()
    return Material(
        certificate=certificate,
        key=key,
        authorities=authorities,
        https=_context(ssl.PROTOCOL_TLS_SERVER, folder),
        names=tuple(shown.get("subjectAltName", ())),
        expiry=_expiry(shown),
        # A certificate that is its own authority is none by its purposes, and is not listed.
        authorities_expiry=max(map(_expiry, trusted), default=_expiry(shown)),
    )


def _expiry(certificate: Mapping[str, Any]) -> float:
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))


def _marks(folder: Path) -> tuple[tuple[int, ...], ...]:
    """What differs when a file was written or replaced; a file that is not there has none."""
    marks: list[tuple[int, ...]] = []
    for name in _FILES:
        try:
            stat = (folder / name).stat()
        except OSError:
            marks.append(())
        else:
            marks.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(marks)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(
            f"{path}: {error.strerror}; ISENTROPE_TLS names a folder with {', '.join(_FILES)},"
            " which this process may read"
        ) from None


def _context(protocol: int, folder: Path) -> ssl.SSLContext:
    """Of this folder's pair.

    Raises:
        StartError: the key is not the certificate's.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # With a password given, an encrypted key is an error and not a question on a terminal.
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password="")
    except (OSError, ValueError) as error:
        raise StartError(
            f"{folder / CERTIFICATE}, {folder / KEY}: not a certificate and its key, both PEM and"
            f" the key without a password ({error}); issue them together"
        ) from None
    return context


def _trusting(protocol: int, folder: Path) -> ssl.SSLContext:
    """Of this folder's pair and authorities, as a peer asks for both.

    Raises:
        StartError: there are none, or no pair.
    """
    context = _context(protocol, folder)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(folder / AUTHORITIES)
    except (OSError, ValueError) as error:
        raise StartError(
            f"{folder / AUTHORITIES}: no certificates in PEM ({error}); it holds the authorities"
            " whose certificates are taken"
        ) from None
    return context


def _shake_hands(folder: Path) -> Mapping[str, Any]:
    """The certificate, as `ssl` decodes it, after both ends of a connection in memory took it.

    Raises:
        StartError: one of them did not.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _trusting(ssl.PROTOCOL_TLS_CLIENT, folder).wrap_bio(to_client, to_server)
    server = _trusting(ssl.PROTOCOL_TLS_SERVER, folder).wrap_bio(
        to_server, to_client, server_side=True
    )
    try:
        _finish([client, server])
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or getattr(error, "reason", error)
        raise StartError(
            f"{folder / CERTIFICATE}: a peer that trusts {folder / AUTHORITIES} refuses it"
            f" ({reason}); issue a certificate for server and client authentication, valid now, by"
            " an authority in that file"
        ) from None
    return client.getpeercert() or {}


def _finish(ends: Sequence[ssl.SSLObject]) -> None:
    """Let each go on in turn until all have shaken hands.

    Raises:
        SSLError: one of them refuses, or waits for more than the others have to say.
    """
    waiting = list(ends)
    for _ in range(_MAX_TURNS):
        waiting = [end for end in waiting if not _goes_on(end)]
        if not waiting:
            return
    raise ssl.SSLError("the handshake does not end")


def _goes_on(end: ssl.SSLObject) -> bool:
    """Whether it is done."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
