"""Makes the folder of an exported Hugging Face model. It appears complete or not at all.

rank 0  staging = begin(out)
each    write_model(source, staging, ...)
rank 0  publish(out)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.export.model_card import ModelCard, write_model_card
from loraprune_ds.files import (
    begin_folder,
    flush,
    publish_folder,
    read_json,
    staging_of,
    write_json,
)
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.model.family import family_name
from loraprune_ds.model.modeling_pruned import FAMILY
from loraprune_ds.model.shape import FIRST
from loraprune_ds.pretrained import weight_files
from loraprune_ds.pretrained.exported_config import MODELLING_FILE, ExportedConfig, name_our_code
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.pretrained.text_part import MULTIMODAL, Tower, in_files
from loraprune_ds.pretrained.tokenizer import has_sentencepiece_alone, has_tokenizer, load_tokenizer
from loraprune_ds.ranks.comm import Communicator, LocalWrites
from loraprune_ds.ranks.flat import owner_rounds

PORTABLE_CLASS = "PreTrainedTokenizerFast"  # reads only tokenizer.json, in transformers 4 and 5


class LayerSource(Protocol):
    """A pruned model, read layer by layer: a step (checkpoint/load.py), or a live one (session/live_export.py)."""

    @property
    def exported(self) -> ExportedConfig: ...
    @property
    def dense_folder(self) -> Path:
        """Returns the folder of config.json, tokenizer and settings of the dense model, at least on rank 0."""
        ...

    @property
    def tower(self) -> Tower | None: ...

    def layer(self, number: int, ranks: Communicator, *, merge: bool) -> dict[str, Tensor]:
        """Returns a layer on its owner, and nothing elsewhere. Embedding, norm and head are one more. Collective.

        Tensors have the names of the text class and the model's dtype.

        Args:
            merge: add LoRA to the weights.
        """
        ...


def read_layers(
    source: LayerSource, layers: int, ranks: Communicator, *, merge: bool
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields this rank's layers r, r + ranks, ... Collective: each rank reads to the end."""
    for numbers in owner_rounds(layers + 1, ranks.world_size):
        owned = {number: source.layer(number, ranks, merge=merge) for number in numbers}
        # the owners of a round work in parallel. None keeps its layer until the next round
        for number in numbers:
            if owned[number]:
                yield number, owned.pop(number)


def begin(out: Path, mark: str = "") -> Path:
    """Makes the empty staging folder of `out`. `mark` separates the folders of several processes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it, or export to another folder")
    return begin_folder(out, mark)


def write_model(
    source: LayerSource, folder: Path, card: ModelCard, ranks: Communicator, *, merge: bool = True
) -> None:
    """Fills a staging folder. Rank r writes files r, r + ranks, ... Each holds a layer. Collective.

    Args:
        card: describes the model of `source`.
        merge: as in `LayerSource.layer`.

    Raises:
        RunError: a rank cannot write. Or UserError: a weight cannot be read.
    """
    shape = card.pruned
    tower = source.tower
    tower_index = len(shape.layers) + 1  # its file follows the one of embedding, norm and head
    count = tower_index + (tower is not None)
    # transformers' names
    paths = [folder / f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    writes = LocalWrites(ranks, folder)
    files = read_layers(source, len(shape.layers), ranks, merge=merge)

    def write_files() -> None:
        for k, tensors in files:
            weight_files.write_weight_file(paths[k], in_files(tensors, shape, tower))
            del tensors  # before the next layer
        if tower and tower_index % ranks.world_size == ranks.rank:
            weight_files.copy_tensors(tower.files, paths[tower_index])

    def complete() -> None:
        weight_files.write_index(folder, [path.name for path in paths])
        finish_folder(folder, source.exported, source.dense_folder, card)

    writes.do(write_files)
    # after a failed write, because other ranks gather their layers from this one, too
    for _ in files:
        pass
    writes.agree()
    writes.do_on_rank_0(complete)


@contextmanager
def saving() -> Iterator[None]:
    """Raises UserError, which all ranks get, for what fails: tokenizers fail in many ways, as by protobuf's errors."""
    try:
        yield
    except (UserError, OSError):  # say what is wrong, also with the disk
        raise
    except Exception as error:
        raise UserError(
            f"the model cannot be saved: {type(error).__name__}: {one_line(error)}"
        ) from error


@saving()
def finish_folder(folder: Path, exported: ExportedConfig, dense: Path, card: ModelCard) -> None:
    """Writes all but the weights: config, modelling file, card, and the `dense` folder's tokenizer and settings."""
    copy_tokenizer(dense, folder)
    if exported.multimodal:
        weight_files.copy_named(dense, folder, weight_files.PROCESSOR_FILES)
        weight_files.drop_auto_maps(folder)
    elif has_tokenizer(folder):
        config = read_json(dense / "config.json", missing_ok=True)
        is_text_part = config.get("model_type") in MULTIMODAL
        if exported.renamed or is_text_part:  # the class has another model type
            _pin_tokenizer(dense, folder)
    first = {FIRST: {"name": card.base_model} | card.dense.first}
    write_json(folder / "config.json", exported.config | first)
    _write_modelling_file(folder, exported.config["model_type"])
    write_model_card(folder, card, exported)


def copy_model(model: PretrainedModel, out: Path) -> None:
    """Fills the folder `out` with a model's files of known names. Our modelling file is the only code in the copy."""
    for name in weight_files.weight_file_names(model.folder):
        shutil.copyfile(model.folder / name, out / name)
    names = (
        "config.json",
        weight_files.INDEX_FILE,
        *weight_files.PROCESSOR_FILES,
        *weight_files.DOCUMENTS,
    )
    weight_files.copy_named(model.folder, out, names)
    copy_tokenizer(model.folder, out)
    config = read_json(out / "config.json")
    renamed = name_our_code(config)
    if renamed != config:
        write_json(out / "config.json", renamed)
    _write_modelling_file(out, model.shape.model_type)


def _write_modelling_file(folder: Path, model_type: str) -> None:
    """Writes our modelling file with the name of the family, for a model that needs it."""
    if not model_type.startswith(PRUNED):
        return
    file = resources.files("loraprune_ds.model") / MODELLING_FILE
    code = file.read_text(encoding="utf-8")
    code = code.replace(f'FAMILY = "{FAMILY}"', f'FAMILY = "{family_name(model_type)}"')
    (folder / MODELLING_FILE).write_text(code, encoding="utf-8")


def publish(out: Path, mark: str = "") -> None:
    """Renames the finished export, once it is on the disk."""
    for path in staging_of(out, mark).rglob("*"):
        flush(path)
    publish_folder(out, mark)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template and generation settings from folder `source` to folder `out`, without code.

    Class names of transformers 5 become older ones. AutoTokenizer would tokenise differently from a sentencepiece file
    alone, so the files that the run derived from it are written, too.
    """
    weight_files.copy_named(source, out, weight_files.TOKENIZER_FILES)
    is_alone = has_sentencepiece_alone(source)
    if is_alone:
        load_tokenizer(source).save_pretrained(out)
    path = out / weight_files.TOKENIZER_CONFIG
    names_code = weight_files.AUTO_MAP in read_json(path, missing_ok=True)
    # Without the class name AutoTokenizer may choose another class.
    if is_alone or (names_code and has_tokenizer(out)):
        _pin_tokenizer(source, out)
    weight_files.drop_auto_maps(out)
    config = read_json(path, missing_ok=True)
    portable = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = PORTABLE_CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable != config:
        write_json(path, portable)


def _pin_tokenizer(source: Path, out: Path) -> None:
    """Makes the copy in `out` tokenise like `source`, although its config.json names another model type."""
    # AutoTokenizer splits the text after a special token differently for `llama` and `mistral`.
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
    path = out / weight_files.TOKENIZER_CONFIG
    write_json(path, read_json(path, missing_ok=True) | settings)
