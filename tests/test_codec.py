from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import trajectory_pb2 as pb
from shared.codec import (
    completion_message,
    completion_record,
    decode_prompt_group,
    decode_rollout_group,
    decode_scored_group,
    encode_prompt_group,
    encode_rollout_group,
    encode_scored_group,
    pack_logprobs,
    pack_token_ids,
    score_message,
    score_record,
    unpack_logprobs,
    unpack_token_ids,
)
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
from tests.factories import make_completion, make_prompt, make_scored

Decode = Callable[[bytes], PromptGroup | RolloutGroup | ScoredGroup]
DECODERS: list[Decode] = [decode_prompt_group, decode_rollout_group, decode_scored_group]

uint32 = st.integers(0, 2**32 - 1)
version = st.integers(0, 2**63 - 1)
float32 = st.floats(width=32, allow_nan=False)
token_ids = st.integers(0, 2**31 - 1)
temperatures = st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    pairs = st.lists(st.tuples(token_ids, float32), min_size=sum(counts), max_size=sum(counts))
    ids, logprobs = zip(*draw(pairs), strict=True)
    return Completion(
        token_ids=array("I", ids),
        behaviour_logprobs=array("f", logprobs),
        version_runs=tuple(VersionRun(draw(version), count) for count in counts),
        is_truncated=draw(st.booleans()),
    )


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    sampled = tuple(draw(st.lists(completions(), min_size=1, max_size=4)))
    when = st.floats(allow_nan=False)
    prompt = PromptGroup(
        uid=GroupUid(draw(st.text()), draw(uint32), draw(uint32), draw(uint32)),
        purpose=draw(st.sampled_from(Purpose)),
        task=draw(st.text()),
        problem_index=draw(uint32),
        prompt_token_ids=array("I", draw(st.lists(token_ids, min_size=1, max_size=20))),
        answer=draw(st.text()),
        group_size=len(sampled),
        temperature=draw(temperatures),
        max_completion_tokens=draw(uint32),
        min_policy_version=draw(version),
        issued_at=draw(when),
    )
    score = st.builds(Score, st.sampled_from(Outcome), float32, st.text())
    return ScoredGroup(
        rollout=RolloutGroup(prompt, sampled, draw(st.text()), draw(when)),
        scores=tuple(draw(score) for _ in sampled),
        verifier=draw(st.text()),
        scored_at=draw(when),
    )


def payloads(group: ScoredGroup) -> dict[Decode, bytes]:
    """What travels on each stream on the way to a scored group."""
    return {
        decode_prompt_group: encode_prompt_group(group.rollout.prompt),
        decode_rollout_group: encode_rollout_group(group.rollout),
        decode_scored_group: encode_scored_group(group),
    }


@given(scored_groups())
def test_what_travels_arrives_as_it_was(group: ScoredGroup) -> None:
    assert decode_prompt_group(encode_prompt_group(group.rollout.prompt)) == group.rollout.prompt
    assert decode_rollout_group(encode_rollout_group(group.rollout)) == group.rollout
    assert decode_scored_group(encode_scored_group(group)) == group


@given(scored_groups())
def test_a_record_has_the_types_that_it_promises(group: ScoredGroup) -> None:
    decoded = decode_scored_group(encode_scored_group(group))
    assert decoded.rollout.prompt.prompt_token_ids.typecode == "I"
    assert isinstance(decoded.rollout.completions, tuple)
    for completion in decoded.rollout.completions:
        assert completion.token_ids.typecode == "I"
        assert completion.behaviour_logprobs.typecode == "f"
        assert isinstance(completion.version_runs, tuple)


@given(st.binary(max_size=400).map(lambda bits: bits[: len(bits) // 4 * 4]))
def test_log_probs_keep_their_bits(bits: bytes) -> None:
    """Of every pattern, also those of infinities and of each kind of nan."""
    assert pack_logprobs(unpack_logprobs(bits)) == bits
    if bits:
        count = len(bits) // 4
        sampled = replace(make_completion(count), behaviour_logprobs=unpack_logprobs(bits))
        assert completion_message(sampled).behaviour_logprobs == bits
        assert completion_record(completion_message(sampled)).behaviour_logprobs.tobytes() == bits


def test_a_group_without_times_is_whole() -> None:
    group = make_scored()
    prompt = replace(group.rollout.prompt, issued_at=0.0)
    rollout = replace(group.rollout, prompt=prompt, sampled_at=0.0)
    timeless = replace(group, rollout=rollout, scored_at=0.0)
    assert decode_scored_group(encode_scored_group(timeless)) == timeless


def test_every_outcome_survives_the_wire() -> None:
    for outcome in Outcome:
        score = Score(outcome, 0.5, "why")
        assert score_record(score_message(score)) == score


def test_the_bytes_of_the_first_format_are_read() -> None:
    """Streams outlive an upgrade: what the first form of these messages wrote, field by field."""
    written = bytes.fromhex(
        "0a9f010a450a0b0a0372756e10021807200110011a09636f756e74646f776e20072a0c0100000002000000"
        "03000000320731203220333e363802450000803f480859000000000000f83f12200a0c0400000005000000"
        "06000000120c000000bf000000bf000000bf1a02100312200a0c040000000500000006000000120c000000"
        "bf000000bf000000bf1a0210031a09726f6c6c6f75742d3021000000000000044012070801150000803f12"
        "0208021a0a76657269666965722d30210000000000000c40"
    )
    group = make_scored(7, epoch=2, attempt=1)
    prompt = replace(group.rollout.prompt, issued_at=1.5)
    rollout = replace(group.rollout, prompt=prompt, sampled_at=2.5)
    assert decode_scored_group(written) == replace(group, rollout=rollout, scored_at=3.5)


# --- size -----------------------------------------------------------------------------------------


def sized_group(*, num_completions: int, num_tokens: int, num_prompt_tokens: int) -> ScoredGroup:
    """Every field filled, two weight updates in each completion."""
    prompt = replace(
        make_prompt(2**31, run_id="a-run-of-some-name", epoch=40, group_size=num_completions),
        problem_index=2**31,
        prompt_token_ids=array("I", [151_935] * num_prompt_tokens),
        answer="an answer of forty characters, say 12345",
        min_policy_version=100_000,
    )
    runs = [(100_000, num_tokens // 2), (100_001, num_tokens // 4), (100_002, num_tokens // 4)]
    completion = replace(make_completion(num_tokens, runs=runs), is_truncated=True)
    rollout = RolloutGroup(prompt, (completion,) * num_completions, "rollout-replica-12", 1.7e9)
    score = Score(
        Outcome.FAIL, 0.5, "a line for a person, of about sixty characters, or so I think"
    )
    return ScoredGroup(rollout, (score,) * num_completions, "verifier-replica-12", 1.7e9)


@pytest.mark.parametrize(
    ("num_completions", "num_tokens", "num_prompt_tokens", "bound"),
    [(8, 256, 300, 9.2), (8, 1024, 300, 8.4), (16, 4096, 1024, 8.2)],
)
def test_a_completion_token_costs_little_more_than_eight_bytes_with_every_field(
    num_completions: int, num_tokens: int, num_prompt_tokens: int, bound: float
) -> None:
    group = sized_group(
        num_completions=num_completions, num_tokens=num_tokens, num_prompt_tokens=num_prompt_tokens
    )
    assert len(encode_scored_group(group)) / (num_completions * num_tokens) <= bound


# --- bytes that are not to be trusted -------------------------------------------------------------


def assert_holds(group: PromptGroup | RolloutGroup | ScoredGroup) -> None:
    """What `shared.records` promises, and the learner's arithmetic relies on."""
    if isinstance(group, ScoredGroup):
        assert len(group.scores) == len(group.rollout.completions)
        return assert_holds(group.rollout)
    if isinstance(group, RolloutGroup):
        assert len(group.completions) == group.prompt.group_size
        for completion in group.completions:
            num_tokens = len(completion.token_ids)
            runs = completion.version_runs
            assert num_tokens == len(completion.behaviour_logprobs) > 0
            assert max(completion.token_ids) < 2**31
            assert sum(run.num_tokens for run in runs) == num_tokens
            assert all(run.num_tokens > 0 and run.policy_version >= 0 for run in runs)
        return assert_holds(group.prompt)
    assert group.group_size > 0
    assert len(group.prompt_token_ids) > 0
    assert max(group.prompt_token_ids) < 2**31
    return None


def assert_decodes_or_refuses(payload: bytes) -> None:
    for decode in DECODERS:
        try:
            group = decode(payload)
        except StreamError:
            continue
        assert_holds(group)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_group_or_a_stream_error(payload: bytes) -> None:
    assert_decodes_or_refuses(payload)


@given(
    st.sampled_from(DECODERS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=6)), max_size=6),
)
def test_damaged_bytes_are_a_group_or_a_stream_error(
    decode: Decode, damages: list[tuple[int, int, bytes]]
) -> None:
    """Bytes lost, changed and put in, anywhere."""
    damaged = payloads(make_scored(outcomes=tuple(Outcome), versions=(0, 1, 2, 3)))[decode]
    for position, num_lost, put_in in damages:
        place = position % (len(damaged) + 1)
        damaged = damaged[:place] + put_in + damaged[place + num_lost :]
    assert_decodes_or_refuses(damaged)


def test_every_single_wrong_byte_is_a_group_or_a_stream_error() -> None:
    draw = random.Random(0)
    payload = encode_scored_group(make_scored())
    for place in range(len(payload)):
        for byte in (0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)):
            assert_decodes_or_refuses(payload[:place] + bytes([byte]) + payload[place + 1 :])


@pytest.mark.parametrize("decode", DECODERS)
def test_a_group_that_is_cut_short_anywhere_is_a_stream_error(decode: Decode) -> None:
    whole = payloads(make_scored(7, epoch=2, attempt=1, versions=(3, 4)))[decode]
    for length in range(len(whole)):
        with pytest.raises(StreamError):
            decode(whole[:length])


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xff\xff",
        b"not a message",
        b"",
        b"\x0a\xff\xff\xff\xff\x0f",  # a field of 4 GiB
        b"\x0b" * 100_000,  # groups in groups
        b"\x0a\x02\xc3\x28",  # not UTF-8
    ],
)
def test_garbage_is_a_stream_error(decode: Decode, payload: bytes) -> None:
    with pytest.raises(StreamError):
        decode(payload)


@pytest.mark.parametrize("hostile", ["completions", "scores", "version_runs"])
def test_a_record_is_never_made_of_more_parts_than_there_are_tokens(hostile: str) -> None:
    """Two bytes can claim an empty message; hundreds would be taken for each of its records."""
    message = pb.ScoredGroup.FromString(encode_scored_group(make_scored()))
    if hostile == "completions":
        message.rollout.prompt.group_size = 300_000
        message.rollout.MergeFromString(b"\x12\x00" * 300_000)
    elif hostile == "scores":
        message.MergeFromString(b"\x12\x00" * 300_000)
    else:
        message.rollout.completions[1].MergeFromString(b"\x1a\x00" * 300_000)
    payload = message.SerializeToString()
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            decode_scored_group(payload)
        assert tracemalloc.get_traced_memory()[1] < len(payload)
    finally:
        tracemalloc.stop()


Change = Callable[[pb.ScoredGroup], object]


def change(**fields: object) -> Change:
    """Set fields of the first completion."""

    def apply(message: pb.ScoredGroup) -> None:
        for name, value in fields.items():
            setattr(message.rollout.completions[0], name, value)

    return apply


def runs(*pairs: tuple[int, int]) -> Change:
    """Replace the version runs of the first completion, which has three tokens."""

    def apply(message: pb.ScoredGroup) -> None:
        completion = message.rollout.completions[0]
        del completion.version_runs[:]
        for policy_version, num_tokens in pairs:
            completion.version_runs.add(policy_version=policy_version, num_tokens=num_tokens)

    return apply


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (change(token_ids=b""), "without tokens"),
        (change(token_ids=b"12345"), "5 bytes of 4"),
        (change(token_ids=bytes(8) + b"\xff\xff\xff\xff"), "token id is negative"),
        (change(token_ids=b"\0\0\0\x80" + bytes(8)), "token id is negative"),
        (change(behaviour_logprobs=b"1234"), "1 log-probs, 3 tokens"),
        (change(behaviour_logprobs=bytes(16)), "4 log-probs, 3 tokens"),
        (change(behaviour_logprobs=b"123456"), "6 bytes of 4"),
        (runs((0, 2)), "cover 2 of 3"),
        (runs(), "cover 0 of 3"),
        (runs((0, 2**32 - 1), (0, 4)), "cover 4294967299 of 3"),
        (runs((0, 3), (9, 0)), "run without tokens"),
        (runs((0, 1), (1, 1), (2, 1), (3, 0)), "4 version runs, 3 tokens"),
        (runs((0, 2), (-1, 1)), "policy version -1"),
        (lambda message: message.rollout.completions.pop(), "1 completions in a group of 2"),
        (lambda message: message.scores.pop(), "1 scores for 2 completions"),
        (lambda message: setattr(message.scores[1], "outcome", 0), "outcome 0 is unknown"),
        (lambda message: setattr(message.scores[1], "outcome", 99), "outcome 99 is unknown"),
        (lambda message: setattr(message.rollout.prompt, "purpose", 0), "purpose 0 is unknown"),
        (lambda message: setattr(message.rollout.prompt, "group_size", 0), "group_size = 0"),
        (
            lambda message: setattr(message.rollout.prompt, "prompt_token_ids", b""),
            "prompt without tokens",
        ),
        (lambda message: message.rollout.prompt.ClearField("uid"), "without uid"),
        (lambda message: message.rollout.prompt.ClearField("issued_at"), "cut short"),
        (lambda message: message.rollout.ClearField("sampled_at"), "cut short"),
        (lambda message: message.ClearField("scored_at"), "cut short"),
    ],
)
def test_a_group_that_contradicts_itself_is_refused(apply: Change, reason: str) -> None:
    message = pb.ScoredGroup.FromString(encode_scored_group(make_scored()))
    apply(message)
    with pytest.raises(StreamError, match=reason):
        decode_scored_group(message.SerializeToString())


def test_the_largest_id_is_not_a_negative_one() -> None:
    ids = array("I", [0, 2**31 - 1, 127, 2**24, 151_935])
    assert unpack_token_ids(pack_token_ids(ids)) == ids
