"""A causal language model of Hugging Face form, as the learner needs it: log-probs, not logits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from services.learner.balance import PassCost
from services.learner.batch import MicroBatch
from services.learner.lora import Adapters
from services.learner.packing import PACKED, Packing
from services.learner.supported import head_weight, pass_cost
from shared.config import RunConfig
from shared.config.learner import LoraConfig
from shared.errors import ConfigError, StartError
from shared.rl.entropy import TokenStatistics, fused_logprob_entropy


class FusedHead(nn.Module):
    """The output embedding, applied chunk by chunk; it owns no weight.

    Under ZeRO-3 the weight is registered as an external parameter of this module: it is whole
    while this forward (and its recomputation in the backward pass) runs, and at no other time.
    """

    def __init__(
        self, chunk: int, product_dtype: torch.dtype | None, is_compiled: bool | None
    ) -> None:
        super().__init__()
        self._chunk = chunk
        self._product_dtype = product_dtype
        self._is_compiled = is_compiled

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        clamp_p: float | None,
        with_mean_pull: bool,
    ) -> tuple[Tensor, ...]:
        """As `Policy.forward`, from the hidden states [N, D] of the predicting positions."""
        statistics = fused_logprob_entropy(
            hidden,
            weight,
            targets,
            temperature=temperature,
            clamp_p=clamp_p,
            chunk=self._chunk,
            with_mean_pull=with_mean_pull,
            product_dtype=self._product_dtype,
            is_compiled=self._is_compiled,
        )
        return tuple(each for each in statistics if each is not None)


class Policy(nn.Module):
    """The language model and the head that reads token statistics off its hidden states.

    Parameters are named `model.<Hugging Face name>`; a tied head is the embedding itself.
    """

    def __init__(
        self,
        model: Any,
        *,
        chunk: int,
        product_dtype: torch.dtype | None = None,
        is_compiled: bool | None = None,
    ) -> None:
        """Wrap a causal language model.

        Args:
            chunk: tokens whose logits exist at a time.
            product_dtype: of the products with the head's weight; that of the model if None.
            is_compiled: as in `fused_logprob_entropy`.
        Raises:
            ConfigError: the model does more to its logits than a product with a weight.
        """
        super().__init__()
        self.model = model
        self.head = FusedHead(chunk, product_dtype, is_compiled)
        # In a tuple, because as an attribute it would be registered as a parameter twice; and
        # not looked up in forward, where ZeRO-3 gathers every parameter that is looked at.
        self._head_weight = (head_weight(model),)
        # Counted here, because ZeRO-3 leaves a rank only a part of each weight.
        self._cost = pass_cost(model, self.head_weight)
        self._own_attention = model.config._attn_implementation
        self._is_packed = False
        self._takes_own_logits = False
        self.adapters: Adapters | None = None
        # Dropout would make the ratio of two passes differ from 1 without any update.
        self.eval()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        chunk: int,
        product_dtype: torch.dtype | None = None,
        is_compiled: bool | None = None,
    ) -> Policy:
        """From a local folder or a hub name; the rest as the constructor.

        Raises:
            StartError: there is no such model, or it cannot be read.
            ConfigError: as the constructor.
        """
        # A progress bar in a service's log is noise.
        disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StartError(f"model.path = {path}: cannot be loaded ({reason})") from None
        return cls(model, chunk=chunk, product_dtype=product_dtype, is_compiled=is_compiled)

    def add_adapters(self, lora: LoraConfig, *, seed: int) -> None:
        """Train adapters instead of the weights, and keep only them in a state dict.

        Raises:
            ConfigError: as `Adapters`.
        """
        self.adapters = Adapters(self.model, lora, seed=seed)
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.eval()

    @property
    def cost(self) -> PassCost:
        """Of a pass as it is made now."""
        return self._cost._replace(is_padded=not self._is_packed)

    @property
    def is_packed(self) -> bool:
        """Whether sequences are computed one after another in a row, without padding."""
        return self._is_packed

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.head_weight.dtype

    def pack(self, is_packed: bool) -> bool:
        """Compute sequences one after another in a row, or each in a padded row of its own.

        Returns:
            Whether it is so now: attention of some models cannot be replaced.
        """
        wanted = PACKED if is_packed else self._own_attention
        try:
            self.model.set_attn_implementation(wanted)
        except ValueError:
            return False
        if self.model.config._attn_implementation != wanted:
            return False
        self._is_packed = is_packed
        return True

    @contextlib.contextmanager
    def own_logits(self) -> Iterator[None]:
        """Within it a pass is the model's own, logits and all, at temperature 1 and padded."""
        self._takes_own_logits = True
        try:
            yield
        finally:
            self._takes_own_logits = False

    def checkpoint_activations(self, *, is_reentrant: bool) -> None:
        """Keep what goes from layer to layer, and compute the rest again in the backward pass.

        Args:
            is_reentrant: as torch.utils.checkpoint; ZeRO-3 needs it, because the weights that a
                pass meets are gone in between.
        Raises:
            ConfigError: the model does not support it, or has dropout.
        """
        key = "learner.activation_checkpointing = true"
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"{key}: a {type(self.model).__name__} does not support it; remove it"
            )
        for name, share in self.model.config.get_text_config().to_dict().items():
            if "drop" in name and isinstance(share, float) and share > 0:
                raise ConfigError(
                    f"{key}: the model's {name} = {share} would be on in training; set it to 0 in"
                    " its config.json, or remove the key"
                )
        # torch says so of every pass without gradient, too.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        self.model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        if self.adapters is not None and is_reentrant:
            # Or no gradient enters a layer that is computed again: the embedding is frozen.
            self.model.enable_input_require_grads()
        for layer in self.model.modules():
            # A layer looks at its own flag; what is inside it stays as it is.
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the embedding's own where they are tied."""
        return self._head_weight[0]

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        predictors: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        clamp_p: float | None = None,
        with_mean_pull: bool = False,
    ) -> tuple[Tensor, ...]:
        """The fields of TokenStatistics that are there, in their order, each [N].

        A plain tuple, because DeepSpeed looks for the tensors in it; `read_statistics` names them.

        Args:
            input_ids: [T], sequences one after another.
            packing: where they lie.
            predictors: [N], positions in [T].
            targets: [N], the token that follows each of them.
            clamp_p: as `shared.rl.entropy.clamped_entropy`; None leaves out the clamped entropy
                and the removed mass.
            with_mean_pull: whether `mean_pull` is there.
        """
        if self._takes_own_logits:
            return self._own_statistics(input_ids, packing, predictors, targets)
        hidden = self._hidden(input_ids, packing).index_select(0, predictors)
        outputs: tuple[Tensor, ...] = self.head(
            hidden, self.head_weight, targets, temperature, clamp_p, with_mean_pull
        )
        return outputs

    def _own_statistics(
        self, input_ids: Tensor, packing: Packing, predictors: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens, places = packing.padded()
        logits: Tensor = self.model(input_ids=input_ids[tokens], use_cache=False).logits
        rows = logits.flatten(0, 1).index_select(0, places.index_select(0, predictors))
        logprobs = rows.float().log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies

    def _hidden(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """Hidden states [T, D]."""
        if self._is_packed:
            packed = self.model.base_model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=packing.position_ids.unsqueeze(0),
                packing=packing,
                use_cache=False,
            )
            row: Tensor = packed.last_hidden_state[0]
            return row
        tokens, places = packing.padded()
        padded = self.model.base_model(input_ids=input_ids[tokens], use_cache=False)
        rows: Tensor = padded.last_hidden_state
        return rows.flatten(0, 1).index_select(0, places)


def load_policy(config: RunConfig, model_path: str) -> Policy:
    """As the run wants it, without adapters.

    Raises:
        StartError: as `Policy.load`.
        ConfigError: as `Policy.load`.
    """
    return Policy.load(
        model_path,
        dtype=getattr(torch, config.model.dtype),
        chunk=config.learner.logit_chunk_tokens,
        product_dtype=torch.float32 if config.learner.head_dtype == "float32" else None,
        is_compiled={"auto": None, "in_place": False, "compiled": True}[config.learner.head_work],
    )


def read_statistics(
    policy: Callable[..., Sequence[Tensor]],
    micro_batch: MicroBatch,
    *,
    temperature: float,
    clamp_p: float | None = None,
    with_mean_pull: bool = False,
) -> TokenStatistics:
    """Of a micro-batch's tokens, [N] each, by a `Policy` or what wraps one."""
    logprob, entropy, *rest = policy(
        micro_batch.input_ids,
        micro_batch.packing,
        micro_batch.predictors,
        micro_batch.targets,
        temperature=temperature,
        clamp_p=clamp_p,
        with_mean_pull=with_mean_pull,
    )
    clamped, removed = (None, None) if clamp_p is None else (rest.pop(0), rest.pop(0))
    return TokenStatistics(logprob, entropy, clamped, removed, rest[0] if rest else None)


def _drop_frozen(
    policy: Policy, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    # DeepSpeed's own way leaves a frozen weight in under the second of its names.
    for name, weight in policy.named_parameters(remove_duplicate=False):
        if not weight.requires_grad:
            state_dict.pop(prefix + name, None)
