"""What the learner writes on each group it issues, and finds again on whatever became of it."""

from __future__ import annotations

from shared.records import GroupUid, PromptGroup, Purpose


def label_of(prompt: PromptGroup) -> str:
    """The label of a prompt group: `train/0/17/1`, its epoch, index and attempt."""
    uid = prompt.uid
    return f"{prompt.purpose.value}/{uid.epoch}/{uid.index}/{uid.attempt}"


def read_label(label: str, *, run_id: str) -> tuple[Purpose, GroupUid]:
    """Undo `label_of`; streams are of one run.

    Raises:
        ValueError: it is no such label.
    """
    purpose, *place = label.split("/")
    epoch, index, attempt = map(int, place)
    uid = GroupUid(run_id, epoch, index, attempt)
    if not 0 <= min(epoch, index, attempt) <= max(epoch, index, attempt) < 2**32:
        raise ValueError(f"no place of the prompt order: {uid}")
    return Purpose(purpose), uid
