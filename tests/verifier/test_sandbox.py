from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.verifier.sandbox import ScoringPool
from shared.config.services import TaskConfig, VerifierConfig
from shared.errors import StartError
from shared.metrics.verifier import VERIFIER_RESULTS
from shared.records import Outcome, Score
from tests.verifier.waiting import is_alive, until_dead, until_exists

HOSTILE = "tests.verifier.hostile:HostileTask"


def make_pool(*, num_workers: int = 1, load: str = "well") -> ScoringPool:
    limits = VerifierConfig(num_workers=num_workers, timeout_seconds=60.0, memory_mib=256)
    return ScoringPool(TaskConfig(name=HOSTILE, params={"load": load}), limits)


@pytest.fixture
async def pool() -> AsyncIterator[ScoringPool]:
    async with make_pool() as made:
        yield made


@contextmanager
def hasty(pool: ScoringPool, *, seconds: float = 0.5) -> Iterator[None]:
    """With so little time for what begins to be scored now, and no less for all else."""
    (slot,) = pool._all
    patient = slot._limits
    slot._limits = patient.model_copy(update={"timeout_seconds": seconds})
    try:
        yield
    finally:
        slot._limits = patient


async def pid_of(pool: ScoringPool) -> int:
    return int((await pool.score("pid", answer="")).detail)


async def assert_next_works(pool: ScoringPool) -> None:
    assert await pool.score("pass", answer="") == Score(Outcome.PASS, 1.0, "fine")


async def test_a_verdict_is_an_outcome_with_one_short_line(pool: ScoringPool) -> None:
    score = await pool.score("fail", answer="")
    assert (score.outcome, score.reward) == (Outcome.FAIL, 0.5)
    assert "\n" not in score.detail
    assert len(score.detail) <= 300
    await assert_next_works(pool)


async def test_a_scorer_sees_no_secret_of_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "REDIS_URL",
        "HF_TOKEN",
        "ISENTROPE_TLS",
        "ISENTROPE_METRICS_TOKEN_FILE",
        "AN_API_KEY",
    )
    needed = ("PATH", "PYTHONPATH", "LC_ALL", "OMP_NUM_THREADS")
    for name in {*secrets, *needed} - {"PATH"}:
        monkeypatch.setenv(name, "C" if name == "LC_ALL" else "1")
    async with make_pool() as pool:
        score = await pool.score("tell variables", answer=" ".join([*secrets, *needed]))
        assert score.detail == " ".join(needed)


def judge_without_capabilities(deed: str) -> None:
    """As in a pod, where not even root may look into other processes."""
    libc = ctypes.CDLL(None)
    libc.prctl(28, 1)  # PR_SET_SECUREBITS, SECBIT_NOROOT: what root starts has no more than root
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(version_3, none) == 0

    async def judge() -> Score:
        async with make_pool() as pool:
            return await pool.score(deed, answer="")

    print(asyncio.run(judge()).outcome)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_scorer_cannot_read_the_environment_of_the_verifier_from_outside() -> None:
    deed = judge_without_capabilities.__name__
    program = f"from {__name__} import {deed}; {deed}('read the verifier')"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.stdout == f"{Outcome.PASS}\n", ended.stderr


@pytest.mark.parametrize("deed", ["loop for ever", "loop in C", "hold the interpreter"])
async def test_a_scorer_that_never_returns_is_killed(pool: ScoringPool, deed: str) -> None:
    pid = await pid_of(pool)
    started = time.monotonic()
    with hasty(pool):
        score = await pool.score(deed, answer="")
    assert (score.outcome, score.reward) == (Outcome.TIMEOUT, 0.0)
    assert time.monotonic() - started >= 0.5
    assert score.detail == "killed after 0.5 s"
    assert not is_alive(pid)
    await assert_next_works(pool)


async def test_a_scorer_that_swallows_its_memory_errors_is_killed(pool: ScoringPool) -> None:
    with hasty(pool):
        score = await pool.score("swallow memory errors", answer="")
    assert score.outcome is Outcome.TIMEOUT
    await assert_next_works(pool)


@pytest.mark.parametrize(
    ("deed", "detail"),
    [
        ("eat memory", "out of memory (verifier.memory_mib = 256)"),
        ("exit", "SystemExit: 3"),
        ("exit at once", "the scorer ended its process with code 0"),
        ("kill", "the scorer was killed by SIGKILL"),
        ("crash", "the scorer was killed by SIGSEGV"),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
        ("raise", "RuntimeError: some reason"),
        ("close everything", ""),
        ("scribble", ""),
        ("nan", "ValueError: the scorer gave a reward of nan"),
        ("no such deed", "KeyError: 'no such deed'"),
    ],
)
async def test_a_scorer_that_fails_is_an_error_and_the_next_completion_is_scored(
    pool: ScoringPool, deed: str, detail: str
) -> None:
    score = await pool.score(deed, answer="some\nreason")
    assert (score.outcome, score.reward) == (Outcome.ERROR, 0.0)
    assert score.detail.startswith(detail)
    assert score.detail
    await assert_next_works(pool)


async def test_what_a_scorer_prints_is_not_taken_for_its_verdict(pool: ScoringPool) -> None:
    assert await pool.score("print", answer="") == Score(Outcome.FAIL, 0.25, "printed")
    await assert_next_works(pool)


async def test_a_completion_may_be_large_and_hold_any_character(pool: ScoringPool) -> None:
    for text in ("x" * 2_000_000, "\n\r\0\u2028", "\ud800", "ẞ漢\U0001f9ee"):
        assert (await pool.score(text, answer="")).detail.startswith("KeyError")
    await assert_next_works(pool)


async def test_a_process_that_was_killed_while_idle_is_replaced_unnoticed(
    pool: ScoringPool,
) -> None:
    pid = await pid_of(pool)
    os.kill(pid, signal.SIGKILL)
    process = pool._all[0]._process
    assert process is not None
    await process.wait()
    await assert_next_works(pool)


async def test_a_process_keeps_its_task_from_one_completion_to_the_next(pool: ScoringPool) -> None:
    assert await pid_of(pool) == await pid_of(pool)


async def test_waiting_for_a_process_does_not_count_as_scoring_time(
    pool: ScoringPool, tmp_path: Path
) -> None:
    limit = 2.5
    first = asyncio.create_task(pool.score("nap", answer=f"{limit + 0.3} {tmp_path / 'began'}"))
    await until_exists(tmp_path / "began")
    with hasty(pool, seconds=limit):
        second = await pool.score("pass", answer="")
    assert [each.outcome for each in (await first, second)] == [Outcome.PASS] * 2
    assert pool.num_waiting == 0


async def test_processes_score_side_by_side(tmp_path: Path) -> None:
    async with make_pool(num_workers=3) as pool:
        scores = await asyncio.gather(*(pool.score("meet", answer=f"{tmp_path}") for _ in range(3)))
        assert [score.outcome for score in scores] == [Outcome.PASS] * 3


async def test_a_cancelled_call_gives_its_process_back(pool: ScoringPool, tmp_path: Path) -> None:
    pid = await pid_of(pool)
    call = asyncio.create_task(pool.score("signal start", answer=str(tmp_path / "started")))
    await until_exists(tmp_path / "started")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not is_alive(pid)
    await assert_next_works(pool)


async def test_a_killed_scorer_takes_its_children_along(pool: ScoringPool, tmp_path: Path) -> None:
    note = tmp_path / "child"
    call = asyncio.create_task(pool.score("leave a child", answer=str(note)))
    await until_exists(note)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until_dead(int(note.read_text()))


async def test_a_closed_pool_leaves_no_process() -> None:
    async with make_pool(num_workers=3) as pool:
        busy = [
            asyncio.create_task(pool.score("nap", answer=f"1000 {os.devnull}")),
            asyncio.create_task(pool.score("loop for ever", answer="")),
        ]
        pids = [slot._process.pid for slot in pool._all if slot._process is not None]
        await asyncio.sleep(0)
    assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)
    for task in busy:
        task.cancel()
    await asyncio.wait(busy)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("badly", "RuntimeError: no licence for this"),
        ("dead", "the scorer ended its process with code 7"),
        ("hungry", "out of memory"),
    ],
)
async def test_a_task_that_cannot_be_loaded_stops_the_start(load: str, message: str) -> None:
    with pytest.raises(StartError, match=message) as caught:
        async with make_pool(num_workers=2, load=load):
            pytest.fail("started")
    assert "\n" not in str(caught.value)


async def test_outcomes_are_counted(pool: ScoringPool) -> None:
    counter = VERIFIER_RESULTS.labels(verifier=HOSTILE, result="error")
    before = counter._value.get()
    await pool.score("raise", answer="")
    assert counter._value.get() == before + 1


def test_the_scoring_processes_of_a_killed_verifier_die_with_it(tmp_path: Path) -> None:
    program = (
        "import asyncio\n"
        "from tests.verifier.test_sandbox import make_pool\n"
        "async def main():\n"
        "    async with make_pool() as pool:\n"
        "        pid = (await pool.score('pid', answer='')).detail\n"
        "        asyncio.create_task(pool.score('loop for ever', answer=''))\n"
        "        print(pid, flush=True)\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as verifier:
        assert verifier.stdout is not None
        scorer = int(verifier.stdout.readline())
        verifier.kill()
    asyncio.run(until_dead(scorer))
