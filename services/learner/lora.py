"""Low-rank adapters by peft, trained in place of the model's own weights; its only home.

What is published is the merged model, W + (alpha / rank) B A under W's own name: replicas, canary,
checksum and late replicas' copy are those of full training, vLLM samples at the speed of the plain
model, and nothing depends on its LoRA kernels, which a CPU has not. The cost is that the whole
model goes over the wire for adapters that are a hundredth of it, and that a merged weight in
bfloat16 is rounded where the learner's product is not; the canary and the importance ratio see
that difference. To send adapters, the manifest would hold A and B under peft's names, the replica
would start vLLM with `enable_lora` and this rank and load each version under an id of its own, and
a completion in flight, which vLLM ties to one id, could not go on under the next version.

There is no dropout: it would make the ratio of two passes differ from 1 without any update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.config.learner import LoraConfig
from shared.errors import ConfigError

KEY = "learner.lora"

_PREFIX = "base_model.model."
"""Of the model's names within peft's."""


class Adapters:
    """The adapters within a model, which goes on to be called as before."""

    def __init__(self, model: Any, lora: LoraConfig, *, seed: int) -> None:
        """Add them, the product of each zero, and freeze all else.

        Args:
            seed: of the initial A, so that all ranks have the same.
        Raises:
            ConfigError: peft is not installed, or the targets are not plain linear layers.
        """
        try:
            import peft
        except ImportError:
            raise ConfigError(
                f"{KEY}: needs peft, which cannot be imported; start with PYTHONPATH=.venv/lora,"
                " where `make setup` puts it, or pip install 'isentrope[lora]'"
            ) from None
        wanted = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets or "all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                # DeepSpeed keeps the float32 master of a bfloat16 weight.
                self._peft = peft.get_peft_model(model, wanted, autocast_adapter_dtype=False)
            except ValueError as error:
                raise ConfigError(f"{KEY}.targets = {lora.targets}: {error}") from None
        self._layers: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                _check_plain(name, module, model)
                self._layers[name] = module
        self._name = self._peft.active_adapter

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The adapters' own parameters, by their names in the model."""
        return [
            (f"{path}.{part}.{self._name}.weight", getattr(layer, part)[self._name].weight)
            for path, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        ]

    def place(self, name: str) -> tuple[str, str | None]:
        """For a parameter's name in the model: the plain model's, and the path of its adapter.

        The path is None where no adapter changes the parameter.
        """
        path, _, leaf = name.rpartition(".base_layer.")
        if path not in self._layers:
            return name, None
        return f"{path}.{leaf}", path if leaf == "weight" else None

    def parts(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of an adapter."""
        layer = self._layers[path]
        return layer.lora_A[self._name].weight, layer.lora_B[self._name].weight

    def merged(self, path: str, weight: Tensor) -> Tensor:
        """A copy of the weight with what the adapter adds; all of them must be whole."""
        with torch.no_grad():
            merged: Tensor = weight + self._layers[path].get_delta_weight(self._name)
        return merged

    def off(self) -> contextlib.AbstractContextManager[None]:
        """The model without them, for passes without gradient."""
        without: contextlib.AbstractContextManager[None] = self._peft.disable_adapter()
        return without

    def export(self, folder: Path, weights: Mapping[str, Tensor], *, base: str) -> None:
        """Write them so that `PeftModel.from_pretrained` reads them.

        Args:
            weights: those of `named`, whole, on the host.
            base: where the model was loaded from.
        """
        self._peft.peft_config[self._name].base_model_name_or_path = base
        state = {_PREFIX + name: weight for name, weight in weights.items()}
        self._peft.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def _check_plain(name: str, layer: Any, model: Any) -> None:
    is_outer = layer in (model.get_input_embeddings(), model.get_output_embeddings())
    if is_outer or not isinstance(layer.get_base_layer(), nn.Linear):
        raise ConfigError(
            f"{KEY}.targets: {name} is no linear layer between embedding and head; name only such"
        )
