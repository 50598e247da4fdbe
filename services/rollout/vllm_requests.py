"""vLLM's parameters, outputs and running requests, to and from our records."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from shared.errors import EngineError
from shared.records import Completion, VersionRun


def sampling_params(**choices: Any) -> Any:
    """vLLM's parameters of a request: no top-p and no top-k, so that log-probs are comparable."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **choices,
    )


async def finished(
    llm: Any,
    token_ids: Sequence[int],
    params: Any,
    *,
    request_id: str,
    cache_salt: str,
    on_death: Callable[[], None],
) -> Any:
    """vLLM's output of one request when it has ended; cancelling the call aborts the request.

    Args:
        llm: vLLM's `AsyncLLM`.
        on_death: called at once if the engine died: whoever is told of the failure asks for it.
    Raises:
        ValueError: the tokens do not fit the model.
        EngineError: the engine died or gave the request up.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs.engine import tokens_input
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    _check_ids(token_ids, llm.model_config.get_vocab_size(), request_id)
    prompt = tokens_input(list(token_ids), cache_salt=cache_salt)
    try:
        async for output in llm.generate(prompt, params, request_id):
            if output.outputs[0].finish_reason in ("stop", "length"):
                return output
    except VLLMValidationError as error:
        raise ValueError(f"request {request_id}: {error}") from error
    except (EngineDeadError, EngineGenerateError) as error:
        if isinstance(error, EngineDeadError):
            on_death()
        raise EngineError(f"request {request_id} failed: {error}") from error
    raise EngineError(f"request {request_id} was given up by the engine")


def _check_ids(token_ids: Sequence[int], vocabulary: int, request_id: str) -> None:
    """vLLM would look them up outside its embedding."""
    if not all(0 <= token_id < vocabulary for token_id in token_ids):
        raise ValueError(f"request {request_id}: a token id is not below {vocabulary}")


def arrived(processor: Any, request_id: str, *, start: int) -> Completion | None:
    """Our record of what a request has sampled so far, without its first `start` tokens.

    Args:
        processor: vLLM's output processor.
    Returns:
        None if it has no more tokens, or is not known.
    """
    for name in processor.external_req_ids.get(request_id, ()):
        state = processor.request_states.get(name)
        if state is not None and state.detokenizer.num_output_tokens() > start:
            return _so_far(state, start)
    return None


def _so_far(state: Any, start: int) -> Completion:
    token_ids = array("I", state.detokenizer.output_token_ids[start:])
    logprobs = array("f", state.logprobs_processor.logprobs.logprobs[start:])
    runs = _version_runs(state._weight_version_spans(), start)
    assert len(token_ids) == len(logprobs) == sum(run.num_tokens for run in runs)
    return Completion(token_ids, logprobs, runs, is_truncated=False)


def to_completion(output: Any) -> Completion:
    """Our record of one of vLLM's finished outputs."""
    token_ids = array("I", output.token_ids)
    logprobs = array("f", output.logprobs.logprobs)
    runs = _version_runs(output.weight_versions, 0)
    assert len(token_ids) == len(logprobs) == sum(run.num_tokens for run in runs)
    return Completion(token_ids, logprobs, runs, is_truncated=output.finish_reason == "length")


def _version_runs(spans: Any, start: int) -> tuple[VersionRun, ...]:
    """vLLM's spans, without the first `start` tokens."""
    return tuple(
        VersionRun(int(span.version), span.end - max(span.start, start))
        for span in spans
        if span.end > max(span.start, start)
    )
