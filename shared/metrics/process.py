"""What every service exports of itself, and the port where it does."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram, Info, make_wsgi_app

from shared.errors import StartError
from shared.metrics_server import MetricsServer
from shared.tls import Credentials

BUILD = Info("isentrope_build", "Version of the code.")
RUN = Info("isentrope_run", "What this process is part of.")
RPC_HANDLED = Counter("isentrope_grpc_server_handled_total", "Calls answered.", ["method", "code"])
RPC_SECONDS = Histogram(
    "isentrope_grpc_server_handling_seconds", "Time to answer a call.", ["method"]
)
SERVICE_STALLED = Gauge(
    "isentrope_service_stalled",
    "1 if this process makes no progress in work of its own, else 0.",
    ["service"],
)
CERTIFICATE_EXPIRY = Gauge(
    "isentrope_certificate_expiry_timestamp_seconds",
    "When a certificate in use expires: this process' own, the last of the authorities it trusts.",
    ["certificate"],
)


def describe_process(*, run_id: str, model: str, algorithm: str) -> None:
    """Say once, for all series of this process, which run they belong to."""
    BUILD.info({"version": version("isentrope")})
    RUN.info({"run": run_id, "model": model, "algorithm": algorithm})


def serve_metrics(
    *, host: str, port: int, tls: Credentials | None = None, token_file: Path | None = None
) -> MetricsServer:
    """Serve `/metrics`, and the health that it is told to; see `shared.metrics_server`.

    Raises:
        StartError: the port is taken, or there is no token in the file.
    """
    if tls is not None:
        _show_expiry(tls)
    try:
        return MetricsServer(host, port, metrics=make_wsgi_app(), tls=tls, token_file=token_file)
    except OSError:
        raise StartError(
            f"network.metrics_port = {port}: taken on {host}; free it, or use 0 for any free port"
        ) from None


def _show_expiry(tls: Credentials) -> None:
    """Read at each scrape, so that it is of what the next connection will be shown."""
    CERTIFICATE_EXPIRY.labels(certificate="own").set_function(lambda: tls.current().expiry)
    CERTIFICATE_EXPIRY.labels(certificate="authority").set_function(
        lambda: tls.current().authorities_expiry
    )
