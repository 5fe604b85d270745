"""Copies the tokenizer of the source model: a pruned model reads exactly the tokens the dense one read."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from loraprune_ds.model.tokenizer import SENTENCEPIECE_FILE, load_tokenizer

CONFIG_FILE = "tokenizer_config.json"
PORTABLE_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json and nothing else, in transformers 4 and 5
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template and generation settings from folder `source` to folder `out` as they are.

    What transformers 5 writes and 4.x cannot load gets its older name, which both read. A sentencepiece file, if alone,
    is joined by the files made of it: from that file alone AutoTokenizer forgets to begin a LLaMA's text with BOS, and
    splits a Mistral's otherwise than the run did.
    """
    for pattern in TOKENIZER_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if (source / SENTENCEPIECE_FILE).is_file() and not (source / "tokenizer.json").is_file():
        load_tokenizer(source).save_pretrained(out)
        pin_tokenizer(source, out)
    config = _read_config(out)
    portable = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = PORTABLE_CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable != config:
        _write_config(out, portable)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", SENTENCEPIECE_FILE))


def pin_tokenizer(source: Path, out: Path) -> None:
    """Makes the copy in `out` read the tokens that `source` reads although its config.json names another model type.

    AutoTokenizer looks at model_type: the same files split text after a special token differently under `llama` and
    under `mistral`. So the tokenizer as built from `source` is written whole, for a class that adds nothing to it.
    """
    tokenizer = load_tokenizer(source)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": PORTABLE_CLASS,
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    _write_config(out, _read_config(out) | settings)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
