"""The README's paths, commands and keys are true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from shared.config import RunConfig, load_run

ROOT = Path(__file__).parent.parent
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("[a-z]*/README.md")),
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf8"))
    broken = [
        target
        for target in targets
        if not target.startswith("http") and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_make_target_that_is_named_exists() -> None:
    text = "".join(path.read_text("utf8") for path in TEXTS)
    named = set(re.findall(r"make ([a-z-]+)`", text)) | set(
        re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_configuration_key_in_the_table_exists() -> None:
    keys = re.findall(r"`([a-z_]+)\.([a-z_]+)`", (ROOT / "README.md").read_text("utf8"))
    sections = RunConfig.model_fields
    wrong = [
        f"{section}.{key}"
        for section, key in keys
        if section in sections and key not in sections[section].annotation.model_fields  # type: ignore[union-attr]
    ]
    assert keys
    assert wrong == []


def test_the_demo_is_the_run_file_that_the_readme_says() -> None:
    assert "deploy/config/demo.toml" in (ROOT / "Makefile").read_text("utf8")
    assert load_run(ROOT / "deploy/config/demo.toml").entropy.method == "aent"


def test_the_pins_name_what_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    declared = {
        re.match(r"[a-z-]+", each)[0]  # type: ignore[index]
        for each in project["dependencies"]
    }
    for file in ("cpu.txt", "gpu.txt"):
        pinned = {
            line.split("==")[0].lower().replace("_", "-")
            for line in (ROOT / "deploy/requirements" / file).read_text("utf8").splitlines()
            if "==" in line
        }
        missing = declared - pinned - {"torch", "protobuf"}
        assert missing == set()
