"""Watching a run until the learner ends: who is up, who died, what that means.

A replica that dies while another of its role lives only degrades the run. Everything else that
ends before the learner has finished ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from services.cli.launch import LEARNER, ROLLOUT, VERIFIER, Launch
from services.cli.observer import Observer, ServiceView, View
from services.cli.progress import Progress, doing
from services.cli.supervisor import Child, ServiceDiedError, Supervisor, status_in_words
from shared.errors import StartError

_TICK_SECONDS = 1.0
_CONFIG_STATUS = 2
_REPLICAS = (ROLLOUT, VERIFIER)

Key = tuple[str, str]
"""Role and name."""


class _Presence(Enum):
    AWAITED = "awaited"
    UP = "up"
    GONE = "gone"


@dataclass(slots=True)
class _Service:
    """A service as the watch knows it; `token` is that of its last lease."""

    presence: _Presence
    token: str | None = None
    has_died: bool = False


class Watch:
    """The watch over one run."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        observer: Observer,
        progress: Progress,
        start_timeout_seconds: float,
        restart_command: Callable[[Launch], str],
    ) -> None:
        self._supervisor = supervisor
        self._observer = observer
        self._progress = progress
        self._start_timeout_seconds = start_timeout_seconds
        self._restart_command = restart_command
        self._services: dict[Key, _Service] = {}
        self._num_learners = 0
        self._is_stalled = False

    async def until_finished(self, children: Iterable[Child]) -> View:
        """The last view, once every learner rank has ended with status 0.

        Consumes the ends of children; waits a second between looks; stops when the learner ends.

        Raises:
            ServiceDiedError: a process that the run needs ended.
            StartError: somebody was not up in time.
        """
        launches = [child.launch for child in children]
        self._num_learners = sum(launch.role == LEARNER for launch in launches)
        for launch in launches:
            if launch.has_lease:
                self._services[launch.role, launch.name] = _Service(_Presence.AWAITED)
        deadline = time.monotonic() + self._start_timeout_seconds
        while True:
            view = await self._observer.look()
            self._take_in(view)
            self._tell(view)
            if self._awaited and time.monotonic() > deadline:
                raise StartError(self._still_awaited(view))
            child = await self._supervisor.next_exit(timeout_seconds=_TICK_SECONDS)
            if child is not None and self._ends_run(child):
                view = await self._observer.look()
                self._progress.show(view)
                return view

    @property
    def _awaited(self) -> list[Key]:
        return [
            key for key, service in self._services.items() if service.presence is _Presence.AWAITED
        ]

    def _ends_run(self, child: Child) -> bool:
        """Whether the run has finished with this end; an error if it should not have come."""
        if child.launch.role == LEARNER and child.status == 0:
            self._num_learners -= 1
            return self._num_learners == 0
        if child.status == _CONFIG_STATUS or not self._can_do_without(child):
            raise ServiceDiedError(child)
        self._degrade(child)
        return False

    def _can_do_without(self, child: Child) -> bool:
        """Whether another replica of its role lives, started here or by hand."""
        role = child.launch.role
        if role not in _REPLICAS:
            return False
        here = any(other.launch.role == role for other in self._supervisor.running)
        return here or any(
            key[0] == role and key[1] != child.name and service.presence is _Presence.UP
            for key, service in self._services.items()
        )

    def _degrade(self, child: Child) -> None:
        assert child.status is not None
        service = self._services[child.launch.role, child.name]
        service.presence, service.has_died = _Presence.GONE, True
        self._progress.warn(
            f"{child.name} {status_in_words(child.status)}; training goes on without it. Its log:"
            f" {child.log}. To start it again:\n  {self._restart_command(child.launch)}"
        )

    def _take_in(self, view: View) -> None:
        """Who came, who came back, who is not heard of any more."""
        if view.trouble:
            return
        found: dict[Key, ServiceView] = {
            (each.member.role, each.member.name): each for each in view.services
        }
        for key, each in found.items():
            service = self._services.get(key)
            if service is None:
                self._services[key] = _Service(_Presence.UP, each.member.token)
                self._progress.say(f"{key[1]} joined")
            elif service.presence is _Presence.UP:
                service.token = each.member.token
            elif each.answers and not (service.has_died and service.token == each.member.token):
                self._welcome(key, service, each.member.token)
        for key, service in self._services.items():
            if service.presence is _Presence.UP and key not in found and key[0] in _REPLICAS:
                service.presence = _Presence.GONE
                self._progress.warn(f"{key[1]} is not heard of any more: its lease ran out")

    def _welcome(self, key: Key, service: _Service, token: str) -> None:
        was_awaited = service.presence is _Presence.AWAITED
        service.presence, service.token = _Presence.UP, token
        self._progress.say(f"{key[1]} is {'up' if was_awaited else 'back'}")
        if was_awaited and not self._awaited:
            self._progress.say("all services are up")

    def _tell(self, view: View) -> None:
        if not self._awaited:
            self._tell_stall(view)
            self._progress.show(view)
            return
        learner = view.learner
        doing = f"; the learner: {learner.activity}" if learner and learner.activity else ""
        names = ", ".join(name for _, name in sorted(self._awaited))
        self._progress.activity(f"waiting for {names}{doing}")

    def _tell_stall(self, view: View) -> None:
        """Once when steps stop coming, and once when they come again."""
        if view.learner is None or view.learner.is_stalled == self._is_stalled:
            return
        self._is_stalled = view.learner.is_stalled
        if self._is_stalled:
            self._progress.warn(doing(view))
        else:
            self._progress.say("the run goes on")

    def _still_awaited(self, view: View) -> str:
        leases = {(each.member.role, each.member.name) for each in view.services}
        silent = [
            f"{key[1]} ({'its gRPC server does not answer' if key in leases else 'no lease'})"
            for key in sorted(self._awaited)
        ]
        return (
            f"{', '.join(silent)}: not up within network.start_timeout_seconds ="
            f" {self._start_timeout_seconds:g}; see the logs, or allow more time"
        )
