"""What a service is to others beside its work: its streams, metrics, traces, calls and lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import grpc

from shared import tracing
from shared.lease import Registry, Role
from shared.metrics.process import describe_process, serve_metrics
from shared.metrics_server import Ask, MetricsServer
from shared.process import ServiceArguments
from shared.redis_connection import RETRIES, Patience
from shared.redis_stream import NO_PATIENCE, Streams, open_streams
from shared.rpc import RpcServer, serve


class Presence(NamedTuple):
    """A service's calls are answered; `lease` ends, with an error, if another took its name."""

    server: RpcServer
    lease: asyncio.Task[None]


def show_metrics(given: ServiceArguments) -> MetricsServer:
    """Serve `/metrics`, with the run that this process belongs to.

    Raises:
        StartError: the port is taken, or there is no token in the file.
    """
    config = given.config
    describe_process(
        run_id=given.run_id, model=config.model_path, algorithm=config.policy_loss.loss_mode
    )
    return serve_metrics(
        host=config.network.host,
        port=config.network.metrics_port,
        tls=given.tls,
        token_file=given.environment.metrics_token_file,
    )


@asynccontextmanager
async def connected(
    given: ServiceArguments,
    role: Role,
    *,
    patience: Patience = NO_PATIENCE,
    retries: int = RETRIES,
) -> AsyncIterator[Streams]:
    """The run's streams, and traces of what is done with them.

    Raises:
        StartError: the server does not answer.
    """
    redis, environment = given.config.redis, given.environment
    async with (
        tracing.exporting(
            environment.traces_endpoint, role=role, name=given.name, run_id=given.run_id
        ),
        open_streams(
            given.redis_url,
            run_id=given.run_id,
            prompts=redis.prompt_bounds,
            groups=redis.group_bounds,
            timeout_seconds=given.config.network.call_timeout_seconds,
            patience=patience,
            retries=retries,
        ) as streams,
    ):
        yield streams


@asynccontextmanager
async def present(
    given: ServiceArguments,
    role: Role,
    *,
    name: str,
    service: str,
    port: int,
    add: Callable[[grpc.aio.Server], None],
    registry: Registry,
    metrics_address: str,
    answer_health: Callable[[Ask], None] | None = None,
) -> AsyncIterator[Presence]:
    """Answer calls and hold the lease, in this order: whoever reads the lease may call at once.

    Args:
        name: of the lease, unique in the role.
        service: its full name, as `isentrope.v1.Rollout`.
        port: `network.<role>_port`.
        add: registers its servicer.
        answer_health: is given what says how the process does, once that is known.
    Raises:
        StartError: the port is taken.
    """
    network = given.config.network
    async with (
        serve(
            host=network.host,
            port=port,
            port_key=f"network.{role}_port",
            services=[service],
            add=add,
            tls=given.tls,
        ) as server,
        registry.hold(
            role,
            name,
            address=f"{given.host}:{server.port}",
            metrics_address=metrics_address,
            seconds=network.lease_seconds,
        ) as lease,
    ):
        if answer_health is not None:
            answer_health(server.is_healthy)
        await server.set_serving(True)
        yield Presence(server, lease)
