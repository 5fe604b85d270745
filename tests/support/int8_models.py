"""Opens a model whose linears are stored as int8."""

from pathlib import Path

from loraprune_ds.config import ModelConfig
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning


def open_int8(folder: Path) -> PretrainedModel:
    """Opens a model whose linears are to be held as int8."""
    return open_for_pruning(folder, ModelConfig(frozen="int8"))
