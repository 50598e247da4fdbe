"""A service whose event loop hangs when it is told to: SIGUSR1, and `hang_seconds` as argument.

It serves gRPC and the metrics port as the services do, and prints both ports.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

from prometheus_client import make_wsgi_app

from shared.metrics_server import MetricsServer
from shared.rpc import serve

HEALTH_SECONDS = 0.5


async def main() -> None:
    """Until it is ended."""
    loop, hang_seconds = asyncio.get_running_loop(), float(sys.argv[1])
    loop.add_signal_handler(signal.SIGUSR1, time.sleep, hang_seconds)
    metrics = MetricsServer("127.0.0.1", 0, metrics=make_wsgi_app(), health_seconds=HEALTH_SECONDS)
    async with serve(
        host="127.0.0.1", port=0, port_key="port", services=["x"], add=lambda server: None
    ) as server:
        metrics.answer_health(server.is_healthy)
        await server.set_serving(True)
        print(metrics.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
