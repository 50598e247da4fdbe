"""The list of a checkpoint's files, by which a whole one is told from a damaged one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from shared.errors import CheckpointError

PARTS_FILE = "parts.json"

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    pickle.UnpicklingError,
)
"""What DeepSpeed and torch raise over a damaged checkpoint."""


def write_parts(folder: Path, sizes: Mapping[str, int], layout: Mapping[str, int]) -> None:
    """List the files of all ranks, and what the checkpoint is of.

    Args:
        sizes: by name below `folder`, in bytes.
        layout: what the engine that reads it must agree with, or know.
    """
    listed = {**layout, "files": dict(sorted(sizes.items()))}
    (folder / PARTS_FILE).write_text(json.dumps(listed, indent=1), "utf8")


class Layout(NamedTuple):
    """What wrote a checkpoint."""

    num_ranks: int
    zero_stage: int


def read_layout(folder: Path) -> Layout:
    """By which ranks a checkpoint was written, once the files of all of them are seen to be there.

    Raises:
        CheckpointError: a file is missing or of another size.
    """
    try:
        described = json.loads((folder / PARTS_FILE).read_text("utf8"))
        sizes = dict(described["files"])
        layout = Layout(int(described["num_ranks"]), int(described["zero_stage"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / PARTS_FILE}: missing or damaged ({error}); this is no complete checkpoint"
        ) from None
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long, not {size}"
            raise CheckpointError(f"{path}: {state}; the checkpoint is damaged, use an older one")
    return layout


def check_parts(folder: Path, *, zero_stage: int) -> int:
    """Compare a checkpoint with the list of its files; the number of ranks that wrote it.

    Raises:
        CheckpointError: as `read_layout`, or it is of another ZeRO stage.
    """
    layout = read_layout(folder)
    if layout.zero_stage != zero_stage:
        raise CheckpointError(
            f"{folder}: written with zero_stage = {layout.zero_stage}, this run has {zero_stage};"
            " resume with the same"
        )
    return layout.num_ranks


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error of one line for one of UNREADABLE."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{folder}: the checkpoint cannot be read ({reason}); use an older one")
