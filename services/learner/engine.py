"""The learner's engine: the policy on DeepSpeed, and the only file that imports it.

Every rank runs a `LearnerEngine`. Rank 0 is called by the learner's loop; the others sit in
`follow`, where each command of rank 0 makes them do their part.

DeepSpeed is imported where it is used: `DS_ACCELERATOR` must be decided before.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from services.learner.batch import MicroBatch
from services.learner.measures import StepReport
from services.learner.passes import OptimizerStep
from services.learner.policy import Policy, statistics
from services.learner.ranks import Command, Opcode, Ranks
from services.learner.training import Trainer
from shared.buckets import Manifest, ParameterSpec
from shared.codec import (
    decode_scored_group,
    encode_scored_group,
    pack_token_ids,
    unpack_token_ids,
)
from shared.config import Environment, RunConfig
from shared.errors import CheckpointError, EngineError
from shared.records import ScoredGroup
from shared.rl.entropy import TokenStatistics

CHECKPOINT_TAG = "state"
PARTS_FILE = "parts.json"

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    pickle.UnpicklingError,
)
"""What DeepSpeed and torch raise over a damaged checkpoint."""


class LearnerEngine:
    """The policy, its optimiser and its entropy controller, over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        policy: Policy,
        reference: Policy | None,
        engine: Any,
        ranks: Ranks,
    ) -> None:
        """Use `start`."""
        self._config = config
        self._model_path = model_path
        self._policy = policy
        self._engine = engine
        self._ranks = ranks
        self._is_sharded = config.learner.zero_stage == 3
        model = DeepSpeedModel(
            policy, reference, engine, ranks, zero_stage=config.learner.zero_stage
        )
        self._trainer = Trainer(config, model, ranks)
        self._is_open = True

    @classmethod
    def start(cls, config: RunConfig, model_path: str, environment: Environment) -> LearnerEngine:
        """Join the ranks, load the model, set up DeepSpeed.

        Raises:
            ConfigError: the ranks have no common address, or the model's head is unsupported.
            StartError: there is no such model.
        """
        torch.set_num_threads(config.learner.threads)
        policy = _load_policy(config, model_path)
        ranks = Ranks.join(environment)
        reference = None
        if config.reference_kl.coef > 0:
            reference = _load_policy(config, model_path).requires_grad_(False).to(ranks.device)
        engine = _initialise(policy, config, ranks.device, environment.local_rank)
        return cls(config, model_path, policy, reference, engine, ranks)

    @property
    def rank(self) -> int:
        """Of this process; 0 is the one to call, the others `follow`."""
        return self._ranks.rank

    def train(self, groups: Sequence[ScoredGroup], *, step: int, policy_version: int) -> StepReport:
        """One step on a batch; the weights and the entropy controller move.

        An optimiser mini-batch whose loss or gradient is not finite on any rank changes
        nothing and is counted. A batch without a usable completion trains nothing.

        Args:
            groups: in an order that a resumed run repeats.
            step: number of the step, part of the seed of the token selection.
            policy_version: of the current weights, from which staleness is counted.
        Raises:
            EngineError: another rank is gone, or the device failed.
        """
        with self._failures():
            self._ranks.send(Command(Opcode.TRAIN, step, policy_version, _frame(groups)))
            return self._trainer.train(groups, step=step, policy_version=policy_version)

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob, at temperature 1, of each token but the first under the current weights.

        Raises:
            ValueError: fewer than two tokens.
            EngineError: as `train`.
        """
        if len(token_ids) < 2:
            raise ValueError(f"{len(token_ids)} tokens: the first is given, one more is needed")
        payload = pack_token_ids(array("I", token_ids))
        with self._failures():
            self._ranks.send(Command(Opcode.SCORE, payload=payload))
            return self._score(payload)

    def manifest(self) -> Manifest:
        """Every weight, as a Hugging Face checkpoint has them: tied ones once."""
        return tuple(
            ParameterSpec(name, str(weight.dtype).removeprefix("torch."), tuple(_shape(weight)))
            for name, weight in self._named_weights()
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of `manifest`, in its order, whole, on this rank's device.

        A tensor is the live weight or a copy: read it before the next call of `train`. Under
        ZeRO-3 the ranks gather them a bucket at a time; stopping early is allowed.
        """
        named = self._named_weights()
        if not self._is_sharded:
            yield from ((name, weight.detach()) for name, weight in named)
            return
        for bucket in self._buckets(named):
            with self._failures():
                self._ranks.send(Command(Opcode.GATHER, bucket.start, bucket.stop))
                gathered = self._gather(bucket)
            yield from zip((named[i][0] for i in bucket), gathered, strict=True)
            del gathered  # before the next are gathered

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs to go on as if nothing had happened."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._failures():
            self._ranks.send(Command(Opcode.SAVE, payload=str(folder).encode()))
            self._save(folder)
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted((folder / CHECKPOINT_TAG).rglob("*"))
            if path.is_file()
        }
        described = {**self._layout(), "files": sizes}
        (folder / PARTS_FILE).write_text(json.dumps(described, indent=1), "utf8")

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote; call it on a fresh engine.

        Raises:
            CheckpointError: missing, damaged, or of another number of ranks or ZeRO stage.
        """
        _check_parts(folder, self._layout())
        self._ranks.send(Command(Opcode.LOAD, payload=str(folder).encode()))
        self._load(folder)

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face form, with its tokenizer."""
        weights = {name: weight.cpu() for name, weight in self.weights()}
        self._policy.model.save_pretrained(folder, state_dict=weights)
        _copy_tokenizer(self._model_path, folder)

    def follow(self) -> None:
        """Obey rank 0 until it closes; for every other rank.

        Consumes: rank 0's commands. Waits for: the next one, up to COMMAND_TIMEOUT. Unblocked
        by: rank 0's calls. Stops when: rank 0 calls `close`.

        Raises:
            EngineError: rank 0 is gone, or a command failed here.
        """
        assert self.rank > 0, "rank 0 gives the commands"
        handlers: dict[Opcode, Callable[[Command], object]] = {
            Opcode.TRAIN: lambda command: self._trainer.train(
                _unframe(command.payload), step=command.first, policy_version=command.second
            ),
            Opcode.SCORE: lambda command: self._score(command.payload),
            Opcode.GATHER: lambda command: self._gather(range(command.first, command.second)),
            Opcode.SAVE: lambda command: self._save(Path(command.payload.decode())),
            Opcode.LOAD: lambda command: self._load(Path(command.payload.decode())),
        }
        with self._failures():
            while (command := self._ranks.receive()).opcode is not Opcode.CLOSE:
                handlers[command.opcode](command)
        self._leave()

    def close(self) -> None:
        """Release the other ranks and leave the process group; twice is once."""
        if not self._is_open:
            return
        # A rank that is gone needs no release.
        with contextlib.suppress(RuntimeError):
            self._ranks.send(Command(Opcode.CLOSE))
        self._leave()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Give what torch and DeepSpeed raise its place in our tree."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise EngineError(f"rank {self.rank} cannot go on: {reason}") from error

    def _score(self, payload: bytes) -> list[float]:
        device = self._ranks.device
        token_ids = torch.tensor(unpack_token_ids(payload), dtype=torch.int64, device=device)
        with torch.no_grad():
            logprobs, _ = self._engine(
                token_ids.unsqueeze(0),
                torch.arange(len(token_ids) - 1, device=device),
                token_ids[1:],
                temperature=1.0,
            )
        scores: list[float] = logprobs.tolist()
        return scores

    def _named_weights(self) -> list[tuple[str, Tensor]]:
        """Parameters once each, tied ones under their first name, and persistent buffers."""
        model = self._policy.model
        named: list[tuple[str, Tensor]] = list(model.named_parameters())
        kept = set(model.state_dict(keep_vars=True))
        return named + [(name, each) for name, each in model.named_buffers() if name in kept]

    def _buckets(self, named: Sequence[tuple[str, Tensor]]) -> Iterator[range]:
        """Runs of weights of about `weights.bucket_mib` each."""
        limit, start, size = self._config.weights.bucket_mib * 2**20, 0, 0
        for stop, (_, weight) in enumerate(named):
            weight_bytes = math.prod(_shape(weight)) * weight.element_size()
            if stop > start and size + weight_bytes > limit:
                yield range(start, stop)
                start, size = stop, 0
            size += weight_bytes
        yield range(start, len(named))

    def _gather(self, bucket: range) -> list[Tensor]:
        """Copies of these weights, whole, on rank 0; all ranks call it together."""
        import deepspeed

        weights = [weight for _, weight in self._named_weights()[bucket.start : bucket.stop]]
        sharded = [weight for weight in weights if hasattr(weight, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded):
            return [weight.detach().clone() for weight in weights] if self.rank == 0 else []

    def _layout(self) -> dict[str, int]:
        """What a checkpoint must agree with."""
        return {
            "num_ranks": self._ranks.world_size,
            "zero_stage": self._config.learner.zero_stage,
        }

    def _save(self, folder: Path) -> None:
        client_state = {
            "controller": self._trainer.coefficient.state_dict(),
            "rng": torch.get_rng_state(),
        }
        self._engine.save_checkpoint(
            str(folder), tag=CHECKPOINT_TAG, client_state=client_state, save_latest=False
        )

    def _load(self, folder: Path) -> None:
        try:
            with _silence():
                path, client_state = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
            if path is None:
                raise ValueError("DeepSpeed found no state in it")
            torch.set_rng_state(client_state["rng"])
            self._trainer.coefficient.load_state_dict(client_state["controller"])
        except UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{folder}: the checkpoint cannot be read ({reason}); use an older one"
            ) from error

    def _leave(self) -> None:
        import deepspeed

        self._is_open = False
        deepspeed.comm.destroy_process_group()


class DeepSpeedModel:
    """The policy in DeepSpeed's hands, as `services.learner.training` wants it."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        engine: Any,
        ranks: Ranks,
        *,
        zero_stage: int,
    ) -> None:
        """Wrap what `deepspeed.initialize` returned; the reference is whole on every rank."""
        self._policy = policy
        self._reference = reference
        self._engine = engine
        self._world_size = ranks.world_size
        self._zero_stage = zero_stage

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> TokenStatistics:
        """Statistics of the tokens, [N] each."""
        outputs = self._engine(
            micro_batch.input_ids,
            micro_batch.predictors,
            micro_batch.targets,
            temperature=temperature,
            clamp_p=clamp_p,
            with_mean_pull=with_mean_pull,
        )
        return statistics(outputs, is_clamped=clamp_p is not None)

    def reference_logprobs(self, micro_batch: MicroBatch, *, temperature: float) -> Tensor:
        """Log-probs [N] under the reference model."""
        assert self._reference is not None, "there is no reference model"
        outputs: tuple[Tensor, ...] = self._reference(
            micro_batch.input_ids,
            micro_batch.predictors,
            micro_batch.targets,
            temperature=temperature,
        )
        return outputs[0]

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


def _load_policy(config: RunConfig, model_path: str) -> Policy:
    return Policy.load(
        model_path,
        dtype=getattr(torch, config.model.dtype),
        chunk=config.learner.logit_chunk_tokens,
    )


def _initialise(policy: Policy, config: RunConfig, device: torch.device, local_rank: int) -> Any:
    """DeepSpeed around the policy, in the process group that is already there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(local_rank)
    import deepspeed

    # DeepSpeed 0.19 calls names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory collective would be compiled at first use, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    learner = config.learner
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=learner.learning_rate,
        betas=(learner.adam_beta1, learner.adam_beta2),
        weight_decay=learner.weight_decay,
    )

    total_steps = config.run.num_steps * learner.optimizer_steps_per_batch

    def schedule(step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, learner.lr_warmup_steps))
        falling = 1.0 - step / total_steps if learner.lr_schedule == "linear" else 1.0
        return rising * max(0.0, falling)

    with _silence():
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, schedule),
            config=_deepspeed_config(config),
        )
    if learner.zero_stage == 3:
        deepspeed.zero.register_external_parameter(policy.head, policy.head_weight)
    return engine


def _silence() -> contextlib.AbstractContextManager[object]:
    """Drop DeepSpeed's bare prints; its logger keeps the stream that it was made with."""
    return contextlib.redirect_stdout(io.StringIO())


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    learner = config.learner
    settings: dict[str, Any] = {
        # The engine is driven micro-batch by micro-batch; these two only have to be consistent.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": {"stage": learner.zero_stage},
        "steps_per_print": 2**31,
        "communication_data_type": "fp32",
    }
    if config.model.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if learner.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _shape(weight: Tensor) -> Sequence[int]:
    """Of the whole weight, also where ZeRO-3 left a rank only a part of it."""
    shape: Sequence[int] = getattr(weight, "ds_shape", weight.shape)
    return shape


def _frame(groups: Sequence[ScoredGroup]) -> bytes:
    """Each group's bytes after their length."""
    encoded = [encode_scored_group(group) for group in groups]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def _unframe(payload: bytes) -> list[ScoredGroup]:
    groups, start = [], 0
    while start < len(payload):
        (size,) = struct.unpack_from("<I", payload, start)
        groups.append(decode_scored_group(payload[start + 4 : start + 4 + size]))
        start += 4 + size
    return groups


def _check_parts(folder: Path, layout: dict[str, int]) -> None:
    """Compare a checkpoint with the list of its files.

    Raises:
        CheckpointError: a file is missing or of another size, or it is of another layout.
    """
    try:
        described = json.loads((folder / PARTS_FILE).read_text("utf8"))
        sizes: dict[str, int] = described.pop("files")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / PARTS_FILE}: missing or damaged ({error}); this is no complete checkpoint"
        ) from None
    for key, value in layout.items():
        if described.get(key) != value:
            raise CheckpointError(
                f"{folder}: written with {key} = {described.get(key)}, this run has {value};"
                " resume with the same"
            )
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long, not {size}"
            raise CheckpointError(f"{path}: {state}; the checkpoint is damaged, use an older one")


def _copy_tokenizer(model_path: str, folder: Path) -> None:
    source = Path(model_path)
    if not source.is_dir():
        AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
        return
    for path in source.iterdir():
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        is_index = path.name.endswith(".index.json")
        if path.is_file() and not (is_weights or is_index or (folder / path.name).exists()):
            shutil.copyfile(path, folder / path.name)
