from __future__ import annotations

import subprocess
import sys

import pytest

from shared.errors import ConfigError
from shared.tasks.countdown import Countdown
from shared.tasks.registry import load_task
from shared.tasks.task import DemonstratedTask


def test_a_built_in_task_is_found_by_name_and_given_its_params() -> None:
    task = load_task("countdown", {"numbers": 4})
    assert isinstance(task, Countdown)
    assert isinstance(task, DemonstratedTask)
    assert len(task.problems("eval")[0].answer.split(" ")) == 4


def test_a_plug_in_is_found_by_its_import_path() -> None:
    task = load_task("tests.verifier.hostile:HostileTask", {})
    assert task.score("pass", answer="").is_pass
    assert not isinstance(task, DemonstratedTask)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "x",
            {},
            "task.name = 'x': no such task; known: countdown, math, reasoning_gym,"
            " or package.module:Class",
        ),
        ("", {}, "task.name = '': no such task"),
        ("a:", {}, "task.name = 'a:': no such task"),
        ("nowhere.at_all:Task", {}, "cannot be imported (No module named 'nowhere')"),
        ("shared.tasks.task:Missing", {}, "has no attribute 'Missing'"),
        ("countdown", {"number": 3}, "unexpected keyword argument 'number'; countdown takes (num"),
        ("countdown", {"numbers": 9}, "numbers = 9: must be 2 to 5"),
        ("math", {}, "missing a required argument: 'path'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    name: str, params: dict[str, str | int | float | bool], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(name, params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_countdown_imports_no_library_of_another_task() -> None:
    program = (
        "import sys; from shared.tasks import load_task; load_task('countdown', {});"
        "print([m for m in ('torch', 'math_verify', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
