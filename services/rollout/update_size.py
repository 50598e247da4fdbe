"""How large a version of the replica's model may be: memory is reserved before its bytes come."""

from __future__ import annotations

import os
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")

_WIDEST = 8
"""A parameter travels in float32 at most, and lies on disk in 4 bits at least."""


def max_update_bytes(model_folder: Path) -> int:
    """A bound that no version of this model passes.

    All of the machine's memory where the folder has no weights, or the model is a hub's.
    """
    files = model_folder.iterdir() if model_folder.is_dir() else ()
    num_bytes = sum(path.stat().st_size for path in files if path.suffix in _WEIGHT_SUFFIXES)
    return _WIDEST * num_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
