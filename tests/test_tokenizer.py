from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from shared.errors import ConfigError, StartError
from shared.tokenizer import Tokenizer, character_ids, save_characters, torch_left_out

ALPHABET = "0123456789+-*/=,> "
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
TEXTS = ["two plus two is four", "3 4>7=", "<think>Größe  <user>\n\n</think> café 数", ""]


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, as the warm-up writes it, without weights."""
    folder = tmp_path_factory.mktemp("characters")
    save_characters(ALPHABET, end="$", folder=folder)
    Qwen2Config(vocab_size=20, eos_token_id=18).save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of words with special tokens, as chat models have them."""
    ids = {"<user>": 0, "<assistant>": 1, "<end>": 2, "two": 3, "plus": 4, "is": 5, "four": 6}
    backend = Backend(models.WordLevel(ids, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_every_character_is_one_token_in_the_order_of_the_alphabet(characters: Path) -> None:
    tokenizer = Tokenizer(str(characters))
    assert list(tokenizer.encode_prompt(ALPHABET)) == list(range(18))
    assert character_ids(ALPHABET, end="$")["$"] == 18
    assert tokenizer.encode_prompt("3 4>7=") == array("I", [3, 17, 4, 16, 7, 14])


def test_text_comes_back_as_it_went_in(characters: Path) -> None:
    tokenizer, generator = Tokenizer(str(characters)), random.Random(1)
    for _ in range(500):
        text = "".join(generator.choices(ALPHABET + "$", k=generator.randint(0, 30)))
        assert tokenizer.decode(tokenizer.encode_prompt(text)) == text


def test_a_character_that_ends_a_completion_stays_in_its_text(characters: Path) -> None:
    tokenizer = Tokenizer(str(characters))
    assert tokenizer.decode([3, 14, 3, 18]) == "3=3$"
    assert tokenizer.decode([3, 14, 3]) == "3=3"


def test_padding_that_was_sampled_is_not_hidden_from_the_scorer(characters: Path) -> None:
    assert Tokenizer(str(characters)).decode([3, 19, 4]) == "3<pad>4"


@pytest.mark.parametrize("text", ["3x4", "3 4\n", "é", "٣"])
def test_a_prompt_with_an_unknown_character_is_refused(characters: Path, text: str) -> None:
    with pytest.raises(ValueError, match="does not know"):
        Tokenizer(str(characters)).encode_prompt(text)


def test_transformers_alone_reads_a_saved_alphabet_the_same_way(characters: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(characters)
    assert loaded.encode("3 4>7=") == [3, 17, 4, 16, 7, 14]
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (20, 18, 19)


def test_an_alphabet_beyond_ascii_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be ASCII"):
        save_characters("abé", end="$", folder=tmp_path)


def test_special_tokens_are_no_part_of_a_completions_text(words: Path) -> None:
    assert Tokenizer(str(words)).decode([3, 4, 3, 2]) == "twoplustwo"


def test_a_chat_template_wraps_the_prompt_only_if_asked_for(words: Path) -> None:
    plain = Tokenizer(str(words))
    chat = Tokenizer(str(words), use_chat_template=True)
    assert list(plain.encode_prompt("two plus two")) == [3, 4, 3]
    assert list(chat.encode_prompt("two plus two")) == [0, 3, 4, 3, 1]


def test_a_chat_template_that_is_not_there_is_a_wrong_setting(characters: Path) -> None:
    with pytest.raises(ConfigError, match="use_chat_template = true: the tokenizer of"):
        Tokenizer(str(characters), use_chat_template=True)


@pytest.mark.parametrize(
    ("stated", "expected"), [(None, (2,)), (2, (2,)), (5, (2, 5)), ([6, 5, 2], (2, 5, 6))]
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    words: Path, stated: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    (words / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}), "utf8")
    assert Tokenizer(str(words)).stop_token_ids == expected


def test_without_a_generation_config_the_tokenizers_stop_token_counts(words: Path) -> None:
    assert Tokenizer(str(words)).stop_token_ids == (2,)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "missing", "shared/missing"])
def test_a_missing_folder_is_one_line(path: str) -> None:
    with pytest.raises(StartError, match=re.escape(f"model.path = {path!r}: no such")) as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no tokenizer could be loaded") as caught:
        Tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE as Qwen and Llama 3 have it: trained, with added tokens and a template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_tokens(["<think>", AddedToken("</think>", special=False, lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer.save_pretrained(folder)
    return folder


def readings(folder: Path) -> dict[str, Any]:
    """Ids of texts, and texts of ids that nobody would have made of a text."""
    tokenizer, generator = Tokenizer(str(folder)), random.Random(1)
    size = len(tokenizer._tokenizer)
    sampled = [generator.choices(range(size), k=12) for _ in range(50)]
    wrapped = [
        Tokenizer(str(folder), use_chat_template=True).encode_prompt(text).tolist()
        for text in TEXTS
        if tokenizer._tokenizer.chat_template
    ]
    encode = tokenizer._tokenizer.encode
    return {
        "stop": list(tokenizer.stop_token_ids),
        "encoded": [encode(text) for text in TEXTS],
        "wrapped": wrapped,
        "decoded": [tokenizer.decode(ids) for ids in sampled],
    }


def test_torch_left_out_changes_no_id_and_no_text(
    characters: Path, words: Path, pieces: Path
) -> None:
    folders = [characters, words, pieces]
    program = (
        "import importlib.util, json, sys\n"
        "from pathlib import Path\n"
        "from shared.tokenizer import torch_left_out\n"
        "with torch_left_out():\n"
        "    from tests.test_tokenizer import readings\n"
        "    found = [readings(Path(folder)) for folder in sys.argv[1:]]\n"
        "assert 'torch' not in sys.modules and importlib.util.find_spec('torch')\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == [readings(folder) for folder in folders]


def test_torch_is_not_left_out_where_it_is_imported_already() -> None:
    import torch

    with torch_left_out():
        assert sys.modules["torch"] is torch
    assert sys.modules["torch"] is torch
