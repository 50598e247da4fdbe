"""A channel that outlives its certificate: opened anew when the credentials' folder has changed.

gRPC's own channels show, at every reconnection, the certificate that they were made with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from shared.tls import Credentials, Material

RETIREMENT_SECONDS = 3600.0
"""For calls that were under way on a channel when the next one was opened; each has a deadline of
its own, this one is for what forgot it."""


class RenewingChannel(grpc.aio.Channel):
    """Stubs made on it stay good: each call goes through the channel of the present certificate.

    Args:
        open: a channel with the certificate that it is given.
    """

    def __init__(
        self, credentials: Credentials, open: Callable[[Material], grpc.aio.Channel]
    ) -> None:
        self._credentials = credentials
        self._open = open
        self._material = credentials.current()
        self._channel = open(self._material)
        self._is_closed = False
        self._retiring: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    @property
    def present(self) -> grpc.aio.Channel:
        """That of the certificate which the folder holds now."""
        material = self._credentials.current()
        if material is not self._material and not self._is_closed:
            old, self._channel, self._material = self._channel, self._open(material), material
            self._retiring[old] = asyncio.create_task(self._retire(old))
        return self._channel

    async def close(self, grace: float | None = None) -> None:
        """End this channel, and the calls of those before it."""
        self._is_closed = True
        retiring, self._retiring = self._retiring, {}
        for task in retiring.values():
            task.cancel()
        await asyncio.gather(*retiring.values(), return_exceptions=True)
        for channel in (self._channel, *retiring):
            await channel.close(grace)

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.present.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.present.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.present.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_stream", args, kwargs)

    def _method(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def call(*request: Any, **options: Any) -> Any:
            return getattr(self.present, kind)(*args, **kwargs)(*request, **options)

        return call

    async def _retire(self, channel: grpc.aio.Channel) -> None:
        await channel.close(RETIREMENT_SECONDS)
        del self._retiring[channel]
