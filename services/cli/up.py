"""`isentrope up`: all services of a run on this machine, from the first process to the report.

    warm-up model -> Redis -> verifiers, rollouts, learner -> watch -> end in order -> report

Whatever happens in between, the children end: learner first, so that it can write a checkpoint,
then rollouts and verifiers, then Redis.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from services.cli.check import check_task, notice_lines
from services.cli.interrupt import Interrupt
from services.cli.launch import (
    REDIS,
    ROLLOUT,
    VERIFIER,
    Launch,
    Plan,
    RunIdentity,
    check_ports,
    plan_services,
    plan_warmup,
    restart_command,
)
from services.cli.measurements import latest, read_rows
from services.cli.observer import Observer, View, own_credentials
from services.cli.progress import LiveProgress, PlainProgress, Progress
from services.cli.run_folder import RunFolder, new_run, resumed_run
from services.cli.supervisor import Child, ServiceDiedError, Supervisor
from services.cli.watch import Watch
from shared.config import Environment, RunConfig, load_run_with_notices
from shared.lease import Role
from shared.redis_connection import check_server
from shared.redis_server import RedisServer, prepare_redis, until_redis_answers
from shared.tokenizer import check_model_path

INTERRUPTED = 130
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Order:
    """What a person asked for on the command line."""

    run_file: Path
    run_id: str | None = None
    is_resumed: bool = False
    is_plain: bool = False


def up(order: Order, *, plan: Plan = plan_services) -> int:
    """Run it; the exit status.

    Args:
        plan: which services to start.
    Raises:
        ConfigError: the run file or the order is wrong; nothing was started.
        StartError: something that the run needs is not there.
        ServiceDiedError: a service ended before the run had finished.
    """
    config, notices = load_run_with_notices(order.run_file)
    check_ports(config)
    check_task(config)
    for line in notice_lines(notices):
        print(line, flush=True)
    if config.model.path is not None:
        check_model_path(config.model.path)
    asyncio.run(_check_redis(config))
    choose = resumed_run if order.is_resumed else new_run
    folder = choose(config, order.run_file, order.run_id)
    started_at = time.monotonic()
    with folder.lock() as lock, _progress(order, config, folder) as progress:
        launcher = _Launcher(order, config, folder, progress, plan)
        view = asyncio.run(launcher.run(lock))
    if view is None:
        print(f"stopped. To go on: {_resume_command(order, folder)}")
        return INTERRUPTED
    _conclude(config, folder, view, wall_seconds=time.monotonic() - started_at)
    return 0


class _Launcher:
    """The processes of a run, in sequence; each method is a part of it."""

    def __init__(
        self,
        order: Order,
        config: RunConfig,
        folder: RunFolder,
        progress: Progress,
        plan: Plan,
    ) -> None:
        self._order = order
        self._config = config
        self._folder = folder
        self._progress = progress
        self._plan = plan

    async def run(self, lock: int) -> View | None:
        """The last view of the finished run, None if interrupted; nobody is left then."""
        server = _own_redis(self._config, self._folder)
        supervisor = Supervisor(
            grace_seconds=self._config.network.call_timeout_seconds,
            lock=lock,
            scratch=None if server is None else server.socket_folder,
        )
        interrupt = Interrupt(on_first=self._say_ending, on_second=supervisor.kill)
        try:
            async with supervisor:
                work = asyncio.create_task(self._work(supervisor, server))
                await interrupt.may_cancel(work)
        finally:
            self._folder.forget_redis_url()
        return None if interrupt.came else work.result()

    async def _work(self, supervisor: Supervisor, server: RedisServer | None) -> View:
        self._progress.say(f"run folder: {self._folder.path}")
        try:
            await self._train_warmup_model(supervisor)
            identity = await self._identity(supervisor, server)
            launches = self._plan(identity)
            children = [await self._start(supervisor, launch) for launch in launches]
            view = await self._watch(supervisor, identity, children)
        except ServiceDiedError as error:
            # Said before the others are ended, which may take a while.
            self._tell_last_lines(error)
            raise
        self._progress.say("the learner has finished; ending the others")
        await supervisor.end([ROLLOUT, VERIFIER])
        return view

    async def _train_warmup_model(self, supervisor: Supervisor) -> None:
        config = self._config
        if not _needs_warmup(config):
            return
        self._progress.say(f"training the warm-up model into {config.model_path}")
        child = await self._start(supervisor, plan_warmup(config, self._folder.run_file))
        while await supervisor.next_exit(timeout_seconds=_POLL_SECONDS) is None:
            self._progress.activity(next(iter(child.last_lines(1)), "warm-up"))
        if child.status != 0:
            raise ServiceDiedError(child)
        for line in child.last_lines(1):
            self._progress.say(line)

    async def _identity(self, supervisor: Supervisor, server: RedisServer | None) -> RunIdentity:
        """What the services are told, with a Redis that was started where it is this run's own."""
        url = _given_redis_url(self._config) if server is None else server.url
        assert url is not None
        if server is not None:
            await self._start_redis(supervisor, server)
        roles: tuple[Role, ...] = get_args(Role)
        redis_urls: dict[str, str] = {
            role: url if server is None else server.url_of(role) for role in roles
        }
        self._folder.write_redis_url(url, by_role=redis_urls)
        return RunIdentity(
            config=self._config,
            run_file=self._folder.run_file,
            run_id=self._folder.run_id,
            redis_url=url,
            is_resumed=self._order.is_resumed,
            redis_urls=redis_urls,
        )

    async def _start_redis(self, supervisor: Supervisor, server: RedisServer) -> None:
        launch = Launch(REDIS, REDIS, server.command, has_lease=False)
        child = await self._start(supervisor, launch)
        timeout = self._config.network.start_timeout_seconds
        answer = asyncio.create_task(until_redis_answers(server.url, timeout_seconds=timeout))
        try:
            while not answer.done():
                if await supervisor.next_exit(timeout_seconds=_POLL_SECONDS) is not None:
                    raise ServiceDiedError(child)
            answer.result()
        finally:
            answer.cancel()

    async def _watch(
        self, supervisor: Supervisor, identity: RunIdentity, children: Sequence[Child]
    ) -> View:
        observer = Observer(
            redis_url=identity.redis_url,
            run_id=identity.run_id,
            metrics=self._folder.metrics,
            tls=own_credentials(),
        )
        watch = Watch(
            supervisor=supervisor,
            observer=observer,
            progress=self._progress,
            start_timeout_seconds=self._config.network.start_timeout_seconds,
            restart_command=lambda launch: restart_command(identity, launch),
        )
        try:
            return await watch.until_finished(children)
        finally:
            await observer.close()

    async def _start(self, supervisor: Supervisor, launch: Launch) -> Child:
        return await supervisor.start(launch, log=self._folder.log_of(launch.name))

    def _say_ending(self) -> None:
        self._progress.say(
            "stopping: the learner writes a checkpoint, then the others end; interrupt again to"
            " kill all at once"
        )

    def _tell_last_lines(self, error: ServiceDiedError) -> None:
        if error.last_lines:
            self._progress.say("\n".join([f"{error}\n", *(f"  {x}" for x in error.last_lines), ""]))


def _conclude(config: RunConfig, folder: RunFolder, view: View, *, wall_seconds: float) -> None:
    """Make the report and print the closing table."""
    from services.cli.report import make_report
    from services.cli.summary import closing_facts, print_facts

    rows = read_rows(folder.metrics)
    make_report(folder)
    facts = closing_facts(config, folder, rows, view.services, wall_seconds=wall_seconds)
    print_facts(facts)


def _own_redis(config: RunConfig, folder: RunFolder) -> RedisServer | None:
    """A server to start, or None where the environment or the run file names one."""
    if _given_redis_url(config) is not None:
        return None
    return prepare_redis(folder.redis, run_id=folder.run_id)


@contextmanager
def _progress(order: Order, config: RunConfig, folder: RunFolder) -> Iterator[Progress]:
    """A live display in a terminal, else plain lines."""
    progress: Progress
    if order.is_plain or not sys.stdout.isatty():
        last_step = latest(read_rows(folder.metrics), "step")
        progress = PlainProgress(
            sys.stdout,
            num_steps=config.run.num_steps,
            last_step=-1.0 if last_step is None else last_step,
        )
    else:
        from rich.console import Console

        progress = LiveProgress(Console(), title=folder.run_id, num_steps=config.run.num_steps)
    try:
        yield progress
    finally:
        progress.close()


def _needs_warmup(config: RunConfig) -> bool:
    return config.model.path is None and not Path(config.model_path).exists()


async def _check_redis(config: RunConfig) -> None:
    """See that a Redis of the person's own answers, before anything takes time."""
    url = _given_redis_url(config)
    if url is not None:
        await check_server(url, timeout_seconds=config.network.call_timeout_seconds)


def _given_redis_url(config: RunConfig) -> str | None:
    return Environment.read().redis_url or config.redis.url


def _resume_command(order: Order, folder: RunFolder) -> str:
    parts = ["isentrope", "up", str(order.run_file), "--resume", "--run-id", folder.run_id]
    return shlex.join(parts)
