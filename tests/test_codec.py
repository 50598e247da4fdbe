from __future__ import annotations

import pytest

from protos import trajectory_pb2 as pb
from shared.codec import (
    decode_prompt_group,
    decode_rollout_group,
    decode_scored_group,
    encode_prompt_group,
    encode_rollout_group,
    encode_scored_group,
)
from shared.errors import StreamError
from shared.records import Completion, Outcome, Purpose, RolloutGroup
from tests.factories import make_completion, make_prompt, make_scored


def test_a_prompt_group_survives_the_wire() -> None:
    group = make_prompt(7, epoch=2, attempt=1, purpose=Purpose.EVAL, min_policy_version=5)
    assert decode_prompt_group(encode_prompt_group(group)) == group


def test_a_scored_group_survives_the_wire_with_every_outcome_and_version_run() -> None:
    group = make_scored(outcomes=tuple(Outcome), versions=(0, 1, 2, 3))
    assert decode_scored_group(encode_scored_group(group)) == group


def test_a_completion_token_costs_at_most_nine_bytes_on_the_wire() -> None:
    def size(num_tokens: int) -> int:
        completion = make_completion(
            num_tokens, runs=[(100, num_tokens // 2), (101, num_tokens // 2)]
        )
        group = RolloutGroup(make_prompt(group_size=1), (completion,), "rollout-0", 1.0)
        return len(encode_rollout_group(group))

    assert size(4096) / 4096 <= 9


@pytest.mark.parametrize("decode", [decode_prompt_group, decode_rollout_group, decode_scored_group])
@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"not a message", b""])
def test_garbage_is_a_stream_error(decode: object, payload: bytes) -> None:
    with pytest.raises(StreamError):
        decode(payload)  # type: ignore[operator]


def broken(**changes: object) -> bytes:
    """A rollout group whose only completion has these fields changed."""
    group = RolloutGroup(make_prompt(group_size=1), (make_completion(3),), "rollout-0", 1.0)
    message = pb.RolloutGroup.FromString(encode_rollout_group(group))
    completion = message.completions[0]
    for name, value in changes.items():
        completion.ClearField(name)  # type: ignore[arg-type]
        if isinstance(value, bytes):
            setattr(completion, name, value)
        elif value is not None:
            completion.version_runs.add(policy_version=0, num_tokens=value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (broken(token_ids=b""), "without tokens"),
        (broken(token_ids=b"12345"), "5 bytes of 4"),
        (broken(behaviour_logprobs=b"1234"), "1 log-probs, 3 tokens"),
        (broken(version_runs=2), "cover 2 of 3"),
    ],
)
def test_a_completion_that_contradicts_itself_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        decode_rollout_group(payload)


def test_a_group_with_a_missing_completion_is_refused() -> None:
    group = RolloutGroup(make_prompt(group_size=2), (make_completion(),), "rollout-0", 1.0)
    with pytest.raises(StreamError, match="1 completions in a group of 2"):
        decode_rollout_group(encode_rollout_group(group))


def test_log_probs_keep_their_bits() -> None:
    completion = make_completion(3)
    completion.behaviour_logprobs[1] = float("-inf")
    group = RolloutGroup(make_prompt(group_size=1), (completion,), "rollout-0", 1.0)
    decoded: Completion = decode_rollout_group(encode_rollout_group(group)).completions[0]
    assert decoded.behaviour_logprobs.tobytes() == completion.behaviour_logprobs.tobytes()
