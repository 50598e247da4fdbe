"""vLLM as this project uses it: sample completions, and take new weights without losing any.

The engine proper is a process of its own, forked by `VllmEngine.start`; this class is its front
end in the service's process. Two facts shape it:

* Calls that steer the engine have deadlines; one that misses them is killed
  (`services.rollout.engine_control`).
* An update has two halves. Receiving happens beside decoding; only the swap pauses it
  (`services.rollout.served_version`). Requests that run keep their KV cache over the swap, so
  each version has prefix-cache entries of its own.

Order of calls: `start`, then for each membership epoch `join_group`, then for each version
`begin_update` and `commit_update`; a version with a source of its own needs no group. Until the
first version is in, `generate` refuses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.rollout.concurrency import EngineLoad
from services.rollout.engine_control import EngineControl
from services.rollout.engine_load import LoadRecorder
from services.rollout.served_version import ServedVersion
from services.rollout.update_size import max_update_bytes
from services.rollout.vllm_launch import EngineSettings, launch
from services.rollout.vllm_requests import arrived, finished, sampling_params, to_completion
from shared.broadcast import GroupSpec
from shared.buckets import Manifest
from shared.errors import BroadcastError
from shared.records import Completion
from shared.weight_stream import WeightSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update cost.

    Attributes:
        checksum: of the bytes received, the same on every worker.
        receive_seconds: the transfer, during which decoding went on.
        load_seconds: replacing the model's weights.
        pause_seconds: time during which nothing was decoded; includes `load_seconds`.
    """

    policy_version: int
    checksum: int
    receive_seconds: float
    load_seconds: float
    pause_seconds: float


class VllmEngine:
    """One replica's engine. All methods belong to the event loop that ran `start`."""

    def __init__(
        self,
        llm: Any,
        settings: EngineSettings,
        launcher: ThreadPoolExecutor,
        recorder: LoadRecorder,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self._recorder = recorder
        self._max_update_bytes = max_update_bytes(Path(settings.model_path))
        self._launcher = launcher  # has to live as long as the process
        self._control = EngineControl(llm, timeout_seconds=settings.control_timeout_seconds)
        self._served = ServedVersion(self._control)
        self._receiving: int | None = None
        self._slots = asyncio.Semaphore(settings.max_num_seqs)
        self._control_lock = asyncio.Lock()

    @classmethod
    async def start(cls, settings: EngineSettings) -> VllmEngine:
        """Load the model in a new process; the event loop stays free meanwhile.

        Sets environment variables that vLLM reads, and forks: call it before this process
        imports vllm, starts gRPC or computes with several threads.

        Raises:
            EngineError: the model could not be loaded within `start_timeout_seconds`.
        """
        recorder = LoadRecorder()
        llm, launcher = await launch(settings, recorder)
        return cls(llm, settings, launcher, recorder)

    @property
    def policy_version(self) -> int | None:
        """The version that samples now; None before the first update and after a failed load."""
        return self._served.policy_version

    @property
    def num_workers(self) -> int:
        """Workers that receive weights: each is a member of the broadcast."""
        return self._settings.tensor_parallel_size

    @property
    def max_update_bytes(self) -> int:
        """No version of this model is larger, whatever the learner's dtype."""
        return self._max_update_bytes

    @property
    def is_alive(self) -> bool:
        """False once the engine's process has ended or been given up."""
        return self._control.is_alive

    @property
    def processes(self) -> Sequence[Any]:
        """Of the engine and its workers."""
        return self._control.processes

    @property
    def load(self) -> EngineLoad:
        """What the engine said of itself last."""
        return self._recorder.load

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        cache = self._llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    async def wait_until_dead(self) -> None:
        """Return when the engine's process has ended; it never comes back."""
        await self._control.wait_until_dead()

    # --- sampling -------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        temperature: float,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Completion:
        """Sample one completion; cancelling the call aborts the request.

        Waits for one of `max_num_seqs` places, and while weights are swapped.

        Raises:
            EngineError: no version was loaded yet, or the engine died or gave the request up.
            ValueError: the prompt does not fit the model.
        """
        params = sampling_params(
            temperature=temperature,
            max_tokens=max_completion_tokens,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,  # only what the caller names ends a completion
            logprobs=0,
        )
        async with self._slots:
            version = await self._served.admit()
            output = await self._run_request(
                prompt_token_ids, params, request_id=request_id, cache_salt=f"version {version}"
            )
        return to_completion(output.outputs[0])

    def progress(self, request_id: str, *, start: int) -> Completion | None:
        """What a request has sampled so far, without its first `start` tokens; None if nothing.

        Exact in every field, as in the completion that is being made; known also after the engine
        has died, until the request is aborted. Read where vLLM's front end gathers the tokens:
        asking for them as a stream costs a message each, and brings versions only at the end.
        """
        if self._llm is None:
            return None
        return arrived(self._llm.output_processor, request_id, start=start)

    async def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of `token_ids[1:]`, each given those before it, under the present weights.

        Computed anew, without any cache: compared with the learner's, it tells whether an
        update arrived in every layer.

        Raises:
            EngineError: no version was loaded yet, or the engine died.
        """
        params = sampling_params(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        await self._served.admit()
        name = f"score-{uuid.uuid4()}"
        output = await self._run_request(token_ids, params, request_id=name, cache_salt=name)
        return list(output.prompt_logprobs.logprobs)

    async def _run_request(
        self, token_ids: Sequence[int], params: Any, *, request_id: str, cache_salt: str
    ) -> Any:
        return await finished(
            self._llm,
            token_ids,
            params,
            request_id=request_id,
            cache_salt=cache_salt,
            on_death=self._control.mark_dead,
        )

    # --- weights --------------------------------------------------------------------------------

    async def join_group(self, spec: GroupSpec) -> None:
        """Join a broadcast group, leaving the present one; decoding goes on.

        Args:
            spec: of the replica; `spec.rank` is that of its first worker.
        Raises:
            BroadcastError: the group did not form within its deadline.
            EngineError: the engine died.
        """
        async with self._control_lock:
            self._receiving = None
            await self._control.collective("isentrope_leave_group")
            await self._control.collective("init_weight_transfer_engine", dataclasses.asdict(spec))
        await self._control.poll(
            "isentrope_join_status", seconds=2 * spec.timeout_seconds, what="joining the group"
        )

    async def begin_update(
        self,
        version: int,
        manifest: Manifest,
        *,
        bucket_bytes: int,
        source: WeightSource | None = None,
    ) -> None:
        """Start to receive a version in the background; returns when every worker is ready.

        Args:
            source: fetch it from there; without it, receive it in the group.
        Raises:
            EngineError: the engine is in no group and has no source, has an update under way, or
                died.
        """
        update_info = {
            "manifest": [[spec.name, spec.dtype, list(spec.shape)] for spec in manifest],
            "bucket_bytes": bucket_bytes,
            "source": None if source is None else dataclasses.asdict(source),
        }
        async with self._control_lock:
            await self._control.collective("start_weight_update")
            await self._control.collective("update_weights", update_info)
            self._receiving = version
        logger.debug("receives version %d", version)

    async def commit_update(
        self, version: int, *, expected_checksum: int | None = None, timeout_seconds: float
    ) -> UpdateReport:
        """Wait for the weights, then swap them in; no running request is lost.

        A caller that is cancelled during the swap does not interrupt it.

        Args:
            expected_checksum: what was sent; weights with another one are refused.
            timeout_seconds: bounds the wait for the weights.
        Raises:
            BroadcastError: the weights did not arrive whole. The engine has left its group and
                goes on with the version that it had.
            EngineError: the weights do not fit the model, and every running request was given
                up; or the engine died.
        """
        try:
            checksum, receive_seconds = await self._await_weights(
                expected_checksum, timeout_seconds
            )
        except BroadcastError:
            await self.leave_group()
            raise
        swap = asyncio.create_task(self._swap(version), name=f"swap-{version}")
        load_seconds, pause_seconds = await asyncio.shield(swap)
        logger.info(
            "loaded version %d: received in %.3f s, paused for %.3f s",
            version,
            receive_seconds,
            pause_seconds,
        )
        return UpdateReport(version, checksum, receive_seconds, load_seconds, pause_seconds)

    async def abort_update(self) -> None:
        """Give up the update under way, and the group with it; the model is unchanged."""
        await self.leave_group()

    async def leave_group(self) -> None:
        """Leave the broadcast group, if in one; peers that wait for this replica fail at once."""
        async with self._control_lock:
            self._receiving = None
            await self._control.collective("isentrope_leave_group")

    async def adopt_version(self, version: int) -> None:
        """Declare that the weights loaded from `model_path` are this version."""
        async with self._control_lock:
            await self._served.adopt(version)

    async def _await_weights(self, expected: int | None, seconds: float) -> tuple[int, float]:
        # Without the lock, so that an update can be aborted meanwhile.
        statuses = await self._control.poll(
            "isentrope_receive_status", seconds=seconds, what="receiving weights"
        )
        checksums = {status["checksum"] for status in statuses}
        if len(checksums) > 1 or (expected is not None and checksums != {expected}):
            raise BroadcastError(f"received checksums {checksums}, but {expected} was sent")
        return checksums.pop(), max(status["seconds"] for status in statuses)

    async def _swap(self, version: int) -> tuple[float, float]:
        """Seconds of loading and of the whole."""
        async with self._control_lock:
            if self._receiving != version:
                raise BroadcastError(f"the update to version {version} was aborted")
            self._receiving = None
            return await self._served.swap(version)

    async def shutdown(self) -> None:
        """End the engine's process; requests still running fail. Calling it again is harmless."""
        await self._control.shutdown()
        self._launcher.shutdown(wait=False)
        self._llm = None
