"""What a person sees while a run runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from services.cli.measurements import RowReader
from services.cli.observer import LearnerView, ServiceView, View
from services.cli.progress import PlainProgress, dashboard, eta_seconds, sparkline, step_line
from services.cli.words import duration
from shared.lease import Member, Role

LEARNER = LearnerView(4, 10, 4, "waits for 3 groups", False, {"entropy": 0.2}, {"scored": 2})


def service(role: Role, name: str, **more: Any) -> ServiceView:
    given: dict[str, Any] = {"answers": True, "state": "serving", **more}
    return ServiceView(Member(role, name, "127.0.0.1:1", "", "token"), **given)


def run_rows(num_steps: int) -> list[dict[str, Any]]:
    """The evaluation of step 0, then a row a step."""
    evaluation = {"step": 0, "eval_step": 0, "eval_score": 0.4, "eval_stderr": 0.012}
    steps = [
        {
            "step": step,
            "reward_mean": step / 100,
            "entropy": 0.3 - step / 100,
            "entropy_coefficient": 6e-4,
            "staleness_mean": 0.7,
            "staleness_max": 2,
            "tokens": 2500,
            "seconds": 1.5,
        }
        for step in range(1, num_steps + 1)
    ]
    return [evaluation, *steps]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_one_a_step_also_after_a_resume_took_steps_back() -> None:
    output, clock, rows = io.StringIO(), Clock(), run_rows(5)
    progress = PlainProgress(output, num_steps=5, last_step=2, clock=clock)
    progress.say("begin")
    progress.show(View(LEARNER, (), rows[:4]))
    progress.show(View(LEARNER, (), rows[:2]))
    progress.show(View(LEARNER, (), rows[:4]))
    words = [" ".join(line.split()[:2]) for line in output.getvalue().splitlines()]
    assert words == ["begin", "step 3/5", "step 2/5", "step 3/5"]


def test_a_long_wait_is_explained_now_and_then() -> None:
    output, clock = io.StringIO(), Clock()
    progress = PlainProgress(output, num_steps=5, clock=clock)
    progress.say("begin")
    for clock.now in (101.0, 105.0, 111.0, 112.0):
        progress.show(View(LEARNER, (), []))
    assert output.getvalue() == "begin\nwaits for 3 groups\n"


def test_the_dashboard_shows_everything_and_fits_a_narrow_terminal() -> None:
    replica = service("rollout", "rollout-0", policy_version=4, mixed_version_completions=7)
    silent = service("rollout", "rollout-1", answers=False, state="silent")
    view = View(LEARNER, (service("learner", "learner"), replica, silent), run_rows(20))
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(dashboard(view, "demo-1", 100, 65.0))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("demo-1", "step 4 of 100", "1 min 05 s so far", "left", "reward", "se 0.012",
                 "nats", "λ", "staleness", "max 2", "tokens per second", "scored 2", "7", "silent",
                 "waits for 3 groups", "▁"):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100


def test_the_entropy_law_is_shown_with_its_interval_or_as_not_identifiable_yet() -> None:
    known = {"law_points": 2.0, "law_a": None, "entropy_consumed": 0.42, "entropy_rate": -2e-3}
    early = [*run_rows(4), {"step": 4, **known, "law_steps_left": 55.4}]
    text = drawn(early)
    assert "42 %" in text and "floor: about 55 steps at -0.002 nats a step" in text
    assert "law not identifiable yet (2 points)" in text
    numbers = {
        "law_a": 0.4,
        "law_b": 1.1,
        "law_ceiling": 0.7,
        "law_score_at_floor": 0.69,
        "law_floor": 0.02,
    }
    bounds = {"law_ceiling_low": 0.655, "law_ceiling_high": 0.745, "law_gain_left": 0.05}
    late = [*early, {"step": 5, **known, **numbers, **bounds, "law_steps_left": None}]
    text = drawn(late)
    for part in ("0.700", "95 % interval 0.655 to 0.745", "0.690", "+0.050 from now"):
        assert part in text, part
    assert "law not identifiable" not in text
    assert "none" in drawn([*late, {**late[-1], "law_a": -0.4}])


def test_a_plain_line_tells_where_the_law_stands() -> None:
    row = {**run_rows(5)[-1], "law_points": 1.0, "law_a": None, "entropy_consumed": 0.1}
    line = step_line([row], View(None, (), [row]), 9)
    assert "consumed 10 %  law not identifiable yet (1 point)" in line
    row |= {
        "law_a": 0.4,
        "law_b": 1.1,
        "law_ceiling": 0.7,
        "law_score_at_floor": 0.69,
        "law_floor": 0.02,
    }
    row |= {"law_ceiling_low": 0.655, "law_ceiling_high": 0.745, "law_steps_left": 80.0}
    line = step_line([row], View(None, (), [row]), 9)
    assert "ceiling 0.700 (95 %: 0.655 to 0.745)  at the floor 0.690  80 steps to the floor" in line
    assert line.isascii()
    assert "law" not in step_line(run_rows(2), View(None, (), []), 9)


def drawn(rows: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(dashboard(View(LEARNER, (), rows), "demo-1", 100, 65.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_empty_view_is_shown_too() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(dashboard(View(None, (), [], trouble="Redis does not answer"), "demo", 9, 0.0))
    assert isinstance(console.file, io.StringIO)
    assert "Redis does not answer" in console.file.getvalue()


def test_the_time_left_includes_what_happens_between_steps() -> None:
    rows = [{"step": n, "seconds": 1.0, "time": 3.0 * n} for n in range(1, 6)]
    assert eta_seconds(rows, 10) == 15.0
    assert eta_seconds([{"step": 4, "seconds": 2.0}], 10) == 12.0
    assert eta_seconds([{"step": 0, "eval_score": 1.0}], 10) is None


def test_a_sparkline_has_one_mark_a_value_and_forty_at_most() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([1]) == ""
    assert len(sparkline(list(range(1000)))) == 40


def test_durations_are_words() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7800)] == [
        "0 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]


def test_rows_are_read_as_they_grow_and_anew_when_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RowReader(path)
    assert reader.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert [row["step"] for row in reader.read()] == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert [row["step"] for row in reader.read()] == [1, 2]
    new = tmp_path / "new"
    new.write_text(json.dumps({"step": 1, "again": True}) + "\n")
    new.replace(path)
    assert reader.read() == [{"step": 1, "again": True}]
