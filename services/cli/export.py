"""`isentrope export`: a run's model in Hugging Face form, whole or not at all.

The one that a finished run left is copied. That of a checkpoint is made by a process of the
learner's code, which reads the run's folder alone: a run may go on beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from services.cli.checkpoints import KeptCheckpoint, best_of, checkpoints_text, kept_checkpoints
from services.cli.measurements import read_rows
from services.cli.run_folder import RunFolder
from shared.errors import ConfigError, StartError
from shared.new_folder import check_free, new_folder

BEST = "best"
LAST = "last"

_ENVIRONMENT = {
    # A run beside it needs the GPUs and the cores.
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}


def export_model(folder: RunFolder, destination: Path) -> Path:
    """Copy the run's model, in Hugging Face form, to `destination`; the destination.

    Raises:
        ConfigError: the run has no model yet, or the destination exists.
        StartError: the copy cannot be written, or the run replaced its model meanwhile.
    """
    if not (folder.model / "config.json").is_file():
        raise ConfigError(
            f"{folder.model}: no model; the learner writes it when the run finishes"
            f" (isentrope up FILE --resume), or take a checkpoint's: --checkpoint {BEST}, {LAST}"
            " or a name that `isentrope status` shows"
        )
    check_free(destination)
    with new_folder(destination) as written:
        copied = folder.model.stat().st_ino
        try:
            shutil.copytree(folder.model, written, dirs_exist_ok=True)
        finally:
            # A run that was prolonged renames its new model to this place, at any moment.
            if not folder.model.exists() or folder.model.stat().st_ino != copied:
                raise StartError(f"{folder.model}: was replaced while it was copied; try again")
    return destination


def export_checkpoint(folder: RunFolder, destination: Path, wanted: str) -> int:
    """Make the model of a checkpoint, and say meanwhile what is done; the exit status.

    Args:
        wanted: BEST by evaluation score, LAST, or the name of the checkpoint's folder.
    Raises:
        ConfigError: there is no such checkpoint, or the destination exists.
    """
    chosen = _choose(folder, wanted)
    check_free(destination)
    command = [sys.executable, "-m", "services.learner.export", "--exit-with-parent"]
    command += ["--config", str(folder.run_file), "--to", str(destination)]
    command += ["--checkpoint", str(folder.checkpoints / chosen.name)]
    with subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has told it too, and it cleans up.
            return process.wait()


def _choose(folder: RunFolder, wanted: str) -> KeptCheckpoint:
    rows = read_rows(folder.metrics)
    kept = kept_checkpoints(folder, rows)
    if not kept:
        raise ConfigError(
            f"--checkpoint {wanted}: there is none in {folder.checkpoints}; the run writes one"
            " every checkpoint.every_steps steps and when it is stopped"
        )
    if wanted == LAST:
        return kept[-1]
    by_name = {each.name: each for each in kept}
    chosen = best_of(kept) if wanted == BEST else by_name.get(wanted)
    if chosen is None:
        reason = "none was evaluated" if wanted == BEST else "no such checkpoint"
        raise ConfigError(
            f"--checkpoint {wanted}: {reason} in {folder.checkpoints}; there are:"
            f" {checkpoints_text(folder, rows)}"
        )
    return chosen
