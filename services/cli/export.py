"""`isentrope export`: a copy of the trained model, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from services.cli.run_folder import RunFolder
from shared.errors import ConfigError, StartError


def export_model(folder: RunFolder, destination: Path) -> Path:
    """Copy the run's model, in Hugging Face form, to `destination`; the destination.

    Raises:
        ConfigError: the run has no model yet, or the destination exists.
        StartError: the copy cannot be written.
    """
    if not (folder.model / "config.json").is_file():
        raise ConfigError(
            f"{folder.model}: no model; the learner writes it when the run finishes"
            " (isentrope up FILE --resume)"
        )
    if destination.exists():
        raise ConfigError(f"{destination}: exists; give a folder that does not exist yet")
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(folder.model, temporary)
        temporary.rename(destination)
    except OSError as error:
        raise StartError(
            f"{destination}: not written ({error}); make room or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return destination
