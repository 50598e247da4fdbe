"""The embedded Redis, for real."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from shared.errors import StartError
from shared.redis_server import embedded_redis, prepare_redis, until_redis_answers

pytestmark = pytest.mark.integration


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "data") as url, redis.Redis.from_url(url) as client:
        for number in range(100):
            client.xadd("stream", {"d": str(number)})
        client.xgroup_create("stream", "group", id="0")
        client.xreadgroup("group", "me", {"stream": ">"}, count=7)
    with embedded_redis(tmp_path / "data") as url, redis.Redis.from_url(url) as client:
        assert client.xlen("stream") == 100
        assert client.xpending("stream", "group")["pending"] == 7


def test_a_full_server_refuses_instead_of_evicting(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "data") as url, redis.Redis.from_url(url) as client:
        found = client.config_get("maxmemory-policy", "append*", "save", "port")
        assert found["maxmemory-policy"] == "noeviction"
        assert (found["appendonly"], found["appendfsync"]) == ("yes", "everysec")
        assert (found["save"], found["port"]) == ("", "0")


def test_only_this_user_can_reach_the_server_and_its_socket_goes_with_it(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "data") as url:
        folder = Path(urlsplit(url).path).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert not folder.exists()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url).ping()


def test_a_long_temporary_path_still_gives_a_short_socket_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    server = prepare_redis(tmp_path / "data")
    server.remove_socket_folder()
    assert len(urlsplit(server.url).path) < 104
    assert list(long.iterdir()) == []


async def test_a_server_that_does_not_answer_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"did not answer within 0 s .*set REDIS_URL"):
        await until_redis_answers(f"unix://{tmp_path}/nobody.sock", timeout_seconds=0.2)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="file/redis: cannot hold Redis' data"):
        prepare_redis(tmp_path / "file" / "redis")
