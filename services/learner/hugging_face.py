"""A policy in Hugging Face form, as `from_pretrained` and vLLM load it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from services.learner.policy import Policy
from shared.errors import CheckpointError
from shared.new_folder import replaced_folder


def export_policy(
    policy: Policy,
    weights: Mapping[str, Tensor],
    source: str,
    folder: Path,
    *,
    adapters: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model in Hugging Face form, with its tokenizer.

    Args:
        weights: whole, on the host; merged where the policy has adapters.
        source: where the policy was loaded from; its tokenizer goes with the weights.
        adapters: their own weights, whole, on the host; they go to `adapter`, in peft's form.
    Raises:
        OSError: the disk refused; says how much the weights take.
    """
    try:
        policy.model.save_pretrained(folder, state_dict=dict(weights))
        _copy_tokenizer(source, folder)
        if policy.adapters is not None and adapters is not None:
            policy.adapters.export(folder / "adapter", adapters, base=source)
    except (OSError, SafetensorError) as error:
        gib = sum(weight.nbytes for weight in weights.values()) / 2**30
        raise OSError(f"{error}; the weights take {gib:.3g} GiB") from error
    for path in folder.rglob("*.safetensors"):
        # They are written for their owner alone, and others are to serve the model.
        shutil.copymode(folder / "config.json", path)


@contextmanager
def replaced_model(folder: Path) -> Iterator[Path]:
    """Where to export a run's model, in place of what is at `folder`: as `replaced_folder`.

    Raises:
        CheckpointError: the disk refused.
    """
    try:
        with replaced_folder(folder) as new:
            yield new
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the model was not written ({error}); the run's last checkpoint holds it:"
            " make room and go on by isentrope up FILE --resume, or have it written elsewhere by"
            " isentrope export RUN FOLDER --checkpoint last"
        ) from error


def _copy_tokenizer(model_path: str, folder: Path) -> None:
    source = Path(model_path)
    if not source.is_dir():
        AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
        return
    for path in source.iterdir():
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        is_index = path.name.endswith(".index.json")
        if path.is_file() and not (is_weights or is_index or (folder / path.name).exists()):
            shutil.copyfile(path, folder / path.name)
