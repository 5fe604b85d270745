"""A pruned model as a Hugging Face checkpoint: merged weights, shard by shard, in a folder that appears whole or not.

rank 0  staging = begin(out)
each    write_shard(staging, ...)             (shards.py; shard k by rank k % world size)
rank 0  write_index(staging, ...); finish_folder(staging, ...); publish(out)
"""

from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from loraprune_ds import whole
from loraprune_ds.errors import UserError
from loraprune_ds.export.model_card import ModelCard, write_model_card
from loraprune_ds.export.tokenizer import copy_tokenizer, has_tokenizer, pin_tokenizer
from loraprune_ds.files import write_json
from loraprune_ds.model.exported_config import ExportedConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

MERGE_BLOCK = 1 << 24  # elements in fp32 at a time


def merge_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + scaling·B·A, computed in fp32, a block of rows at a time, and rounded once, to `dtype`.

    Args:
        weight: (out_features, in_features).
        lora_a: (r, in_features), preferably the fp32 master.
        lora_b: (out_features, r), likewise.
        scaling: lora_alpha / r.
    """
    merged = torch.empty_like(weight, dtype=dtype)
    a, rows_at_once = lora_a.float(), max(1, MERGE_BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows_at_once):
        rows = slice(start, start + rows_at_once)
        merged[rows] = torch.addmm(weight[rows].float(), lora_b[rows].float(), a, alpha=scaling)
    return merged


def begin(out: Path) -> Path:
    """Makes the empty folder the export is built in, a dot-named sibling of `out`; a crashed attempt's is replaced.

    Raises:
        UserError: `out` is there already and not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or choose another place for the exported model")
    return whole.begin(out)


def finish_folder(folder: Path, exported: ExportedConfig, source: Path, card: ModelCard) -> None:
    """Writes all but the weights: tokenizer and generation settings of `source`, config, modelling file, card."""
    copy_tokenizer(source, folder)
    if exported.renamed and has_tokenizer(folder):
        pin_tokenizer(source, folder)
    if not (folder / "generation_config.json").is_file():
        ids = {key: value for key, value in exported.config.items() if key in TOKEN_IDS}
        write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", exported.config)
    if exported.modelling_file:
        code = resources.files("loraprune_ds.model").joinpath(exported.modelling_file).read_text(encoding="utf-8")
        (folder / exported.modelling_file).write_text(code, encoding="utf-8")
    write_model_card(folder, card, exported)


def publish(out: Path) -> None:
    """Gives the finished export its name, in one step, once it is on the disk."""
    for path in whole.staging_of(out).rglob("*"):
        whole.flush(path)
    whole.publish(out)
