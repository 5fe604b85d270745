"""Makes the folder of an exported Hugging Face model, which appears whole or not at all.

rank 0  staging = begin(out)
each    write_weight_file(staging, ...)       (model/weight_files.py, called by zero/write.py)
rank 0  write_index(staging, ...), finish_folder(staging, ...), publish(out)
"""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from loraprune_ds import whole
from loraprune_ds.errors import UserError
from loraprune_ds.export.model_card import ModelCard, write_model_card
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.exported_config import ExportedConfig
from loraprune_ds.model.family import family_name
from loraprune_ds.model.modeling_pruned import FAMILY
from loraprune_ds.model.text_part import MULTIMODAL
from loraprune_ds.model.tokenizer import SENTENCEPIECE_FILE, load_tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_CONFIG = "tokenizer_config.json"
PORTABLE_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json and nothing else, in transformers 4 and 5
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def begin(out: Path) -> Path:
    """Makes the empty folder that the export is built in, a dot-named sibling of `out`.

    It replaces the one of an attempt that crashed.

    Raises:
        UserError: `out` is there already and not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or choose another place for the exported model")
    return whole.begin(out)


def finish_folder(folder: Path, exported: ExportedConfig, dense: Path, card: ModelCard) -> None:
    """Writes all but the weights: config, modelling file, card, and the tokenizer and generation settings of `dense`.

    Args:
        dense: folder of the dense model.
    """
    copy_tokenizer(dense, folder)
    if (exported.renamed or _is_multimodal(dense)) and _has_tokenizer(folder):
        _pin_tokenizer(dense, folder)
    if not (folder / "generation_config.json").is_file():
        ids = {key: value for key, value in exported.config.items() if key in TOKEN_IDS}
        write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", exported.config)
    if exported.modelling_file:
        (folder / exported.modelling_file).write_text(_modelling_code(exported), encoding="utf-8")
    write_model_card(folder, card, exported)


def _modelling_code(exported: ExportedConfig) -> str:
    """Returns the modelling file of one family. A folder says which by a constant of the file."""
    assert exported.modelling_file is not None
    code = resources.files("loraprune_ds.model").joinpath(exported.modelling_file).read_text(encoding="utf-8")
    family = family_name(exported.config["model_type"])
    return code.replace(f'FAMILY = "{FAMILY}"', f'FAMILY = "{family}"')


def publish(out: Path) -> None:
    """Gives the finished export its name, in one step, once it is on the disk."""
    for path in whole.staging_of(out).rglob("*"):
        whole.flush(path)
    whole.publish(out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template and generation settings from folder `source` to folder `out` as they are.

    What transformers 5 writes and 4.x cannot load gets its older name, which both read. A sentencepiece file that is
    alone gets the files made of it as well. From that file alone AutoTokenizer forgets to begin a LLaMA's text with
    BOS, and splits a Mistral's text in another way than the run did.
    """
    for pattern in TOKENIZER_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if (source / SENTENCEPIECE_FILE).is_file() and not (source / "tokenizer.json").is_file():
        load_tokenizer(source).save_pretrained(out)
        _pin_tokenizer(source, out)
    config = _read_tokenizer_config(out)
    portable = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = PORTABLE_CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable != config:
        _write_tokenizer_config(out, portable)


def _is_multimodal(folder: Path) -> bool:
    """Tells if the text part alone is exported, under the model type of its own class."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in MULTIMODAL


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", SENTENCEPIECE_FILE))


def _pin_tokenizer(source: Path, out: Path) -> None:
    """Makes the copy in `out` read the same tokens as `source`, though its config.json names another model type.

    AutoTokenizer looks at model_type. The same files split text after a special token differently under `llama` and
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
    _write_tokenizer_config(out, _read_tokenizer_config(out) | settings)


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_tokenizer_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
