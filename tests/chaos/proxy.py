"""A TCP proxy that makes a link as bad as a network can: slow, silent, cut, or losing replies.

It stands between a client and `upstream`, which is `host:port` or the path of a unix socket. What
is held back while the link stalls is delivered when it flows again, as TCP does. A connection that
lost a reply is cut before the link is whole again: no network leaves a hole in a byte stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

_CHUNK_BYTES = 2**16


class Proxy:
    """One link; `async with` listens, and leaves no connection behind.

    Attributes:
        num_connections: accepted so far.
        num_lost_bytes: of replies that were swallowed.
    """

    def __init__(self, upstream: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.num_connections = 0
        self.num_lost_bytes = 0
        self._upstream = upstream
        self._host = host
        self._port = port
        self._delay_seconds = 0.0
        self._loses_replies = False
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._flows.set()
        self.cut()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """`host:port` that clients connect to."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    def lead_to(self, upstream: str) -> None:
        """Another place from now on; who is connected to the old one is cut off."""
        self._upstream = upstream
        self.cut()

    @asynccontextmanager
    async def delayed(self, seconds: float) -> AsyncIterator[None]:
        """Hold each chunk back this long, both ways."""
        self._delay_seconds = seconds
        try:
            yield
        finally:
            self._delay_seconds = 0.0

    @asynccontextmanager
    async def stalled(self) -> AsyncIterator[None]:
        """Accept connections and bytes, and deliver none."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @asynccontextmanager
    async def losing_replies(self) -> AsyncIterator[None]:
        """Deliver requests and swallow what is answered."""
        self._loses_replies = True
        try:
            yield
        finally:
            self.cut()
            self._loses_replies = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        try:
            await self._flows.wait()
            with suppress(OSError):
                await self._join(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes both ways until either end closes."""
        far_reader, far_writer = await self._connect()
        self._writers.add(far_writer)
        ways = [
            asyncio.create_task(self._carry(reader, far_writer, is_reply=False)),
            asyncio.create_task(self._carry(far_reader, writer, is_reply=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers.discard(far_writer)
            far_writer.transport.abort()
            for way in ways:
                way.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream.startswith("/"):
            return await asyncio.open_unix_connection(self._upstream)
        host, _, port = self._upstream.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                await asyncio.sleep(self._delay_seconds)
                await self._flows.wait()
                if is_reply and self._loses_replies:
                    self.num_lost_bytes += len(chunk)
                    continue
                writer.write(chunk)
                await writer.drain()
