"""Does on the ranks what the tests of int8 weights look at, and writes the model that they compute with."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraprune_ds.config import ModelConfig, PruneConfig
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.frozen import DTYPES, SCALE, WEIGHT, Int8
from loraprune_ds.model.pretrained import PretrainedModel, open_for_pruning
from loraprune_ds.model.shapes import LayerKeep
from loraprune_ds.model.weight_files import as_on_disk, write_index, write_weight_file
from loraprune_ds.pruning.step import all_groups
from tests.numerics.cutting import whole_state
from tests.numerics.driver import Job, Outcome, build

CUT_LAYERS = (1, 2)


def open_int8(folder: Path) -> PretrainedModel:
    """Opens a model whose linears are to be held as int8."""
    return open_for_pruning(folder, ModelConfig(frozen="int8"), PruneConfig())


def write_dequantised(source: Path, folder: Path, dtype: str) -> Path:
    """Writes the model that int8 weights compute with, in `dtype`."""
    pretrained = open_int8(source)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: pretrained.weights.read_full(name, DTYPES[dtype]) for name in pretrained.shape.parameters()}
    write_index(folder, [write_weight_file(folder, 0, 1, as_on_disk(tensors, pretrained.shape.pieces()))])
    return folder


def read_left(job: Job, outcome: Outcome) -> dict[str, Tensor]:
    """Reads what the cuts of a run leave of the source, as a resumed run would."""
    pretrained = open_int8(job.folder)
    kinds = pretrained.shape.kinds
    keep = [LayerKeep(zip(kinds, map(torch.tensor, kept), strict=True)) for kept in outcome.kept[-1]]
    left, dtype = pretrained.weights.cut(keep), DTYPES[job.dtype]
    held = left.storage.stored(left.shape, dtype.itemsize)
    return {n: left.read_stored(n, 0, torch.Size(x.shape).numel(), dtype).view(x.shape) for n, x in held.items()}


def refit_once(job: Job) -> dict[str, Tensor]:
    """Makes two measured steps and a refit for a cut of layers 1 and 2. Returns all tensors after it."""
    trainer = build(job)
    compensator = trainer.pruner.compensator
    assert compensator is not None
    for step in (1, 2):
        trainer.step(step)
    chosen = LayerKeep(heads=torch.tensor([0, 2]), channels=torch.arange(0, 173, 2))
    compensator.compensate([chosen if i in CUT_LAYERS else k for i, k in enumerate(all_groups(trainer.model.shape))], 1)
    return whole_state(trainer)


def requantised(dense: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what holds the linears of `whole_state` as int8, by name."""
    held: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        linear = next((x for x in LLAMA_LINEARS if name.endswith(f"{x.name}.base_layer.{WEIGHT}")), None)
        if linear is None:
            held[name] = tensor
            continue
        parts = Int8(linear.axis).split(tensor, dtype)
        held |= {name.removesuffix(WEIGHT) + part: value for part, value in parts.items()}
    assert any(name.endswith(SCALE) for name in held)
    return held
