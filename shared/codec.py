"""Records to protobuf bytes and back: the only place outside servicers that sees messages.

Token ids and log-probs travel as little-endian packed bytes, 8 bytes a token together. They are
copied whole, never visited one by one, so that a token costs nanoseconds on either side (`make
bench-wire`); ids of three bytes would save an eighth of the size and cost that.

Bytes from a stream are not trusted: they decode to records that hold what `shared.records`
promises, or to a StreamError. Memory is linear in the payload, which the streams bound: some 40
times it at worst, for a payload of nothing but empty messages.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from protos import trajectory_pb2 as pb
from shared.errors import StreamError
from shared.records import (
    MAX_GROUP_SIZE,
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

_TRACE_CONTEXT_BYTES = 55

CUT_SHORT = "it is cut short"
"""Fields are written in the order of their numbers; without the last, bytes are missing."""

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
    message = pb.RolloutGroup()
    _fill_rollout(message, group)
    return message.SerializeToString()


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
    message = pb.ScoredGroup(
        scores=[score_message(score) for score in group.scores],
        verifier=group.verifier,
        scored_at=group.scored_at,
    )
    _fill_rollout(message.rollout, group.rollout)
    return message.SerializeToString()


def decode_scored_group(payload: bytes) -> ScoredGroup:
    """The scored group in `payload`.

    Raises:
        StreamError: as `decode_prompt_group`.
    """
    message = pb.ScoredGroup()
    _parse(message, payload)
    _require(message.HasField("scored_at"), CUT_SHORT)
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
        StreamError: not a whole number of tokens, or one that was negative when it was packed.
    """
    token_ids = _unpack("I", packed)
    # The sign is the top bit of every fourth byte, and of ASCII no top bit is set: this looks at
    # all ids in a nanosecond each.
    _require(packed[3::4].isascii(), "a token id is negative")
    return token_ids


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
    message = pb.Completion()
    _fill_completion(message, completion)
    return message


def completion_record(message: pb.Completion) -> Completion:
    """The record of one completion.

    Raises:
        StreamError: no token, one that is negative, or log-probs or version runs that do not
            cover the tokens.
    """
    token_ids = unpack_token_ids(message.token_ids)
    logprobs = unpack_logprobs(message.behaviour_logprobs)
    _require(len(token_ids) > 0, "a completion without tokens")
    _require(len(logprobs) == len(token_ids), f"{len(logprobs)} log-probs, {len(token_ids)} tokens")
    runs = _run_records(message, len(token_ids))
    return Completion(token_ids, logprobs, runs, message.is_truncated)


def encode_completion(completion: Completion) -> bytes:
    """Protobuf bytes of one completion, or of a part of one."""
    return completion_message(completion).SerializeToString()


def decode_completion(payload: bytes) -> Completion:
    """The completion in `payload`.

    Raises:
        StreamError: as `completion_record`.
    """
    message = pb.Completion()
    _parse(message, payload)
    return completion_record(message)


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
        trace_context=group.trace_context,
    )


def _prompt_record(message: pb.PromptGroup) -> PromptGroup:
    _require(message.HasField("issued_at"), CUT_SHORT)
    _require(message.HasField("uid"), "a group without uid")
    _require(message.purpose in _PURPOSES_BACK, f"purpose {message.purpose} is unknown")
    _require(
        0 < message.group_size <= MAX_GROUP_SIZE,
        f"group_size = {message.group_size}: need 1 to {MAX_GROUP_SIZE}",
    )
    _require(
        0 < message.temperature < math.inf,
        f"temperature = {message.temperature}: need a finite one above 0",
    )
    prompt_token_ids = unpack_token_ids(message.prompt_token_ids)
    _require(len(prompt_token_ids) > 0, "a prompt without tokens")
    uid = message.uid
    return PromptGroup(
        uid=GroupUid(uid.run_id, uid.epoch, uid.index, uid.attempt),
        purpose=_PURPOSES_BACK[message.purpose],
        task=message.task,
        problem_index=message.problem_index,
        prompt_token_ids=prompt_token_ids,
        answer=message.answer,
        group_size=message.group_size,
        temperature=message.temperature,
        max_completion_tokens=message.max_completion_tokens,
        min_policy_version=message.min_policy_version,
        issued_at=message.issued_at,
        trace_context=message.trace_context[:_TRACE_CONTEXT_BYTES],
    )


# Filled where they lie: protobuf copies a message that is put into another, tokens and all.
def _fill_rollout(message: pb.RolloutGroup, group: RolloutGroup) -> None:
    message.prompt.CopyFrom(_prompt_message(group.prompt))
    for completion in group.completions:
        _fill_completion(message.completions.add(), completion)
    message.replica = group.replica
    message.sampled_at = group.sampled_at


def _fill_completion(message: pb.Completion, completion: Completion) -> None:
    message.token_ids = pack_token_ids(completion.token_ids)
    message.behaviour_logprobs = _little_endian(completion.behaviour_logprobs).tobytes()
    for run in completion.version_runs:
        message.version_runs.add(policy_version=run.policy_version, num_tokens=run.num_tokens)
    message.is_truncated = completion.is_truncated


def _run_records(message: pb.Completion, num_tokens: int) -> tuple[VersionRun, ...]:
    # Counted before a record is made of each: two bytes on the wire can claim a run.
    num_runs = len(message.version_runs)
    _require(num_runs <= num_tokens, f"{num_runs} version runs, {num_tokens} tokens")
    runs = tuple([VersionRun(run.policy_version, run.num_tokens) for run in message.version_runs])
    counts = [run.num_tokens for run in runs]
    covered, oldest = sum(counts), min([run.policy_version for run in runs], default=0)
    _require(covered == num_tokens, f"version runs cover {covered} of {num_tokens} tokens")
    _require(min(counts) > 0, "a version run without tokens")
    _require(oldest >= 0, f"policy version {oldest}")
    return runs


def _rollout_record(message: pb.RolloutGroup) -> RolloutGroup:
    _require(message.HasField("sampled_at"), CUT_SHORT)
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


def _parse(
    message: pb.PromptGroup | pb.Completion | pb.RolloutGroup | pb.ScoredGroup, payload: bytes
) -> None:
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
