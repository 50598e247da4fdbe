"""Everything that turns bytes of a stream, of Redis or of a file into something of ours.

Each has good bytes to make bad ones of, and the one error that it may raise.
"""

from __future__ import annotations

import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from protos import dead_letter_pb2, lease_pb2, trajectory_pb2
from services.cli.measurements import read_rows
from services.learner.checkpoint import newest_checkpoint, write_checkpoint
from services.learner.journal import Journal
from services.learner.labels import label_of, read_label
from shared import lease
from shared.codec import (
    decode_completion,
    decode_prompt_group,
    decode_rollout_group,
    decode_scored_group,
    encode_completion,
    encode_prompt_group,
    encode_rollout_group,
    encode_scored_group,
)
from shared.dead_letters import DeadLetter, decode_dead_letter, encode_dead_letter
from shared.errors import CheckpointError, StreamError
from shared.partials import Piece, decode_pieces, encode_pieces
from tests.factories import make_completion, make_scored
from tests.fuzz.payloads import payload

LARGEST_GROWTH = 100
"""Bytes of memory for a byte received, at worst; `shared.codec` says some 40."""

FIXED_GROWTH = 4 << 20


@dataclass(frozen=True)
class Decoder:
    """A way in.

    Attributes:
        read: raises nothing but `error`.
        seeds: what it takes.
        message: that the bytes are one of; None if they are JSON, or text.
    """

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    error: type[Exception]
    message: type[Message] | None


def decoders(folder: Path) -> dict[str, Decoder]:
    """All of them; files are written under `folder`."""
    group = make_scored(7, epoch=2, attempt=1, versions=(3, 4))
    rollout, prompt = group.rollout, group.rollout.prompt
    letter = DeadLetter("scored", "why", 3, encode_scored_group(group), 1.5)
    pieces = encode_pieces([Piece(0, 0, make_completion()), Piece(0, 3, make_completion())])
    member = lease.Member("rollout", "rollout-0", "host:1", "host:2", "token")
    return {
        "prompts": Decoder(
            decode_prompt_group,
            (encode_prompt_group(prompt),),
            StreamError,
            trajectory_pb2.PromptGroup,
        ),
        "rollouts": Decoder(
            decode_rollout_group,
            (encode_rollout_group(rollout),),
            StreamError,
            trajectory_pb2.RolloutGroup,
        ),
        "scored": Decoder(
            decode_scored_group,
            (encode_scored_group(group),),
            StreamError,
            trajectory_pb2.ScoredGroup,
        ),
        "dead letter": Decoder(
            decode_dead_letter,
            (encode_dead_letter(letter),),
            StreamError,
            dead_letter_pb2.DeadLetter,
        ),
        "lease": Decoder(lease._decode, (lease._encode(member),), StreamError, lease_pb2.Lease),
        "completion": Decoder(
            decode_completion,
            (encode_completion(make_completion()),),
            StreamError,
            trajectory_pb2.Completion,
        ),
        "piece": Decoder(
            lambda data: decode_pieces({**pieces, b"0/6": data}),
            (encode_completion(make_completion()),),
            StreamError,
            trajectory_pb2.Completion,
        ),
        "place of a piece": Decoder(
            lambda data: decode_pieces({data: pieces[b"0/0"]}),
            (b"0/0", b"1/12", b"4294967295/3"),
            StreamError,
            None,
        ),
        "label": Decoder(
            lambda data: read_label(data.decode(errors="replace"), run_id="run"),
            (label_of(prompt).encode(),),
            ValueError,
            None,
        ),
        "checkpoint manifest": _checkpoint(folder / "manifest", "manifest.json"),
        "checkpoint state": _checkpoint(folder / "state", "state.json"),
        "journal": _journal(folder / "journal.jsonl"),
    }


def _checkpoint(root: Path, name: str) -> Decoder:
    """A whole checkpoint one of whose files is replaced, and listed as it then is."""
    written = write_checkpoint(root, step=3, state={"metrics": {}}, save_engine=_save_engine)
    manifest = written / "manifest.json"
    listed = json.loads(manifest.read_text())
    seed = (written / name).read_bytes()

    def read(data: bytes) -> Any:
        (written / name).write_bytes(data)
        if name != "manifest.json":
            manifest.write_text(json.dumps({**listed, name: (len(data), zlib.crc32(data))}))
        return newest_checkpoint(root)

    outside = {"../../../etc/passwd": [0, 0], "/dev/zero": [2**62, 0], ".": [1, 1], "": [0, 0]}
    seeds = (seed, json.dumps(outside).encode(), b'{"step": 1e999}', b"[" * 100_000)
    return Decoder(read, seeds, CheckpointError, None)


def _save_engine(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")


def _journal(path: Path) -> Decoder:
    journal = Journal(path)
    journal.write({"step": 1, "reward": 0.5, "trained": [[0, 1, 0]]})
    journal.close()
    seed = path.read_bytes()

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        rows = read_rows(path)
        path.unlink()
        return rows

    return Decoder(read, (seed, seed * 3, b"[" * 100_000 + b"\n", b'{"step": 1'), OSError, None)


def attack_drawn(decoder: Decoder, draw: random.Random) -> None:
    """One case: a value, or the decoder's own error."""
    if decoder.message is not None:
        data = payload(draw, decoder.message, list(decoder.seeds))
    else:
        data = _damaged_text(draw, draw.choice(decoder.seeds))
    attack(decoder, data)


def attack(decoder: Decoder, data: bytes) -> None:
    """Decode; AssertionError if memory was taken for what was only announced."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with suppress(decoder.error):
        decoder.read(data)
    grown = tracemalloc.get_traced_memory()[1] - before
    assert grown <= FIXED_GROWTH + LARGEST_GROWTH * len(data), (
        f"{grown} bytes of memory for {len(data)} received: {data[:100]!r}"
    )


_WORDS = (
    b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"', b"\xff", b"9" * 5000, b"[" * 3000,
    b"/", b"\n", b"\0", b'"../../x"', b"1.5", b"true", "٣".encode(),
)  # fmt: skip


def _damaged_text(draw: random.Random, seed: bytes) -> bytes:
    damaged = bytearray(seed)
    for _ in range(draw.randrange(4)):
        place = draw.randrange(len(damaged) + 1)
        damaged[place : place + draw.randrange(4)] = draw.choice(_WORDS)
    return bytes(damaged[: draw.randrange(len(damaged) + 1)] if draw.random() < 0.2 else damaged)
