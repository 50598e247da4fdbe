"""A version's bytes go to rollout replicas, and come from the learner, by certificate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from shared.buckets import ParameterSpec
from shared.errors import BroadcastError
from shared.weight_stream import WeightSource, fetch_weights
from tests.certificates import Authority
from tests.security.identities import credentials
from tests.security.services import CALL_SECONDS, CHUNKS, address, serving

OURS = Authority("ours")
MANIFEST = (ParameterSpec("weight", "float32", (len(b"".join(CHUNKS)) // 4,)),)


async def fetch(source: WeightSource) -> bytes:
    received = await asyncio.to_thread(fetch_weights, source, MANIFEST, bucket_bytes=1 << 12)
    return received.tensors["weight"].numpy().tobytes()


async def test_a_replica_gets_them_and_others_do_not(tmp_path: Path) -> None:
    for role in ("rollout", "verifier"):
        credentials(tmp_path, OURS, role)
    async with serving("learner", credentials(tmp_path, OURS, "learner")) as server:
        source = WeightSource(address(server), "t", CALL_SECONDS, str(tmp_path / "rollout"))
        assert await fetch(source) == b"".join(CHUNKS)
        with pytest.raises(BroadcastError, match=r"PERMISSION_DENIED.*for rollout"):
            await fetch(replace(source, tls_folder=str(tmp_path / "verifier")))
        with pytest.raises(BroadcastError, match="UNAVAILABLE"):
            await fetch(replace(source, tls_folder=None))
        with pytest.raises(BroadcastError, match=r"tls\.crt: No such file"):
            await fetch(replace(source, tls_folder=str(tmp_path)))


async def test_they_are_not_taken_from_who_is_not_the_learner(tmp_path: Path) -> None:
    credentials(tmp_path, OURS, "rollout")
    async with serving("learner", credentials(tmp_path, OURS, "verifier")) as server:
        source = WeightSource(address(server), "t", CALL_SECONDS, str(tmp_path / "rollout"))
        with pytest.raises(BroadcastError, match=r"UNAVAILABLE.*Hostname Verification"):
            await fetch(source)
