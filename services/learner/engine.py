"""The learner's engine: what rank 0 is called for, and what the other ranks do at its command.

Every rank runs a `LearnerEngine`. Rank 0 is called by the learner's loop; the others sit in
`follow`, where each command of rank 0 makes them do their part. `services.learner.zero` has the
policy on DeepSpeed.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.learner.batch import collate_sequences
from services.learner.measures import StepReport
from services.learner.parts import UNREADABLE, check_parts, unreadable, write_parts
from services.learner.policy import Policy, export_policy
from services.learner.policy_weights import PolicyWeights
from services.learner.ranks import Command, Opcode, Ranks
from services.learner.training import Trainer
from services.learner.zero import CHECKPOINT_TAG, ZeroModel
from shared.buckets import Manifest
from shared.codec import (
    decode_scored_group,
    encode_scored_group,
    pack_token_ids,
    unpack_token_ids,
)
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
        return self._weights.manifest()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of `manifest`, in its order, whole, on this rank's device.

        A tensor is the live weight or a copy: read it before the next call of `train`. Under
        ZeRO-3 the ranks gather them a bucket at a time; stopping early is allowed.
        """
        named = self._weights.named()
        if self._config.learner.zero_stage < 3:
            yield from ((name, weight.detach()) for name, weight in named)
            return
        for bucket in self._weights.buckets(self._config.weights.bucket_mib * 2**20):
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
        write_parts(folder, folder / CHECKPOINT_TAG, self._layout())

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote; call it on a fresh engine.

        Raises:
            CheckpointError: missing, damaged, or of another number of ranks or ZeRO stage.
        """
        check_parts(folder, self._layout())
        self._ranks.send(Command(Opcode.LOAD, payload=str(folder).encode()))
        self._load(folder)

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face form, with its tokenizer."""
        weights = {name: weight.cpu() for name, weight in self.weights()}
        export_policy(self._policy, weights, self._model_path, folder)

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
        token_ids = torch.tensor(unpack_token_ids(payload), dtype=torch.int64)
        sequence = collate_sequences([token_ids]).to(self._ranks.device)
        with torch.no_grad():
            scores: list[float] = self._model.forward(sequence, temperature=1.0).logprob.tolist()
        return scores

    def _gather(self, bucket: range) -> list[Tensor]:
        """Copies of these weights, whole, on rank 0; all ranks call it together."""
        weights = [weight for _, weight in self._weights.named()[bucket.start : bucket.stop]]
        return self._model.gather(weights, wanted=self.rank == 0)

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
        self._model.save(folder, client_state)

    def _load(self, folder: Path) -> None:
        client_state = self._model.load(folder)
        try:
            torch.set_rng_state(client_state["rng"])
            self._trainer.coefficient.load_state_dict(client_state["controller"])
        except UNREADABLE as error:
            raise unreadable(folder, error) from error

    def _leave(self) -> None:
        self._is_open = False
        self._model.leave()


def _load_policy(config: RunConfig, model_path: str) -> Policy:
    return Policy.load(
        model_path,
        dtype=getattr(torch, config.model.dtype),
        chunk=config.learner.logit_chunk_tokens,
    )


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
