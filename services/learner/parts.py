"""The list of a checkpoint's files, by which a whole one is told from a damaged one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

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


def check_parts(folder: Path, *, zero_stage: int) -> int:
    """Compare a checkpoint with the list of its files; the number of ranks that wrote it.

    Raises:
        CheckpointError: a file is missing or of another size, or it is of another ZeRO stage.
    """
    try:
        described = json.loads((folder / PARTS_FILE).read_text("utf8"))
        sizes = dict(described["files"])
        num_ranks, stage = int(described["num_ranks"]), int(described["zero_stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / PARTS_FILE}: missing or damaged ({error}); this is no complete checkpoint"
        ) from None
    if stage != zero_stage:
        raise CheckpointError(
            f"{folder}: written with zero_stage = {stage}, this run has {zero_stage};"
            " resume with the same"
        )
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long, not {size}"
            raise CheckpointError(f"{path}: {state}; the checkpoint is damaged, use an older one")
    return num_ranks


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error of one line for one of UNREADABLE."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{folder}: the checkpoint cannot be read ({reason}); use an older one")
