"""Describes what a training of somebody else's loop began with, and finds the files of its dense model."""

from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel

from loraprune_ds.checkpoint.load import counts_to_lists, source_digest
from loraprune_ds.checkpoint.state import Origin
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import ADAPTER, lora_linear
from loraprune_ds.model.frozen import DENSE, storage_format
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_pretrained
from loraprune_ds.pretrained.sources import HUB_ERRORS
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.schedule import Schedule

SAMPLE = 64  # elements of each linear that are compared with its file


def describe_origin(
    model: PrunableModel, schedule: Schedule, dtype: Dtype, *, steps: int, seed: int
) -> Origin:
    """Describes a training before its first step. Collective."""
    peft_model = cast(PeftModel, model.module)
    config = cast(Any, peft_model.get_base_model()).config
    name = str(config._name_or_path) or type(peft_model.get_base_model()).__name__
    query_heads = QUERY_HEADS in model.shape.kinds
    folder = _find_folder(name, getattr(config, "_commit_hash", None))
    is_same = folder is not None and _holds(folder, model, query_heads=query_heads)
    if not all(model.comm.gather_objects(is_same)):
        folder = None
    resolved = None
    digest = None
    if folder is not None:
        resolved = str(folder.resolve())
        digest = model.comm.from_rank_0(model.comm.on_rank_0(partial(source_digest, folder)))
    r, alpha = _most_common_lora(model)
    return Origin(
        config={
            "output_dir": "unknown",
            # a live model has no tower, and an export of its steps gets none
            "model": {"path": name, "dtype": dtype, "text_only": True},
            "lora": {"r": r, "lora_alpha": alpha},
            "prune": asdict(schedule.config),
        },
        steps=steps,
        seed=seed,
        query_heads=query_heads,
        folder=resolved,
        digest=digest,
        groups=counts_to_lists(model.shape),
    )


def _find_folder(name: str, revision: str | None) -> Path | None:
    """Finds the folder of a model by the name that it was loaded by, without a download."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except HUB_ERRORS:
        return None


def _holds(folder: Path, model: PrunableModel, *, query_heads: bool) -> bool:
    """Tells whether a folder has the weights of a live model, by samples of this rank's part of each linear."""
    try:
        on_disk = open_pretrained(folder, query_heads=query_heads)
    except UserError:
        return False
    if on_disk.shape.layers != model.shape.layers:
        return False
    return all(
        _is_equal(on_disk, model, LinearId(layer, linear.linear), linear.name)
        for layer, linear in model.shape.linears()
    )


def _is_equal(
    on_disk: PretrainedModel, model: PrunableModel, linear_id: LinearId, name: str
) -> bool:
    base = lora_linear(model.layers[linear_id.layer], linear_id.name).base_layer
    if storage_format(base) is not DENSE:
        return True
    shard = model.owned_weight(linear_id)
    sample = shard.flat[:SAMPLE].cpu()
    full_name = model.shape.prefix(linear_id.layer) + name
    end = shard.start + len(sample)
    return torch.equal(on_disk.weights.read_flat(full_name, shard.start, end, sample.dtype), sample)


def _most_common_lora(model: PrunableModel) -> tuple[int, float]:
    """Returns r and lora_alpha of most linears."""
    pairs = Counter[tuple[int, float]]()
    for layer, linear in model.shape.linears():
        module = lora_linear(model.layers[layer], linear.linear)
        r = module.r[ADAPTER]
        pairs[r, module.scaling[ADAPTER] * r] += 1
    return pairs.most_common(1)[0][0]
