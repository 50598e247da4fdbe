"""A ZeRO checkpoint of any number of ranks, in the form that every number of ranks can load.

DeepSpeed's universal checkpoint: a file a parameter and moment, each whole. It takes as much of
the disk as the checkpoint itself, is made beside it when the number of ranks has changed, and goes
once it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.learner.parts import UNREADABLE, unreadable

logger = logging.getLogger(__name__)

UNIVERSAL_TAG = "universal"


@contextmanager
def reshaped(folder: Path, tag: str) -> Iterator[None]:
    """Within it `folder` has UNIVERSAL_TAG, made of `tag`; for rank 0 alone.

    Raises:
        CheckpointError: it cannot be read, or the disk has no room.
    """
    universal, started = folder / UNIVERSAL_TAG, time.monotonic()
    shutil.rmtree(universal, ignore_errors=True)
    try:
        try:
            _convert(folder / tag, universal)
        except UNREADABLE as error:
            raise unreadable(folder, error) from error
        logger.info("reshaped %s in %.1f s", folder, time.monotonic() - started)
        yield
    finally:
        shutil.rmtree(universal, ignore_errors=True)
        (folder / f"latest_{UNIVERSAL_TAG}").unlink(missing_ok=True)


def _convert(source: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        ds_to_universal.main(
            Namespace(
                input_folder=str(source),
                output_folder=str(universal),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                # What it would miss tells of pipelines and vocabularies that are cut up.
                inject_missing_state=True,
            )
        )
