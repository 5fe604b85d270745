"""Does on the ranks what the tests of int8 weights look at, and writes the model that they compute with."""

from pathlib import Path

from loraprune_ds.config import ModelConfig, RunConfig
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.pretrained import PretrainedModel, open_for_pruning
from loraprune_ds.model.weight_files import write_index, write_weight_file


def open_int8(folder: Path) -> PretrainedModel:
    """Opens a model whose linears are to be held as int8."""
    return open_for_pruning(folder, RunConfig(output_dir="unused", model=ModelConfig(frozen="int8")))


def write_dequantised(source: Path, folder: Path, dtype: str) -> Path:
    """Writes the model that int8 weights compute with, in `dtype`."""
    pretrained = open_int8(source)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: pretrained.read_whole(name, DTYPES[dtype]) for name in pretrained.shape.parameters()}
    write_index(folder, [write_weight_file(folder, 0, 1, tensors)])
    return folder
