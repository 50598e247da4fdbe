"""A checkpoint's weights in Hugging Face form: of a run that runs, was stopped or crashed.

    python -m services.learner.export --config RUN/run.toml --checkpoint FOLDER --to FOLDER

It reads the run file, the model that the run started from and the checkpoint, of any number of
ranks, and writes nothing but what it was asked for, which appears whole or not at all. It wants
host memory for the model (under ZeRO-3 for a float32 copy as well), and neither GPU nor Redis.
torch is imported once the arguments are known to be right, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from services.learner.checkpoint import ENGINE, read_checkpoint
from services.learner.parts import read_layout
from shared.config import RunConfig, load_run
from shared.errors import CheckpointError, ConfigError, IsentropeError, StartError
from shared.new_folder import check_free, new_folder
from shared.process import end_with_parent

if TYPE_CHECKING:
    from services.learner.policy import Policy

REPORT_SECONDS = 2.0
"""Between two lines on one long reading."""

_INTERRUPTED = 130


def export_checkpoint(
    config: RunConfig, checkpoint: Path, destination: Path, *, report: Callable[[str], None]
) -> None:
    """Write the policy that a checkpoint holds, as `LearnerEngine.export` would have written it.

    Args:
        checkpoint: its folder.
        destination: a folder that is not there yet.
        report: is told in a line what is done now.
    Raises:
        ConfigError: the destination exists, or the run file is not of this checkpoint.
        CheckpointError: the checkpoint is damaged, or was deleted meanwhile.
        StartError: the model that the run started from is not there, or there is no room.
    """
    check_free(destination)
    try:
        zero_stage = _check(checkpoint, report)
        policy = _load(config, checkpoint, zero_stage, report)
    except CheckpointError:
        # A run renames what it deletes, and so it is there as a whole or not.
        if checkpoint.is_dir():
            raise
        raise CheckpointError(
            f"{checkpoint}: the run has deleted it meanwhile; take a newer one, or raise"
            " checkpoint.keep"
        ) from None
    report(f"writes {destination}")
    with new_folder(destination) as folder:
        _write(policy, config.model_path, folder)


def _check(checkpoint: Path, report: Callable[[str], None]) -> int:
    """See that what will be read is as it was written; the ZeRO stage."""
    zero_stage, last = read_layout(checkpoint / ENGINE).zero_stage, -math.inf

    def on_read(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            report(f"checks {checkpoint.name}: {done / total:.0%} of {total / 2**30:.2f} GiB")

    # With ZeRO-1 and 2 the optimiser has files of its own, three quarters of the whole.
    read_checkpoint(
        checkpoint,
        is_needed=lambda name: zero_stage == 3 or not name.endswith("optim_states.pt"),
        on_read=on_read,
    )
    return zero_stage


def _load(
    config: RunConfig, checkpoint: Path, zero_stage: int, report: Callable[[str], None]
) -> Policy:
    """The policy with the checkpoint's weights."""
    from services.learner.policy import load_policy
    from services.learner.policy_weights import load_trained
    from services.learner.reshape import whole_weights
    from services.learner.zero import CHECKPOINT_TAG

    report(f"reads {config.model_path}, which the run started from")
    try:
        policy = load_policy(config, config.model_path)
    except StartError as error:
        raise StartError(
            f"{error}; export where the run was started: a relative path is of that folder"
        ) from None
    if config.learner.lora is not None:
        policy.add_adapters(config.learner.lora, seed=config.run.seed)
    report(f"reads the weights of {checkpoint.name}")
    weights = whole_weights(checkpoint / ENGINE, CHECKPOINT_TAG, zero_stage=zero_stage)
    try:
        load_trained(weights, policy)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{checkpoint}: {' '.join(str(error).split())[:200]}; the run file has another model,"
            " or another [learner.lora], than when it was written"
        ) from None
    return policy


def _write(policy: Policy, source: str, folder: Path) -> None:
    """Raises OSError if the disk refused."""
    from services.learner.hugging_face import export_policy
    from services.learner.policy_weights import PolicyWeights

    weights = PolicyWeights(policy)
    published = {each.name: weights.value(each) for each in weights.published()}
    adapters = {each.name: weights.value(each) for each in weights.adapters()}
    export_policy(policy, published, source, folder, adapters=adapters)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or after one line on standard error 2 for bad input and 1 for else."""
    parser = argparse.ArgumentParser(
        prog="python -m services.learner.export",
        description="Write the weights of a checkpoint in Hugging Face form.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run file (TOML)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its folder")
    parser.add_argument("--to", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="end when the starting process ends"
    )
    given = parser.parse_args(arguments)
    # What is half written goes, also when somebody ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if given.exit_with_parent:
        end_with_parent()
    try:
        export_checkpoint(load_run(given.config), given.checkpoint, given.to, report=_print)
    except IsentropeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
