"""Describes how the training of another loop began, and finds the files of its dense model."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from loraprune_ds.checkpoint.load import counts_to_lists, source_digest
from loraprune_ds.checkpoint.state import Origin
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import ADAPTER, lora_linear
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_pretrained, open_quantised
from loraprune_ds.pretrained.sources import folder_on_disk
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.session.quantised import bits_of
from loraprune_ds.session.state import storage_formats

SAMPLE = 64  # elements of each linear, and of each end of other tensors, that are compared with their files


def describe_origin(
    model: PrunableModel, schedule: Schedule, dtype: Dtype, *, steps: int, seed: int
) -> Origin:
    """Describes a training before its first step. Collective."""
    peft_model = cast(PeftModel, model.module)
    config = cast(Any, peft_model.get_base_model()).config
    settings = describe_settings(model, schedule, dtype)
    query_heads = QUERY_HEADS in model.shape.kinds
    folder = base_folder(peft_model)
    formats = storage_formats(model.layers, model.shape)
    bits = bits_of(config) if formats else None
    weights = None
    if folder is not None:
        opener = open_pretrained
        if bits is not None:
            opener = partial(open_quantised, bits=bits, formats=formats, dtype=dtype)
        weights = _open_weights(partial(opener, folder, query_heads=query_heads), model)
    if not _holds(weights, model, DTYPES[dtype]):
        folder = None
    resolved = None
    digest = None
    if folder is not None:
        resolved = str(folder.resolve())
        digest = model.comm.from_rank_0(model.comm.on_rank_0(partial(source_digest, folder)))
    return Origin(
        config=settings,
        steps=steps,
        seed=seed,
        query_heads=query_heads,
        folder=resolved,
        digest=digest,
        groups=counts_to_lists(model.shape),
        bits=bits,
    )


def base_folder(model: PeftModel) -> Path | None:
    """Finds the folder that the dense model was loaded from. None if it is gone, or there was none."""
    config = cast(Any, model.get_base_model()).config
    return folder_on_disk(str(config._name_or_path), getattr(config, "_commit_hash", None))


def describe_settings(model: PrunableModel, schedule: Schedule, dtype: Dtype) -> dict[str, Any]:
    """Describes those settings of a run that results need."""
    base = cast(PeftModel, model.module).get_base_model()
    name = str(cast(Any, base).config._name_or_path) or type(base).__name__
    if Path(name).is_dir():
        name = str(Path(name).absolute())  # commands may start elsewhere
    r, alpha = _most_common_lora(model)
    return {
        "output_dir": "unknown",
        # a live model has no tower, and an export of its steps gets none
        "model": {"path": name, "dtype": dtype, "text_only": True},
        "lora": {"r": r, "lora_alpha": alpha},
        "prune": asdict(schedule.goal.config),
    }


def _holds(weights: ModelWeights | None, model: PrunableModel, dtype: torch.dtype) -> bool:
    """Tells whether a folder has the weights of a live model on every rank, by samples. Collective."""
    if not all(model.comm.gather_objects(weights is not None)):
        return False
    pairs = _linear_samples(cast(ModelWeights, weights), model, dtype)
    others = _other_samples(cast(ModelWeights, weights), model, dtype)
    # a rank may not leave before the collectives of another
    is_equal = [torch.equal(on_disk, live) for on_disk, live in (*pairs, *others)]
    return all(model.comm.gather_objects(all(is_equal)))


def _open_weights(
    open_model: Callable[[], PretrainedModel], model: PrunableModel
) -> ModelWeights | None:
    """Opens the weights in a folder. None if they have another shape than the live model."""
    try:
        weights = open_model().weights
    except UserError:
        return None
    shape = weights.shape
    is_same = (shape.layers, shape.outer) == (model.shape.layers, model.shape.outer)
    return weights if is_same else None


def _linear_samples(
    weights: ModelWeights, model: PrunableModel, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a sample of this rank's part of each linear, from disk and live."""
    for layer, linear in model.shape.linears():
        shard = model.owned_weight(LinearId(layer, linear.linear))
        live = shard.flat[:SAMPLE].cpu()
        name = model.shape.prefix(layer) + linear.name
        if name not in weights.formats:
            yield weights.read_flat(name, shard.start, shard.start + len(live), live.dtype), live
        else:
            quantised = weights.read_full(name, dtype).reshape(-1)
            yield quantised[shard.start :][: len(live)], live


def _other_samples(
    weights: ModelWeights, model: PrunableModel, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields both ends of each other tensor on the owner of its layer, in the dtype of exports. Collective."""
    for layer, named in enumerate(model.other_parameters(trained=False)):
        for name, parameter in named.items():
            live = model.collect(parameter, model.owner(layer))
            if live is None:
                continue
            flat = live.detach().reshape(-1)
            for start in (0, max(0, len(flat) - SAMPLE)):
                part = flat[start : start + SAMPLE].cpu()
                on_disk = weights.read_stored(name, start, start + len(part), dtype)
                yield on_disk, part.to(on_disk.dtype)


def _most_common_lora(model: PrunableModel) -> tuple[int, float]:
    """Returns r and lora_alpha of most linears."""
    pairs = Counter[tuple[int, float]]()
    for layer, linear in model.shape.linears():
        module = lora_linear(model.layers[layer], linear.linear)
        r = module.r[ADAPTER]
        pairs[r, module.scaling[ADAPTER] * r] += 1
    return pairs.most_common(1)[0][0]
