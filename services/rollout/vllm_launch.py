"""Starting vLLM: what a replica may choose of it, and what this project has chosen.

Has a thread of its own, and imports vllm only there, because that takes seconds and reads the
environment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from services.rollout.engine_load import LoadRecorder
from shared.errors import EngineError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run vLLM.

    Attributes:
        model_path: folder with config.json and, unless `load_format` is "dummy", the weights.
        kv_cache_bytes: size of the KV cache; None lets vLLM profile (not advised on a CPU).
        gpu_memory_utilization: fraction; bounds the KV cache where `kv_cache_bytes` is None.
        seed: must differ between replicas, or they sample the same completions.
        threads: OpenMP threads of the engine's process on a CPU.
        control_timeout_seconds: an engine that does not answer a control call, such as
            loading the received weights, within this time is killed.
        start_timeout_seconds: bounds `start`.
        load_format: "dummy" skips the weights on disk, which a replica that waits for its
            first update does not need.
    """

    model_path: str
    dtype: Literal["auto", "float32", "bfloat16"]
    max_model_len: int
    max_num_seqs: int
    seed: int
    device: Literal["cpu", "cuda"]
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    threads: int = 1
    enforce_eager: bool = True
    control_timeout_seconds: float = 120.0
    start_timeout_seconds: float = 600.0
    load_format: Literal["auto", "dummy"] = "auto"


# What whoever starts the process may have chosen otherwise.
_ENVIRONMENT_DEFAULTS = {
    # Without it vLLM finds its address by opening a socket towards a public one.
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


async def launch(
    settings: EngineSettings, recorder: LoadRecorder
) -> tuple[Any, ThreadPoolExecutor]:
    """vLLM's `AsyncLLM` with the model loaded, and the thread that forked its process.

    The thread has to live as long as the process, although it is idle: it is the one that the
    kernel's "parent died" signal means.

    Args:
        recorder: is told of every step of the scheduler, in the event loop's thread.
    Raises:
        EngineError: the model could not be loaded within `start_timeout_seconds`.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-launcher")
    started = time.monotonic()
    # Not the future's result: futures of this thread outlive the engine, and would keep it.
    launched: list[Any] = []
    try:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(thread, lambda: launched.append(_launch(settings, recorder)))
    except Exception as error:
        thread.shutdown(wait=False)
        raise EngineError(f"vLLM could not load {settings.model_path}: {error}") from error
    logger.info("started vLLM for %s in %.1f s", settings.model_path, time.monotonic() - started)
    return launched.pop(), thread


def _launch(settings: EngineSettings, recorder: LoadRecorder) -> Any:
    os.environ.update(_environment(settings))
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from services.rollout import weight_receiver

    args = AsyncEngineArgs(
        model=settings.model_path,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        seed=settings.seed,
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=settings.enforce_eager,
        load_format=settings.load_format,
        skip_tokenizer_init=True,
        generation_config="vllm",
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=weight_receiver.BACKEND_NAME),
        worker_extension_cls="services.rollout.weight_receiver.WorkerExtension",
        disable_log_stats=False,
    )
    config = args.create_engine_config()
    is_single = settings.tensor_parallel_size == 1
    executor = weight_receiver.InProcessExecutor if is_single else weight_receiver.WorkersExecutor
    if settings.device == "cpu":
        # vLLM has just asked for a separate worker process, and for starting processes afresh,
        # to control OpenMP; we set OpenMP ourselves, and save 30 s of imports.
        config.parallel_config.distributed_executor_backend = "uni" if is_single else "mp"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        executor.threads = settings.threads
    return AsyncLLM(
        vllm_config=config,
        executor_class=executor,
        log_requests=False,
        log_stats=True,
        stat_loggers=[lambda config, engine_index: recorder],
    )


def _environment(settings: EngineSettings) -> dict[str, str]:
    """What vLLM takes from the environment only; both processes see it."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.start_timeout_seconds)),
    }
    if settings.device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": str(settings.threads),
            # The default pins the first thread of every replica on a machine to the same core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if settings.enforce_eager:
            # Log-probs are compiled even then, which needs a C++ compiler on the machine.
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment
