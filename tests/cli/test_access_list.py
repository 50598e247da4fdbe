"""`isentrope redis-users`: the access list and the passwords behind it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from services.cli.__main__ import main
from shared.redis_users import USERS, access_list

RUN = "demo-1"


def test_passwords_and_the_access_list_are_made_once_and_changed_in_two_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "users"
    command = ["redis-users", str(folder), "--run-id", RUN]
    assert main(command) == 0
    assert {each.name for each in folder.iterdir()} == {*USERS, "users.acl"}
    assert {stat.S_IMODE((folder / user).stat().st_mode) for user in USERS} == {0o600}
    before = {user: (folder / user).read_text() for user in USERS}
    assert len(set(before.values())) == len(USERS)
    (folder / "rollout").rename(folder / "rollout.previous")
    assert main(command) == 0
    new = (folder / "rollout").read_text()
    wanted = {user: [word] for user, word in before.items()} | {"rollout": [new, before["rollout"]]}
    text = (folder / "users.acl").read_text()
    assert sorted(text.splitlines()) == sorted(access_list(wanted, run_id=RUN).splitlines())
    assert not any(word in text + capsys.readouterr().out for word in [*before.values(), new])
    (folder / "monitor").write_text("short\n")
    assert main(command) == 2
    assert "monitor: must hold 16 to 512 letters" in capsys.readouterr().err
