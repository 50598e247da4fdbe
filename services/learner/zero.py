"""The policy on DeepSpeed; `services.learner.reshape` alone imports it besides.

DeepSpeed is imported where it is used: `DS_ACCELERATOR` must be decided before.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from services.learner.balance import PassCost
from services.learner.batch import MicroBatch, collate_sequences
from services.learner.parts import UNREADABLE, unreadable
from services.learner.passes import OptimizerStep
from services.learner.policy import Policy, read_statistics
from services.learner.policy_weights import load_trained
from services.learner.ranks import Ranks
from services.learner.reshape import UNIVERSAL_TAG
from services.learner.snapshot import Files, HostFiles
from services.learner.supported import named
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.rl.entropy import TokenStatistics

logger = logging.getLogger(__name__)

CHECKPOINT_TAG = "state"

PACKING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats of mean difference that come from rounding alone; a token that is seen by another sequence,
or stands at another position, makes it a nat or so."""

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""As PACKING_TOLERANCE. A bfloat16 model rounds its own logits, and with a float32 head we do not:
0.017 nats with logits of up to 30."""


class ZeroModel:
    """The policy in DeepSpeed's hands, as `services.learner.training` wants it."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        ranks: Ranks,
        config: RunConfig,
        *,
        local_rank: int,
    ) -> None:
        """Hand the policy to DeepSpeed, in the process group that is already there.

        Args:
            reference: the frozen anchor, whole on every rank; with adapters it is not needed.
        """
        self._policy = policy
        self._reference = reference
        self._world_size = ranks.world_size
        self._zero_stage = config.learner.zero_stage
        self._engine = _initialise(policy, config, ranks.device, local_rank)
        probe = collate_sequences(_probe(policy.vocabulary_size)).to(ranks.device)
        try:
            self._check_head(probe, ranks)
        except ConfigError:
            self.leave()
            raise
        self._pack(probe, ranks)

    @property
    def cost(self) -> PassCost:
        """Of a pass, by the policy's dimensions."""
        return self._policy.cost

    def _check_head(self, probe: MicroBatch, ranks: Ranks) -> None:
        """Compare what is computed from hidden states with the model's own logits; ranks alike.

        Raises:
            ConfigError: the model does more to its logits than the product with its head, or the
                head's kernels cannot be compiled.
        """
        try:
            with torch.no_grad():
                ours = self.forward(probe, temperature=1.0).logprob
                with self._policy.own_logits():
                    own = self.forward(probe, temperature=1.0).logprob
        except AttributeError as error:
            raise ConfigError(
                f"{named(self._policy.model)}: it does not give hidden states and logits as"
                f" language models of Hugging Face do ({error}); choose another model.path"
            ) from error
        except TorchDynamoException as error:
            raise ConfigError(
                "learner.head_work: the head's kernels cannot be compiled"
                f' ({str(error).splitlines()[0]}); install a C++ compiler, or set it to "in_place"'
            ) from error
        difference = (ours - own).abs().mean()
        if _is_anywhere(not difference <= LOGIT_TOLERANCE[self._policy.dtype], ranks):
            raise ConfigError(
                f"{named(self._policy.model)}: its own log-probs differ from those of its last"
                f" hidden state times its head by {float(difference):.3g} nats on average, so"
                " it changes logits in a way that is not known here; choose another model.path"
            )

    def _pack(self, probe: MicroBatch, ranks: Ranks) -> None:
        """Pack rows if the model then computes the same; all ranks alike.

        A layer with a memory of its own, or an attention that has more to it than ours, would
        look across sequences or answer otherwise.
        """
        difference = self._packing_error(probe)
        if _is_anywhere(not difference <= PACKING_TOLERANCE[self._policy.dtype], ranks):
            self._policy.pack(False)
            logger.warning(
                "the model cannot be packed (log-probs differ by %.3g nats): each row of a"
                " micro-batch is padded to its longest",
                difference,
            )
        if self._reference is not None:
            self._reference.pack(self._policy.is_packed)

    def _packing_error(self, probe: MicroBatch) -> float:
        """Mean difference of log-probs between packed and padded rows; NaN if not packable."""
        with torch.no_grad():
            padded = self.forward(probe, temperature=1.0).logprob
            if not self._policy.pack(True):
                return math.nan
            packed = self.forward(probe, temperature=1.0).logprob
        return float((packed - padded).abs().mean())

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> TokenStatistics:
        """Statistics of the tokens, [N] each."""
        return read_statistics(
            self._engine,
            micro_batch,
            temperature=temperature,
            clamp_p=clamp_p,
            with_mean_pull=with_mean_pull,
        )

    def reference_logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
        """Log-probs [N] under the reference model, which with adapters is the one without."""
        if self._policy.adapters is not None:
            with torch.no_grad(), self._policy.adapters.off():
                return self.forward(micro_batch, temperature=temperature).logprob
        assert self._reference is not None, "there is no reference model"
        return read_statistics(self._reference, micro_batch, temperature=temperature).logprob

    def accumulate(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a gradient; ZeRO-2 and 3 exchange it at once, the others with the last."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        self._engine.backward(loss * self._world_size)

    def step(self) -> OptimizerStep:
        """Move the weights, unless the gradient is not finite."""
        rate = float(self._engine.get_lr()[0])
        if self._zero_stage > 0:
            # ZeRO looks at the norm itself, and drops a gradient that is not finite.
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return OptimizerStep(norm, rate, is_applied=bool(self._engine.was_step_applied()))
        gradients = [weight.grad for weight in self._policy.parameters() if weight.grad is not None]
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return OptimizerStep(norm, rate, is_applied=False)
        self._engine.step()
        return OptimizerStep(norm, rate, is_applied=True)

    def whole(self, weights: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
        """A context in which these weights are whole, on all ranks, which enter it together."""
        import deepspeed

        sharded = {id(weight): weight for weight in weights if hasattr(weight, "ds_id")}
        context: contextlib.AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            list(sharded.values())
        )
        return context

    def snapshot(self, client_state: dict[str, Any], *, copies: bool) -> Files:
        """This rank's files of model, optimiser, schedule and client_state; all ranks together.

        Args:
            copies: False gives the live tensors, to write before they move again.
        """
        nowhere, engine = Path("/nowhere"), self._engine
        kept, usual = HostFiles(nowhere, copies=copies), engine.checkpoint_engine
        engine.checkpoint_engine = kept
        try:
            engine.save_checkpoint(
                str(nowhere),
                tag=CHECKPOINT_TAG,
                client_state=client_state,
                save_latest=False,
                exclude_frozen_parameters=self._policy.adapters is not None,
            )
        finally:
            engine.checkpoint_engine = usual
        return kept.files

    def load(self, folder: Path, *, is_reshaped: bool) -> dict[str, Any]:
        """Read what a snapshot wrote; returns its client_state.

        Args:
            is_reshaped: it was of another number of ranks, and `reshaped` is at work.
        Raises:
            CheckpointError: missing or damaged.
        """
        self._engine._config.load_universal_checkpoint = is_reshaped
        tag = UNIVERSAL_TAG if is_reshaped else CHECKPOINT_TAG
        try:
            with _silence():
                path, client_state = self._engine.load_checkpoint(
                    str(folder), tag=tag, custom_load_fn=load_trained
                )
            if path is None:
                raise ValueError("DeepSpeed found no state in it")
        except UNREADABLE as error:
            raise unreadable(folder, error) from error
        state: dict[str, Any] = client_state
        return state

    def leave(self) -> None:
        """Leave the process group."""
        import deepspeed

        deepspeed.comm.destroy_process_group()


def _is_anywhere(claim: bool, ranks: Ranks) -> bool:
    """Whether it is true on any rank; all of them call it together."""
    count = torch.tensor(float(claim), device=ranks.device, dtype=torch.float64)
    ranks.sum_in_place(count)
    return float(count) > 0


def _probe(vocabulary_size: int) -> list[Tensor]:
    """Sequences of a few tokens each, all of them unlike each other."""
    tokens = torch.arange(33) * 7 % vocabulary_size
    return [tokens[:16], tokens[16:21], tokens[21:]]


def _initialise(policy: Policy, config: RunConfig, device: torch.device, local_rank: int) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(local_rank)
    import deepspeed

    # DeepSpeed 0.19 calls names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory collective would be compiled at first use, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    with _silence():
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=_optimizer(policy, config),
            lr_scheduler=lambda wrapped: _scheduler(wrapped, config),
            config=_deepspeed_config(config),
        )
    if config.learner.zero_stage == 3:
        deepspeed.zero.register_external_parameter(policy.head, policy.head_weight)
    # It would copy two scripts to the disk while training waits for a snapshot.
    engine._copy_recovery_script = lambda folder: None
    return engine


def _optimizer(policy: Policy, config: RunConfig) -> torch.optim.Optimizer:
    learner = config.learner
    return torch.optim.AdamW(
        [weight for weight in policy.parameters() if weight.requires_grad],
        lr=learner.learning_rate,
        betas=(learner.adam_beta1, learner.adam_beta2),
        weight_decay=learner.weight_decay,
        # One pass over the host's memory instead of many, and unlike DeepSpeed's own AdamW for the
        # host it is compiled already.
        fused=learner.offload == "cpu",
    )


def _scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    learner = config.learner
    total_steps = config.run.num_steps * learner.optimizer_steps_per_batch

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, learner.lr_warmup_steps))
        falling = 1.0 - step / total_steps if learner.lr_schedule == "linear" else 1.0
        return rising * max(0.0, falling)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _silence() -> contextlib.AbstractContextManager[object]:
    """Drop DeepSpeed's bare prints; its logger keeps the stream that it was made with."""
    return contextlib.redirect_stdout(io.StringIO())


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        # The engine is driven micro-batch by micro-batch; these two only have to be consistent.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "communication_data_type": "fp32",
    }
    if config.model.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if learner.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
