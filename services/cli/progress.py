"""Progress of a run for a person: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from services.cli.law import law_lines, law_parts, law_row
from services.cli.measurements import Row, is_step, latest, merged, number, values
from services.cli.observer import View
from services.cli.words import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_ETA_STEPS = 10
_QUIET_SECONDS = 10.0


class Progress(Protocol):
    """Where `isentrope up` tells what happens."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""

    def activity(self, text: str) -> None:
        """What goes on now, before there is a view of the run; replaces the one before."""

    def show(self, view: View) -> None:
        """The run as it is now."""

    def close(self) -> None:
        """No more; leaves the cursor on a line of its own."""


class PlainProgress:
    """One ASCII line for each step, and now and then one in between; no control characters."""

    def __init__(
        self,
        output: TextIO,
        *,
        num_steps: int,
        last_step: float = -1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Lines to `output`, for steps after `last_step`."""
        self._output = output
        self._num_steps = num_steps
        self._clock = clock
        self._last_step = last_step
        self._last_activity = ""
        self._said_at = clock() - _QUIET_SECONDS

    def say(self, text: str) -> None:
        print(text, file=self._output, flush=True)
        self._said_at = self._clock()

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def activity(self, text: str) -> None:
        if text != self._last_activity and self._clock() - self._said_at >= _QUIET_SECONDS:
            self._last_activity = text
            self.say(text)

    def show(self, view: View) -> None:
        # A resumed learner takes rows back that came after its checkpoint, and writes them anew.
        self._last_step = min(self._last_step, latest(view.rows, "step") or -1.0)
        for place, row in enumerate(view.rows):
            step = number(row, "step")
            if step is not None and step > self._last_step and is_step(row):
                self._last_step = step
                self.say(step_line(view.rows[: place + 1], view, self._num_steps))
        if self._clock() - self._said_at >= _QUIET_SECONDS:
            self.say(doing(view))

    def close(self) -> None:
        pass


class LiveProgress:
    """A display that is drawn anew each second, below the lines that stay."""

    def __init__(self, console: Console, *, title: str, num_steps: int) -> None:
        from rich.live import Live

        self._console = console
        self._title = title
        self._num_steps = num_steps
        self._started_at = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(
            f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )

    def activity(self, text: str) -> None:
        from rich.spinner import Spinner
        from rich.text import Text

        self._live.update(Spinner("dots", Text(text)))

    def show(self, view: View) -> None:
        elapsed = time.monotonic() - self._started_at
        self._live.update(dashboard(view, self._title, self._num_steps, elapsed))

    def close(self) -> None:
        self._live.stop()


STREAM_ORDER = ("prompts", "rollouts", "scored", "dead_letter")


def step_line(rows: Sequence[Row], view: View, num_steps: int) -> str:
    """The newest of `rows` as one ASCII line."""
    row = rows[-1]
    parts = [f"step {number(row, 'step') or 0:.0f}/{num_steps}"]
    parts += [
        text
        for text in (
            _spelled("reward", number(row, "reward_mean"), ".3f"),
            _eval_text(rows),
            _spelled("entropy", number(row, "entropy"), ".4f"),
            *law_parts(law_row(rows)),
            _spelled("coefficient", number(row, "entropy_coefficient"), ".2g"),
            _staleness_text(row),
            _spelled("tokens/s", tokens_per_second(row), ".0f"),
            _queues_text(view),
            _spelled("mixed", float(mixed_completions(view)), ".0f") if view.services else "",
            _eta_text(rows, num_steps),
        )
        if text
    ]
    return "  ".join(parts)


def dashboard(view: View, title: str, num_steps: int, elapsed: float) -> RenderableType:
    """The live display: where the run stands, what it measures, who serves."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_heading(view, title, num_steps, elapsed), _measures_table(view)]
    if view.services:
        parts.append(services_table(view))
    is_wrong = view.trouble or (view.learner is not None and view.learner.is_stalled)
    parts.append(Text(doing(view), style="yellow" if is_wrong else "dim"))
    return Group(*parts)


def services_table(view: View) -> RenderableType:
    """Everyone who holds a lease."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="dim")
    for title in ("service", "state"):
        table.add_column(title)
    for title in ("version", "groups", "in flight", "mixed versions"):
        table.add_column(title, justify="right")
    for each in view.services:
        is_rollout = each.member.role == "rollout"
        style = None if each.answers and not each.is_stalled else "yellow"
        table.add_row(
            each.member.name,
            "stalled" if each.is_stalled else each.state,
            _version_text(each.policy_version),
            f"{each.groups:,}" if each.member.role != "learner" else "",
            str(each.groups_in_flight) if is_rollout else "",
            str(each.mixed_version_completions) if is_rollout else "",
            style=style,
        )
    return table


def sparkline(numbers: Sequence[float]) -> str:
    """The course of `numbers`, lowest to highest, in at most forty characters."""
    if len(numbers) < 2:
        return ""
    width = min(_SPARK_WIDTH, len(numbers))
    edges = [round(place * len(numbers) / width) for place in range(width + 1)]
    means = [sum(numbers[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span == 0:
        return _SPARKS[0] * width
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round((mean - low) / span * top)] for mean in means)


def eta_seconds(rows: Sequence[Row], num_steps: int) -> float | None:
    """What the steps left take at the pace of the last ones, checkpoints between them included."""
    recent = [row for row in rows[-4 * _ETA_STEPS :] if is_step(row)][-_ETA_STEPS:]
    times, spent = values(recent, "time"), values(recent, "seconds")
    step = latest(recent, "step")
    if step is None or not spent:
        return None
    pace = sum(spent) / len(spent)
    if len(times) > 1 and len(times) == len(recent):
        pace = max(pace, (times[-1] - times[0]) / (len(times) - 1))
    return max(0.0, num_steps - step) * pace


def tokens_per_second(row: Row) -> float | None:
    """Completion tokens trained on, over the whole step's time."""
    tokens, seconds = number(row, "tokens"), number(row, "seconds")
    return tokens / seconds if tokens is not None and seconds else None


def mixed_completions(view: View) -> int:
    """Completions sampled by more than one version, over the replicas that answer."""
    return sum(each.mixed_version_completions for each in view.services)


def _heading(view: View, title: str, num_steps: int, elapsed: float) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    step = view.learner.step if view.learner else latest(view.rows, "step") or 0
    grid = Table.grid(padding=(0, 2))
    eta = eta_seconds(view.rows, num_steps)
    grid.add_row(
        f"[bold]{title}[/bold]",
        f"step [bold]{step:.0f}[/bold] of {num_steps}",
        ProgressBar(total=num_steps, completed=step, width=30),
        f"{duration(elapsed)} so far",
        "" if eta is None else f"about {duration(eta)} left",
    )
    return grid


def _measures_table(view: View) -> RenderableType:
    from rich.table import Table

    rows = view.rows
    row = merged([view.learner.metrics if view.learner else {}, *rows[-_ETA_STEPS:]])
    grid = Table.grid(padding=(0, 2))
    queues = view.learner.queue_depths if view.learner else {}
    lines = [
        ("reward", _figure(row, "reward_mean", ".3f"), sparkline(values(rows, "reward_mean"))),
        ("evaluation", _eval_text(rows).removeprefix("eval "), ""),
        ("entropy", _figure(row, "entropy", ".4f", " nats"), sparkline(values(rows, "entropy"))),
        *law_lines(law_row(rows)),
        ("entropy coefficient λ", _figure(row, "entropy_coefficient", ".2g"), ""),
        ("staleness", _staleness_text(row).removeprefix("staleness "), ""),
        ("tokens per second", _format(tokens_per_second(row), ",.0f"), ""),
        ("waiting on streams", ", ".join(f"{k} {v}" for k, v in sorted(queues.items())), ""),
        ("mixed-version completions", str(mixed_completions(view)) if view.services else "", ""),
    ]
    for name, value, course in lines:
        if value:
            grid.add_row(f"[dim]{name}[/dim]", value, f"[cyan]{course}[/cyan]")
    return grid


def doing(view: View) -> str:
    """What goes on, or what keeps it from going on."""
    learner = view.learner
    if view.trouble:
        return view.trouble
    if learner is None:
        return "waiting for the learner"
    text = learner.activity or "the learner has not said what it does"
    if learner.is_stalled:
        return f"no step for {duration(learner.seconds_without_step)}: {text}"
    return f"paused: {text}" if learner.is_paused else text


def _queues_text(view: View) -> str:
    """Messages waiting, in the order they travel; dead letters only if there are some."""
    depths = view.learner.queue_depths if view.learner else {}
    shown = [(name, depths[name]) for name in STREAM_ORDER if name in depths]
    texts = [f"{name} {depth}" for name, depth in shown if depth or name != "dead_letter"]
    return "waiting: " + " ".join(texts) if texts else ""


def _eval_text(rows: Sequence[Row]) -> str:
    scored = [row for row in rows if number(row, "eval_score") is not None]
    if not scored:
        return ""
    error = number(scored[-1], "eval_stderr")
    text = f"eval {number(scored[-1], 'eval_score'):.3f}"
    return text if error is None else f"{text} (se {error:.3f})"


def _staleness_text(row: Row) -> str:
    mean, top = number(row, "staleness_mean"), number(row, "staleness_max")
    return "" if mean is None or top is None else f"staleness {mean:.2f} (max {top:.0f})"


def _eta_text(rows: Sequence[Row], num_steps: int) -> str:
    eta = eta_seconds(rows, num_steps)
    return "" if eta is None else f"eta {duration(eta)}"


def _version_text(version: int | None) -> str:
    return "" if version is None else "-" if version < 0 else str(version)


def _figure(row: Row, key: str, form: str, unit: str = "") -> str:
    value = number(row, key)
    return "" if value is None else f"{value:{form}}{unit}"


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spelled(name: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{name} {value:{form}}"
