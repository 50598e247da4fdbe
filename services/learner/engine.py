"""The learner's engine: what rank 0 is called for, and what the other ranks do at its command.

Every rank runs a `LearnerEngine`. Rank 0 is called by the learner's loop; the others sit in
`follow`, where each command of rank 0 makes them do their part. `services.learner.zero` has the
policy on DeepSpeed.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.learner.balance import rows_by_rank
from services.learner.batch import Batch, build_batch, collate_sequences
from services.learner.hugging_face import export_policy, replaced_model
from services.learner.measures import StepReport
from services.learner.parts import UNREADABLE, check_parts, unreadable
from services.learner.policy import Policy, load_policy
from services.learner.policy_weights import PolicyWeights
from services.learner.prepared import Prepared
from services.learner.ranks import Command, Opcode, Ranks, reason_of
from services.learner.reshape import reshaped
from services.learner.shares import pack_rows, pack_tokens, take_share, unpack_rows
from services.learner.snapshot import Snapshot, Writing
from services.learner.training import Trainer
from services.learner.zero import CHECKPOINT_TAG, ZeroModel
from shared.buckets import Manifest
from shared.codec import pack_token_ids, unpack_token_ids
from shared.config import Environment, RunConfig
from shared.errors import EngineError
from shared.records import ScoredGroup


class LearnerEngine:
    """The policy, its optimiser and its entropy controller, over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        policy: Policy,
        model: ZeroModel,
        ranks: Ranks,
    ) -> None:
        """Use `start`."""
        self._config = config
        self._model_path = model_path
        self._policy = policy
        self._weights = PolicyWeights(policy)
        self._model = model
        self._ranks = ranks
        self._trainer = Trainer(config, model, ranks)
        self._writing = Writing()
        self._is_open = True

    @classmethod
    def start(cls, config: RunConfig, model_path: str, environment: Environment) -> LearnerEngine:
        """Join the ranks, load the model, set up DeepSpeed.

        Raises:
            ConfigError: the ranks have no common address, or the model is unsupported.
            StartError: there is no such model.
        """
        torch.set_num_threads(config.learner.threads)
        policy = load_policy(config, model_path)
        if config.learner.lora is not None:
            policy.add_adapters(config.learner.lora, seed=config.run.seed)
        ranks = Ranks.join(environment)
        reference = None
        if config.reference_kl.coef > 0 and policy.adapters is None:
            reference = load_policy(config, model_path).requires_grad_(False).to(ranks.device)
        if config.learner.activation_checkpointing:
            policy.checkpoint_activations(is_reentrant=config.learner.zero_stage == 3)
        model = ZeroModel(policy, reference, ranks, config, local_rank=environment.local_rank)
        return cls(config, model_path, policy, model, ranks)

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
        return self.train_prepared(self.prepare(groups, policy_version), step=step)

    def prepare(self, groups: Sequence[ScoredGroup], policy_version: int) -> Prepared:
        """A batch for `train_prepared`; may be called while the engine does something else.

        Args:
            groups, policy_version: as `train`.
        """
        batch = build_batch(groups, self._config, policy_version=policy_version)
        plans = self._trainer.plan(batch)
        if self._ranks.world_size == 1:
            return Prepared(batch, plans, b"", ())
        others = rows_by_rank(plans, self._ranks.world_size)[1:]
        tokens = tuple(pack_tokens(batch, rows) for rows in others)
        return Prepared(batch, plans, pack_rows(batch), tokens)

    def train_prepared(self, prepared: Prepared, *, step: int) -> StepReport:
        """As `train`, on what `prepare` gave."""
        with self._failures():
            self._ranks.send(Command(Opcode.TRAIN, step, payload=prepared.rows))
            self._ranks.hand_out(prepared.tokens)
            return self._trainer.train_batch(prepared.batch, prepared.plans, step=step)

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
        return self._weights.manifest()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of `manifest`, in its order, whole, on this rank's device.

        A tensor is the live weight or a copy: read it before the next call of `train`. Under
        ZeRO-3 the ranks gather them a bucket at a time; stopping early is allowed.
        """
        if self._config.learner.zero_stage < 3:
            yield from self._read(range(len(self._weights.published())))
            return
        for bucket in self._weights.buckets(self._config.weights.bucket_mib * 2**20):
            yield from self._read(bucket)

    def _read(self, numbers: range) -> Iterator[tuple[str, Tensor]]:
        """These of all weights, as `weights`."""
        chosen = self._weights.all()[numbers.start : numbers.stop]
        if self._config.learner.zero_stage < 3:
            yield from ((each.name, self._weights.value(each)) for each in chosen)
            return
        with self._failures():
            self._ranks.send(Command(Opcode.GATHER, numbers.start, numbers.stop))
            gathered = self._gather(numbers)
        yield from zip((each.name for each in chosen), gathered, strict=True)

    def snapshot(self, *, copies: bool) -> Snapshot:
        """Everything that `load` needs to go on as if nothing had happened, as it is now.

        Let one go before the next is taken.

        Args:
            copies: True copies it to the host's memory, so that it can be written while the
                engine trains; False needs no memory, and no call before it is written.
        Raises:
            EngineError: another rank is gone.
        """
        with self._failures():
            self._ranks.send(Command(Opcode.SNAPSHOT, int(copies)))
            return self._snapshot(copies=copies)

    def load(self, folder: Path) -> None:
        """Continue from what a snapshot wrote, of any number of ranks; for a fresh engine.

        Raises:
            CheckpointError: missing, damaged, or of another ZeRO stage.
        """
        zero_stage, num_ranks = self._config.learner.zero_stage, self._ranks.world_size
        is_reshaped = check_parts(folder, zero_stage=zero_stage) != num_ranks and zero_stage > 0
        with reshaped(folder, CHECKPOINT_TAG) if is_reshaped else contextlib.nullcontext():
            self._ranks.send(Command(Opcode.LOAD, is_reshaped, payload=str(folder).encode()))
            self._load(folder, is_reshaped=is_reshaped)

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face form, with its tokenizer; whole, or not at all.

        Adapters are in it, and stand once more in `adapter`, in peft's form.

        Args:
            folder: what is there already is replaced in the end.
        Raises:
            CheckpointError: the disk refused; what was there stays.
            EngineError: as `train`.
        """
        weights = {name: weight.cpu() for name, weight in self.weights()}
        adapters = None
        if self._policy.adapters is not None:
            count = len(self._weights.published())
            numbers = range(count, count + len(self._weights.adapters()))
            adapters = {name: weight.cpu() for name, weight in self._read(numbers)}
        with replaced_model(folder) as new:
            export_policy(self._policy, weights, self._model_path, new, adapters=adapters)

    def follow(self) -> None:
        """Obey rank 0 until it closes; for every other rank.

        Consumes: rank 0's commands. Waits for: the next one, up to COMMAND_TIMEOUT. Unblocked
        by: rank 0's calls. Stops when: rank 0 calls `close`.

        Raises:
            EngineError: rank 0 is gone, or a command failed here.
        """
        assert self.rank > 0, "rank 0 gives the commands"
        handlers: dict[Opcode, Callable[[Command], object]] = {
            Opcode.TRAIN: lambda command: self._follow_training(
                unpack_rows(command.payload), step=command.first
            ),
            Opcode.SCORE: lambda command: self._score(command.payload),
            Opcode.GATHER: lambda command: self._gather(range(command.first, command.second)),
            Opcode.SNAPSHOT: lambda command: self._follow_snapshot(copies=bool(command.first)),
            Opcode.LOAD: lambda command: self._load(
                Path(command.payload.decode()), is_reshaped=bool(command.first)
            ),
            Opcode.WAIT: lambda command: None,
        }
        with self._failures():
            while (command := self._ranks.receive()).opcode is not Opcode.CLOSE:
                handlers[command.opcode](command)
        self._leave()

    def reassure(self) -> None:
        """Tell the other ranks that this one is there, which only waits.

        Raises:
            EngineError: another rank is gone.
        """
        with self._failures():
            self._ranks.send(Command(Opcode.WAIT))

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
            raise EngineError(f"rank {self.rank} cannot go on: {reason_of(error)}") from error

    def _follow_training(self, batch: Batch, *, step: int) -> None:
        plans = self._trainer.plan(batch)
        mine = rows_by_rank(plans, self._ranks.world_size)[self.rank]
        self._trainer.train_batch(take_share(batch, mine, self._ranks), plans, step=step)

    def _score(self, payload: bytes) -> list[float]:
        token_ids = torch.tensor(unpack_token_ids(payload), dtype=torch.int64)
        sequence = collate_sequences([token_ids]).to(self._ranks.device)
        with torch.no_grad():
            scores: list[float] = self._model.forward(sequence, temperature=1.0).logprob.tolist()
        return scores

    def _gather(self, bucket: range) -> list[Tensor]:
        """Copies of these weights, whole, on rank 0; all ranks call it together."""
        weights = self._weights.all()[bucket.start : bucket.stop]
        sources = [each for weight in weights for each in self._weights.sources(weight)]
        with self._model.whole(sources):
            if self.rank > 0:
                return []
            return [self._weights.value(weight).clone() for weight in weights]

    def _snapshot(self, *, copies: bool) -> Snapshot:
        client_state = {
            "controller": self._trainer.coefficient.state_dict(),
            "rng": torch.get_rng_state(),
        }
        files = self._model.snapshot(client_state, copies=copies)
        zero_stage, num_ranks = self._config.learner.zero_stage, self._ranks.world_size
        return Snapshot(files, self._ranks, {"num_ranks": num_ranks, "zero_stage": zero_stage})

    def _follow_snapshot(self, *, copies: bool) -> None:
        self._writing.end()  # soon: rank 0 has heard from it
        self._writing.begin(self._snapshot(copies=copies).follow)
        if not copies:
            self._writing.end()

    def _load(self, folder: Path, *, is_reshaped: bool) -> None:
        client_state = self._model.load(folder, is_reshaped=is_reshaped)
        try:
            torch.set_rng_state(client_state["rng"])
            self._trainer.coefficient.load_state_dict(client_state["controller"])
        except UNREADABLE as error:
            raise unreadable(folder, error) from error

    def _leave(self) -> None:
        self._is_open = False
        self._writing.end()
        self._model.leave()
