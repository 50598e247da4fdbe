"""Text to token ids and back; the home of transformers' tokenizers.

transformers is imported when a tokenizer is loaded, not before: `--help` stays instant. It works
without torch, and imports torch where torch is installed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, StartError


class Tokenizer:
    """A model's tokenizer.

    Args:
        path: a model folder in Hugging Face form, or a hub name.
        use_chat_template: wrap each prompt as a user's message.
    Raises:
        StartError: there is no such model, or no tokenizer in it.
        ConfigError: a chat template is asked for that the tokenizer does not have.
    """

    def __init__(self, path: str, *, use_chat_template: bool = False) -> None:
        self._tokenizer = _load(path)
        self._use_chat_template = use_chat_template
        if use_chat_template and not self._tokenizer.chat_template:
            raise ConfigError(
                f"model.use_chat_template = true: the tokenizer of {path!r} has no chat template;"
                " set it to false"
            )
        self.stop_token_ids: tuple[int, ...] = _stop_token_ids(path, self._tokenizer.eos_token_id)
        """Ids that end a completion: the tokenizer's and the generation config's, sorted."""

    def encode_prompt(self, text: str) -> array[int]:
        """`array("I")` of the ids a completion of this prompt continues."""
        if not self._use_chat_template:
            return array("I", self._tokenizer.encode(text))
        message = [{"role": "user", "content": text}]
        return array(
            "I",
            self._tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            ),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, as its task's scorer reads it.

        Special tokens are left out. Not so if the end of sequence is a plain character, as
        `save_characters` makes it: then it ends the text, and its absence tells a scorer that the
        completion was cut off.
        """
        text: str = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=len(self._tokenizer.eos_token or "") != 1,
            clean_up_tokenization_spaces=False,
        )
        return text


def save_characters(alphabet: str, *, end: str, folder: Path) -> None:
    """Write a tokenizer with one token a character into `folder`.

    Ids follow `alphabet`, then come `end`, the end of sequence, and padding. Any other character
    in a prompt is an error when it is encoded.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    ids = {character: index for index, character in enumerate([*alphabet, end])}
    backend = Backend(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _load(path: str) -> Any:
    from transformers import AutoTokenizer

    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise StartError(
            f"model.path = {path!r}: no such model folder; give a folder in Hugging Face form, or"
            " remove it to train a small model with [warmup]"
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StartError(
            f"model.path = {path!r}: no tokenizer could be loaded ({reason}); give a model folder"
            " in Hugging Face form, or the name of a model on the hub"
        ) from None


def _stop_token_ids(path: str, eos_token_id: int | None) -> tuple[int, ...]:
    from transformers.utils import cached_file

    ids = set() if eos_token_id is None else {eos_token_id}
    file = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        stated = json.loads(Path(file).read_text("utf8")).get("eos_token_id")
        ids.update(stated if isinstance(stated, list) else [] if stated is None else [stated])
    return tuple(sorted(ids))
