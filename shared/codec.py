"""Records to protobuf bytes and back: the only place outside servicers that sees messages.

Token ids and log-probs travel as little-endian packed bytes, 8 bytes a token together: decoding
is one copy, and a varint per token would cost a hundred times the time.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from protos import trajectory_pb2 as pb
from shared.errors import StreamError
from shared.records import (
    Completion,
    GroupUid,
    Outcome,
    PromptGroup,
    Purpose,
    RolloutGroup,
    Score,
    ScoredGroup,
    VersionRun,
)

_Number = TypeVar("_Number", int, float)

_PURPOSES = {Purpose.TRAIN: pb.PURPOSE_TRAIN, Purpose.EVAL: pb.PURPOSE_EVAL}
_PURPOSES_BACK = {message: record for record, message in _PURPOSES.items()}
_OUTCOMES = {
    Outcome.PASS: pb.OUTCOME_PASS,
    Outcome.FAIL: pb.OUTCOME_FAIL,
    Outcome.ERROR: pb.OUTCOME_ERROR,
    Outcome.TIMEOUT: pb.OUTCOME_TIMEOUT,
}
_OUTCOMES_BACK = {message: record for record, message in _OUTCOMES.items()}


def encode_prompt_group(group: PromptGroup) -> bytes:
    """Protobuf bytes of a prompt group."""
    return _prompt_message(group).SerializeToString()


def decode_prompt_group(payload: bytes) -> PromptGroup:
    """The prompt group in `payload`.

    Raises:
        StreamError: not a prompt group, or one that breaks the record's invariants.
    """
    message = pb.PromptGroup()
    _parse(message, payload)
    return _prompt_record(message)


def encode_rollout_group(group: RolloutGroup) -> bytes:
    """Protobuf bytes of a rollout group."""
    return _rollout_message(group).SerializeToString()


def decode_rollout_group(payload: bytes) -> RolloutGroup:
    """The rollout group in `payload`.

    Raises:
        StreamError: as `decode_prompt_group`.
    """
    message = pb.RolloutGroup()
    _parse(message, payload)
    return _rollout_record(message)


def encode_scored_group(group: ScoredGroup) -> bytes:
    """Protobuf bytes of a scored group."""
    return pb.ScoredGroup(
        rollout=_rollout_message(group.rollout),
        scores=[score_message(score) for score in group.scores],
        verifier=group.verifier,
        scored_at=group.scored_at,
    ).SerializeToString()


def decode_scored_group(payload: bytes) -> ScoredGroup:
    """The scored group in `payload`.

    Raises:
        StreamError: as `decode_prompt_group`.
    """
    message = pb.ScoredGroup()
    _parse(message, payload)
    rollout = _rollout_record(message.rollout)
    _require(
        len(message.scores) == len(rollout.completions),
        f"{len(message.scores)} scores for {len(rollout.completions)} completions",
    )
    return ScoredGroup(
        rollout=rollout,
        scores=tuple(score_record(score) for score in message.scores),
        verifier=message.verifier,
        scored_at=message.scored_at,
    )


def pack_token_ids(token_ids: array[int]) -> bytes:
    """Little-endian uint32 bytes of an array("I")."""
    return _little_endian(token_ids).tobytes()


def unpack_token_ids(packed: bytes) -> array[int]:
    """array("I") of little-endian uint32 bytes.

    Raises:
        StreamError: not a whole number of tokens.
    """
    return _unpack("I", packed)


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Little-endian float32 bytes."""
    return _little_endian(array("f", logprobs)).tobytes()


def unpack_logprobs(packed: bytes) -> array[float]:
    """array("f") of little-endian float32 bytes.

    Raises:
        StreamError: not a whole number of log-probs.
    """
    return _unpack("f", packed)


def completion_message(completion: Completion) -> pb.Completion:
    """The message of one completion."""
    return pb.Completion(
        token_ids=pack_token_ids(completion.token_ids),
        behaviour_logprobs=_little_endian(completion.behaviour_logprobs).tobytes(),
        version_runs=[
            pb.VersionRun(policy_version=run.policy_version, num_tokens=run.num_tokens)
            for run in completion.version_runs
        ],
        is_truncated=completion.is_truncated,
    )


def completion_record(message: pb.Completion) -> Completion:
    """The record of one completion.

    Raises:
        StreamError: no token, or log-probs or version runs that do not cover the tokens.
    """
    token_ids = unpack_token_ids(message.token_ids)
    logprobs = unpack_logprobs(message.behaviour_logprobs)
    runs = tuple(VersionRun(run.policy_version, run.num_tokens) for run in message.version_runs)
    covered = sum(run.num_tokens for run in runs)
    _require(len(token_ids) > 0, "a completion without tokens")
    _require(len(logprobs) == len(token_ids), f"{len(logprobs)} log-probs, {len(token_ids)} tokens")
    _require(covered == len(token_ids), f"version runs cover {covered} of {len(token_ids)} tokens")
    return Completion(token_ids, logprobs, runs, message.is_truncated)


def score_message(score: Score) -> pb.Score:
    """The message of one score."""
    return pb.Score(outcome=_OUTCOMES[score.outcome], reward=score.reward, detail=score.detail)


def score_record(message: pb.Score) -> Score:
    """The record of one score.

    Raises:
        StreamError: an unspecified outcome.
    """
    _require(message.outcome in _OUTCOMES_BACK, f"outcome {message.outcome} is unknown")
    return Score(_OUTCOMES_BACK[message.outcome], message.reward, message.detail)


def _prompt_message(group: PromptGroup) -> pb.PromptGroup:
    uid = group.uid
    return pb.PromptGroup(
        uid=pb.GroupUid(run_id=uid.run_id, epoch=uid.epoch, index=uid.index, attempt=uid.attempt),
        purpose=_PURPOSES[group.purpose],
        task=group.task,
        problem_index=group.problem_index,
        prompt_token_ids=pack_token_ids(group.prompt_token_ids),
        answer=group.answer,
        group_size=group.group_size,
        temperature=group.temperature,
        max_completion_tokens=group.max_completion_tokens,
        min_policy_version=group.min_policy_version,
        issued_at=group.issued_at,
    )


def _prompt_record(message: pb.PromptGroup) -> PromptGroup:
    _require(message.purpose in _PURPOSES_BACK, f"purpose {message.purpose} is unknown")
    _require(message.group_size > 0, "group_size = 0")
    uid = message.uid
    return PromptGroup(
        uid=GroupUid(uid.run_id, uid.epoch, uid.index, uid.attempt),
        purpose=_PURPOSES_BACK[message.purpose],
        task=message.task,
        problem_index=message.problem_index,
        prompt_token_ids=unpack_token_ids(message.prompt_token_ids),
        answer=message.answer,
        group_size=message.group_size,
        temperature=message.temperature,
        max_completion_tokens=message.max_completion_tokens,
        min_policy_version=message.min_policy_version,
        issued_at=message.issued_at,
    )


def _rollout_message(group: RolloutGroup) -> pb.RolloutGroup:
    return pb.RolloutGroup(
        prompt=_prompt_message(group.prompt),
        completions=[completion_message(completion) for completion in group.completions],
        replica=group.replica,
        sampled_at=group.sampled_at,
    )


def _rollout_record(message: pb.RolloutGroup) -> RolloutGroup:
    prompt = _prompt_record(message.prompt)
    _require(
        len(message.completions) == prompt.group_size,
        f"{len(message.completions)} completions in a group of {prompt.group_size}",
    )
    return RolloutGroup(
        prompt=prompt,
        completions=tuple(completion_record(each) for each in message.completions),
        replica=message.replica,
        sampled_at=message.sampled_at,
    )


def _parse(message: pb.PromptGroup | pb.RolloutGroup | pb.ScoredGroup, payload: bytes) -> None:
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise StreamError(f"not a {message.DESCRIPTOR.name}: {error}") from None


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise StreamError(f"malformed group: {problem}")


def _little_endian(values: array[_Number]) -> array[_Number]:
    if sys.byteorder == "little":
        return values
    swapped = array(values.typecode, values)
    swapped.byteswap()
    return swapped


def _unpack(typecode: str, packed: bytes) -> array[Any]:
    values: array[Any] = array(typecode)
    _require(len(packed) % values.itemsize == 0, f"{len(packed)} bytes of {values.itemsize} each")
    values.frombytes(packed)
    return _little_endian(values)
