"""The part of a rollout replica that runs inside vLLM's own processes.

vLLM drives a weight update by four calls in each worker, between two steps of the model:

    init_transfer_engine ─▶ start_weight_update ─▶ update_weights ─▶ finish_weight_update

Here the first and the third only *start* a thread, so that decoding goes on while the group
forms and while the bytes arrive in a staging copy. `WorkerExtension` tells the front end how
those threads fare. The model is touched only by `finish_weight_update`, after everything has
arrived; a transfer that fails leaves nothing behind.

Importing this module registers the engine: vLLM imports it in every worker, by
`worker_extension_cls`, and by the plugin entry point where the package is installed.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from shared.broadcast import BroadcastGroup, GroupSpec, open_group
from shared.buckets import Manifest, ParameterSpec, StagedWeights
from shared.errors import BroadcastError
from shared.weight_stream import WeightSource, fetch_weights
from shared.weight_transfer import Received, receive_weights

BACKEND_NAME = "isentrope"

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def register() -> None:
    """Make the engine known to vLLM under `BACKEND_NAME`; calling it again does nothing."""
    if BACKEND_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND_NAME, WeightReceiver)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc, unused-ignore]
    """The fields of the replica's `GroupSpec`."""

    epoch: int
    backend: str
    store_host: str
    store_port: int
    key: str
    rank: int
    world_size: int
    timeout_seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc, unused-ignore]
    """What is about to be sent; `manifest` has one [name, dtype, shape] a parameter.

    `source` has the fields of a `WeightSource`; without it the version comes in the group.
    """

    manifest: list[list[Any]]
    bucket_bytes: int
    source: dict[str, Any] | None = None


class _Background:
    """One call in a thread of its own, whose outcome is asked for later."""

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._call = call
        # The current device is a thread's own: without it every worker would receive on the first.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self.result = self._call()
        except Exception as error:  # handed to whoever asks; a thread has nobody to raise to
            self.error = error

    @property
    def status(self) -> dict[str, Any]:
        """`done`, and `error`, a text, if it failed."""
        return {
            "done": not self._thread.is_alive(),
            "error": None if self.error is None else str(self.error),
        }

    def require(self) -> Any:
        """The result.

        Raises:
            BroadcastError: the call has not ended, or it failed.
        """
        if self._thread.is_alive():
            raise BroadcastError(f"{self._thread.name} has not ended")
        if self.error is not None:
            raise BroadcastError(f"{self._thread.name} failed: {self.error}") from self.error
        return self.result


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc, unused-ignore]
    """Receives whole versions into a staging copy, and swaps them in when asked to.

    The memory of the copy is kept from one version to the next: memory that is touched for the
    first time takes longer than what it receives. After a failure it is left to whatever may
    still write to it.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._joining: _Background | None = None
        self._receiving: _Background | None = None
        self._filling: StagedWeights | None = None
        self._spare: StagedWeights | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Leave the present group, if any, and start to join the one described."""
        self.shutdown()
        spec = GroupSpec(**vars(init_info)).for_worker(self._worker_index())
        self._joining = _Background(f"joining {spec.key}", lambda: open_group(spec))

    def _worker_index(self) -> int:
        parallel = self.parallel_config
        return int(parallel.data_parallel_index * parallel.world_size + parallel.rank)

    def start_weight_update(self) -> None:
        """Nothing to prepare: the model is left alone until `finish_weight_update`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Start to receive, and return.

        Overrides the base class's, which would wait for the device.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Start to receive, and return."""
        manifest: Manifest = tuple(
            ParameterSpec(name, dtype, tuple(shape)) for name, dtype, shape in update_info.manifest
        )
        size = update_info.bucket_bytes
        if update_info.source is not None:
            source = WeightSource(**update_info.source)
            staged = self._take_memory(manifest, bucket_bytes=size)
            self._receiving = _Background(
                f"fetching from {source.address}",
                lambda: fetch_weights(source, manifest, bucket_bytes=size, staged=staged),
            )
            return
        group = self._group()
        staged = self._take_memory(manifest, bucket_bytes=size)
        self._receiving = _Background(
            f"receiving in {group.spec.key}",
            lambda: receive_weights(group, manifest, bucket_bytes=size, staged=staged),
        )

    def _take_memory(self, manifest: Manifest, *, bucket_bytes: int) -> StagedWeights:
        """That of the last version which was swapped in, or new memory."""
        staged, self._spare = self._spare, None
        if staged is None or (staged.manifest, staged.bucket_bytes) != (manifest, bucket_bytes):
            staged = StagedWeights(manifest, bucket_bytes=bucket_bytes)
        self._filling = staged
        return staged

    def finish_weight_update(self) -> None:
        """Swap the received weights in.

        Raises:
            BroadcastError: they have not arrived; the model is unchanged.
            RuntimeError, ValueError: they are not this model's. The model is then damaged, and
                must not be used before an update has succeeded.
        """
        if self._receiving is None:
            raise BroadcastError("no transfer was started")
        received: Received = self._receiving.require()
        self._receiving = None
        load_weights(self.model, self.model_config, received.tensors)
        self._spare, self._filling = self._filling, None

    def shutdown(self) -> None:
        """Leave the group and forget what was received."""
        joining, self._joining, self._receiving = self._joining, None, None
        self._filling = None
        if joining is not None and isinstance(joining.result, BroadcastGroup):
            joining.result.close()

    def _group(self) -> BroadcastGroup:
        if self._joining is None:
            raise BroadcastError("not in a broadcast group")
        group: BroadcastGroup = self._joining.require()
        return group

    # Asked by the front end, through WorkerExtension.

    def join_status(self) -> dict[str, Any]:
        """How joining the group fares."""
        if self._joining is None:
            return {"done": True, "error": "not in a broadcast group"}
        return self._joining.status

    def receive_status(self) -> dict[str, Any]:
        """How the transfer fares, with `checksum` and `seconds` once it is complete."""
        if self._receiving is None:
            return {"done": True, "error": "no transfer was started"}
        status = self._receiving.status
        if status["done"] and status["error"] is None:
            received: Received = self._receiving.require()
            status |= {"checksum": received.checksum, "seconds": received.seconds}
        return status


def load_weights(
    model: torch.nn.Module, model_config: Any, tensors: dict[str, torch.Tensor]
) -> None:
    """Replace all weights of a running model, in place.

    Raises:
        ValueError: `tensors` does not cover the model.
    """
    expected = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    try:
        loaded = model.load_weights(tensors.items())  # type: ignore[operator]
    finally:
        # Even after a failure: it puts back every layer that was not replaced, and without it
        # the model has no memory at all.
        finalize_layerwise_reload(model, model_config)  # type: ignore[no-untyped-call, unused-ignore]
        _repack_tied_heads(model)
    missing = expected - loaded if loaded is not None else set()
    # A quantised model has scales of its own, which no checkpoint of the learner's holds.
    if missing and model_config.quantization is None:
        raise ValueError(f"the update lacks {len(missing)} parameters, {min(missing)} among them")


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Renew the packed copies of output heads on a CPU.

    vLLM 0.32 re-packs a tied embedding, but not the head that shares its weight: the head would
    go on sampling from the old weights, silently.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Methods that vLLM mixes into its worker, for the front end's `collective_rpc`."""

    weight_transfer_engine: WeightReceiver
    _weight_update_active: bool

    def isentrope_join_status(self) -> dict[str, Any]:
        """See `WeightReceiver.join_status`."""
        return self.weight_transfer_engine.join_status()

    def isentrope_receive_status(self) -> dict[str, Any]:
        """See `WeightReceiver.receive_status`."""
        return self.weight_transfer_engine.receive_status()

    def isentrope_leave_group(self) -> None:
        """End the update session, if any, without touching the model, and leave the group."""
        self._weight_update_active = False
        self.weight_transfer_engine.shutdown()


# --- the engine process -------------------------------------------------------------------------


class _BoundToParent:
    """Prepares the engine's process before the executor of vLLM that follows in the MRO."""

    threads = 0

    def _init_executor(self) -> None:
        _die_with_parent()
        if self.threads:
            # vLLM's CPU worker forbids any change of this from its start on.
            torch.set_num_threads(self.threads)
        super()._init_executor()  # type: ignore[misc]


class InProcessExecutor(_BoundToParent, UniProcExecutor):  # type: ignore[misc, unused-ignore]
    """One worker, inside the engine's process."""


class WorkersExecutor(_BoundToParent, MultiprocExecutor):  # type: ignore[misc, unused-ignore]
    """One process a worker; vLLM ends them with the engine's process."""


def _die_with_parent() -> None:
    """Have the kernel kill this process when the front end ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:  # it ended before the request
        os._exit(1)


register()
# It warns, at every update, of layers that have no weights of their own; `load_weights` checks.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
