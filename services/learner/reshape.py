"""A ZeRO checkpoint of any number of ranks, in forms that do not depend on the number.

To go on with another number of ranks: DeepSpeed's universal checkpoint, a file a parameter and
moment, each whole. It is made beside the checkpoint, takes up to three times as much of the disk
while it is made, and goes once it is loaded. For the weights alone nothing is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from services.learner.parts import UNREADABLE, unreadable
from shared.errors import CheckpointError

logger = logging.getLogger(__name__)

UNIVERSAL_TAG = "universal"

_MODEL_FILE = "mp_rank_00_model_states.pt"
_PEAK = 3
_PROBE_BYTES = 2**20


@contextmanager
def reshaped(folder: Path, tag: str) -> Iterator[None]:
    """Within it `folder` has UNIVERSAL_TAG, made of `tag`; for rank 0 alone.

    Raises:
        CheckpointError: it cannot be read, or the disk has no room for it.
    """
    universal, started = folder / UNIVERSAL_TAG, time.monotonic()
    shutil.rmtree(universal, ignore_errors=True)
    try:
        try:
            _convert(folder / tag, universal)
        except UNREADABLE as error:
            raise _no_room(folder, tag) or unreadable(folder, error) from error
        logger.info("reshaped %s in %.1f s", folder, time.monotonic() - started)
        yield
    finally:
        shutil.rmtree(universal, ignore_errors=True)
        (folder / f"latest_{UNIVERSAL_TAG}").unlink(missing_ok=True)


def whole_weights(folder: Path, tag: str, *, zero_stage: int) -> dict[str, Tensor]:
    """What is trained, whole, by its name in the policy; read without DeepSpeed's engine.

    Below ZeRO-3 the weights as they were, mapped from the file; else the float32 master, of which
    they are the rounding.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        if zero_stage < 3:
            path = folder / tag / _MODEL_FILE
            weights: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True)["module"]
            return weights
        return _gathered(folder, tag)
    except UNREADABLE as error:
        raise unreadable(folder, error) from error


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


def _gathered(folder: Path, tag: str) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag, exclude_frozen_parameters=True
        )
    return weights


def _no_room(folder: Path, tag: str) -> CheckpointError | None:
    """The error, if the disk takes no more: torch does not say why it could not write a file."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        gib = _PEAK * sum(path.stat().st_size for path in (folder / tag).rglob("*")) / 2**30
        return CheckpointError(
            f"{folder}: cannot be written to, and another number of ranks wants the checkpoint"
            f" in another shape ({error}); have {gib:.3g} GiB free there, or resume with as many"
            " ranks as wrote it"
        )
    return None
