"""Text to token ids and back; the home of transformers' tokenizers.

transformers is imported when a tokenizer is loaded, not before: `--help` stays instant. It works
without torch, and imports torch where torch is installed, unless it is told not to.
"""

from __future__ import annotations

import json
import logging
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, StartError

PADDING = "<pad>"


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
        self._is_by_character = len(self._tokenizer.eos_token or "") == 1
        if use_chat_template and not self._tokenizer.chat_template:
            raise ConfigError(
                f"model.use_chat_template = true: the tokenizer of {path!r} has no chat template;"
                " set it to false"
            )
        self.stop_token_ids: tuple[int, ...] = _stop_token_ids(path, self._tokenizer.eos_token_id)
        """Ids that end a completion: the tokenizer's and the generation config's, sorted."""

    def encode_prompt(self, text: str) -> array[int]:
        """`array("I")` of the ids a completion of this prompt continues.

        Raises:
            ValueError: a character that a one-token-a-character tokenizer does not know.
        """
        if not self._use_chat_template:
            ids = array("I", self._tokenizer.encode(text))
            if self._is_by_character and len(ids) != len(text):
                raise ValueError(
                    f"prompt {text!r}: has characters that the model's tokenizer does not know"
                )
            return ids
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
            skip_special_tokens=not self._is_by_character,
            clean_up_tokenization_spaces=False,
        )
        return text


@contextmanager
def torch_left_out() -> Iterator[None]:
    """Tokenizers loaded in here are those of a machine without torch: the same, but sooner.

    For a process that computes nothing. Its transformers has no models from then on; whoever wants
    torch itself can still import it afterwards. Does nothing if torch is imported already.
    """
    if "torch" in sys.modules:
        yield
        return
    # Where it is installed, to be told that it is not would puzzle people.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in str(record.msg))
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's sign of a missing module
    try:
        yield
    finally:
        del sys.modules["torch"]


def character_ids(alphabet: str, *, end: str) -> dict[str, int]:
    """The token id of each character of a `save_characters` tokenizer; `end` comes last."""
    return {character: index for index, character in enumerate([*alphabet, end])}


def save_characters(alphabet: str, *, end: str, folder: Path) -> None:
    """Write a tokenizer with one token a character into `folder`, for a Qwen2 model.

    Padding has the id after those of `character_ids`. It is Qwen2's own tokenizer without merges:
    AutoTokenizer goes by the model's type, whatever class was saved, so that any other kind would
    be rebuilt into one that splits text differently.

    Raises:
        ValueError: a character is not ASCII, which is more than one token.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    if not (alphabet + end).isascii():
        raise ValueError(f"alphabet {alphabet + end!r}: must be ASCII")
    spelling = ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {
        spelling.pre_tokenize_str(character)[0][0]: index
        for character, index in character_ids(alphabet, end=end).items()
    }
    Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=PADDING,
        eos_token=end,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def check_model_path(path: str) -> None:
    """Refuse what can be neither a folder nor a hub name; reads nothing.

    Raises:
        StartError: there is no such folder.
    """
    if not Path(path).is_dir() and not _may_be_hub_name(path):
        raise StartError(
            f"model.path = {path!r}: no such model folder; give a folder in Hugging Face form, or"
            " remove it to train a small model with [warmup]"
        )


def _load(path: str) -> Any:
    check_model_path(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StartError(
            f"model.path = {path!r}: no tokenizer could be loaded ({reason}); give a model folder"
            " in Hugging Face form, or the name of a model on the hub"
        ) from None


def _may_be_hub_name(path: str) -> bool:
    """True for `owner/name`, unless the owner is a folder here."""
    owner, _, name = path.partition("/")
    return (
        bool(name) and "/" not in name and owner not in ("", ".", "..") and not Path(owner).is_dir()
    )


def _stop_token_ids(path: str, eos_token_id: int | None) -> tuple[int, ...]:
    from transformers.utils import cached_file

    ids = set() if eos_token_id is None else {eos_token_id}
    file = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        stated = json.loads(Path(file).read_text("utf8")).get("eos_token_id")
        ids.update(stated if isinstance(stated, list) else [] if stated is None else [stated])
    return tuple(sorted(ids))
