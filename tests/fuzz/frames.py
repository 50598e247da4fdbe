"""HTTP/2 by hand: calls whose bytes stop, lie about their length, or are no HTTP/2 at all."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _CONTINUATION = 0, 1, 4, 9
_END_STREAM, _END_HEADERS = 1, 4

ANSWER_SECONDS = 0.05
"""How long the connection stays open after what was sent."""


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    head = len(body).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + body


def _headers(method: str) -> bytes:
    fields = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    # Literals without indexing: each name and value with its length before it.
    return b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field)
        for field in fields.items()
    )


def _message(length: int, body: bytes) -> bytes:
    return b"\0" + length.to_bytes(4, "big") + body


def truncated_call(draw: random.Random, method: str, request: bytes) -> bytes:
    """What a peer sends that breaks off, or announces other lengths than it has."""
    head = _PREFACE + _frame(_SETTINGS, 0, 0, b"")
    headers = _frame(_HEADERS, _END_HEADERS, 1, _headers(method))
    announced = draw.choice((len(request), len(request) + 1, 2**26 - 1, 2**26 + 1, 2**32 - 1))
    data = _message(announced, request)
    flags = draw.choice((0, _END_STREAM))
    whole = draw.choice(
        (
            head + headers + _frame(_DATA, flags, 1, data),
            head + headers + _frame(_DATA, flags, 1, data[: draw.randrange(len(data) + 1)]),
            head + headers + _frame(_DATA, flags, 3, data),
            head + _frame(_HEADERS, 0, 1, _headers(method)) + _frame(_DATA, 0, 1, data),
            head + _frame(_HEADERS, _END_HEADERS, 1, draw.randbytes(40)),
            head + (2**24 - 1).to_bytes(3, "big") + bytes([_DATA, 0, 0, 0, 0, 1]),
            head + headers + _frame(_CONTINUATION, 0, 1, b"\0" * 100),
            head + draw.randbytes(200),
            draw.randbytes(200),
            b"GET / HTTP/1.1\r\n\r\n",
        )
    )
    return whole[: draw.randrange(len(whole) + 1)] if draw.random() < 0.3 else whole


async def send(address: str, data: bytes) -> None:
    """Send, wait a moment for whatever comes, and hang up."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with suppress(ConnectionError, TimeoutError):
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(ANSWER_SECONDS):
                while await reader.read(1 << 16):
                    pass
    finally:
        writer.transport.abort()
