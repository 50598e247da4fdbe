"""Bytes that claim to be a message: any field at its edges, damaged, oversized, and not a message.

Everything is drawn from one `random.Random`, so a case is told by its seed and number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

UINT_EDGES = (0, 1, 2, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
INT_EDGES = (*UINT_EDGES, -1, -(2**31), 2**63 - 1, -(2**63))
FLOAT_EDGES = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"))
TEXT_EDGES = (
    "", "\0", "x", "../../etc/passwd", "/dev/zero", "%s%n{}", "float32", "bfloat16", "quint8",
    "nn", "gloo", "nccl", "rollouts", "countdown", "٣" * 9, "\u202e\U0001f9e8", "a" * 70_000,
)  # fmt: skip
BYTES_EDGES = (b"", b"\0", b"\xff" * 4, b"\0" * 3, b"\x01\0\0\0" * 3, b"\xff\x7f" * 40_000)

_EDGES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_DOUBLE: FLOAT_EDGES,
    FieldDescriptor.TYPE_FLOAT: FLOAT_EDGES,
    FieldDescriptor.TYPE_INT32: (0, 1, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_INT64: INT_EDGES,
    FieldDescriptor.TYPE_UINT64: (*UINT_EDGES, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (*UINT_EDGES, 2**64 - 1),
    FieldDescriptor.TYPE_UINT32: UINT_EDGES,
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 3, 99, -1),
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_STRING: TEXT_EDGES,
    FieldDescriptor.TYPE_BYTES: BYTES_EDGES,
}
_MAX_DEPTH = 4


def payload(draw: random.Random, message_type: type[Message], seeds: list[bytes]) -> bytes:
    """One case: mostly made of one of the seeds, which are good."""
    make = draw.choice(_MAKERS)
    return make(draw, message_type, draw.choice(seeds))


def edged(draw: random.Random, message: Message, *, depth: int = 0) -> None:
    """Put an edge into some fields, in place; nested messages included."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.5:
            _set_edge(draw, message, field, depth)


def _set_edge(draw: random.Random, message: Message, field: Any, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.message_type.GetOptions().map_entry or depth == _MAX_DEPTH:
            return
        if not field.is_repeated:
            edged(draw, getattr(message, field.name), depth=depth + 1)
            return
        repeated = getattr(message, field.name)
        for _ in range(draw.choice((1, 2, 40))):
            edged(draw, repeated.add(), depth=depth + 1)
        for each in list(repeated)[:2] * draw.randrange(2):  # the same once more: duplicate names
            repeated.add().CopyFrom(each)
        return
    value = draw.choice(_EDGES[field.type])
    if field.is_repeated:
        getattr(message, field.name).extend(
            [draw.choice(_EDGES[field.type]) for _ in range(draw.choice((1, 3)))]
        )
    else:
        setattr(message, field.name, value)


def _of_edges(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    message = message_type.FromString(seed)
    edged(draw, message)
    return message.SerializeToString()


def _of_one_edge(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    """All good but one field: this is what comes past the first check."""
    message = message_type.FromString(seed)
    parent: Any = message
    for _ in range(_MAX_DEPTH):
        fields = parent.DESCRIPTOR.fields
        if not fields:
            return seed
        field = draw.choice(fields)
        inner = getattr(parent, field.name)
        is_message = field.type == FieldDescriptor.TYPE_MESSAGE
        if not is_message or draw.random() < 0.2:
            _set_edge(draw, parent, field, _MAX_DEPTH - 1)
            break
        if field.is_repeated and not (hasattr(inner, "add") and len(inner)):
            break
        parent = draw.choice(inner) if field.is_repeated else inner
    return message.SerializeToString()


def _cut(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    return seed[: draw.randrange(len(seed) + 1)]


def _damaged(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    damaged = bytearray(seed)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(damaged) + 1)
        damaged[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(6))
    return bytes(damaged)


def _noise(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    return draw.randbytes(draw.choice((1, 7, 300, 70_000)))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _with_unknown_fields(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    """Fields that nobody knows: many, long, and nested as deep as there are bytes."""
    number = draw.choice((1, 15, 1000, 2**29 - 1))
    unknown = draw.choice((_nested_groups, _nested_messages, _many_varints))
    return seed + unknown(number, draw.choice((3, 99, 101, 5000)))


def _nested_groups(number: int, depth: int) -> bytes:
    return _varint(number << 3 | 3) * depth + _varint(number << 3 | 4) * depth


def _nested_messages(number: int, depth: int) -> bytes:
    inner = b""
    for _ in range(min(depth, 200)):
        inner = _varint(number << 3 | 2) + _varint(len(inner)) + inner
    return inner


def _many_varints(number: int, count: int) -> bytes:
    return (_varint(number << 3) + _varint(2**64 - 1)) * count


def _lying_length(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    """A field that claims more bytes than there are."""
    fields: Any = message_type.DESCRIPTOR.fields
    number = draw.choice(fields).number if fields else 1
    length = _varint(draw.choice((1, 2**31 - 1, 2**32 - 1, 2**63 - 1)))
    return seed + _varint(number << 3 | 2) + length


def _not_utf8(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    """The first text of the message, if it has one, is none."""
    return seed + _not_utf8_field(message_type.DESCRIPTOR)


def _not_utf8_field(descriptor: Any) -> bytes:
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            text = b"\xc3\x28\xed\xa0\x80"
            return _varint(field.number << 3 | 2) + _varint(len(text)) + text
    return b"\x0a\x02\xc3\x28"


def _empty_items(draw: random.Random, message_type: type[Message], seed: bytes) -> bytes:
    """The most objects for the fewest bytes: thousands of empty messages."""
    fields: Any = message_type.DESCRIPTOR.fields
    repeated = [
        field.number
        for field in fields
        if field.is_repeated and field.type == FieldDescriptor.TYPE_MESSAGE
    ]
    number = draw.choice(repeated) if repeated else 1
    return seed + (_varint(number << 3 | 2) + b"\0") * 20_000


_Maker = Callable[[random.Random, type[Message], bytes], bytes]
_MAKERS: tuple[_Maker, ...] = (
    _of_edges, _of_edges, _of_one_edge, _of_one_edge, _of_one_edge, _cut, _damaged, _damaged,
    _noise, _with_unknown_fields, _lying_length, _not_utf8, _empty_items,
)  # fmt: skip
