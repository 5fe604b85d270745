"""Drops whole layers before the first step: those that change the hidden states of the dense model least."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from loraprune_ds.errors import RunError
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.pruning.limits import layers_to_drop
from loraprune_ds.ranks.device import to_device
from loraprune_ds.train.checkpoints import RunContext
from loraprune_ds.train.data.samples import rank_micro_batches
from loraprune_ds.train.prepare import prepare
from loraprune_ds.train.trainer import evaluate

SAMPLES = 64  # of the tuning data, at least


def drop_layers(context: RunContext) -> RunContext:
    """Measures the dense model, and plans the run without the layers that it chooses, if it has not. Collective."""
    config, prepared = context.config, context.prepared
    stored = config.model.attn_implementation, config.model.dtype, prepared.ds_config
    engine = prepared.engines.build_inference_engine(prepared.dense, *stored)
    evaluate(context, engine, 0, "dense")
    dropped = config.model.drop_layers or choose_layers(context, engine)
    prepared.engines.release(engine)
    if dropped == config.model.drop_layers:
        return context
    chosen = replace(config, model=replace(config.model, drop_layers=dropped))
    return replace(context, prepared=prepare(chosen, context.comm, prepared.data.commits))


@torch.no_grad()
def choose_layers(context: RunContext, engine: Any) -> list[int]:
    """Chooses the layers with the least block influence, one after another, each without those before. Collective.

    Block influence is the mean of 1 − cos(h_in, h_out) over all tokens (ShortGPT, Men et al., arXiv 2403.03853,
    section 2.2). `engine` is the dense model's, which only evaluates.
    """
    prepared, comm, micro_batch_size = context.prepared, context.comm, context.config.train.micro_batch_size
    samples, tower = prepared.samples, prepared.dense.tower
    as_many, may = layers_to_drop(context.config, prepared.dense.shape, tower and tower.config)
    layers, dropped, mask = decoder_layers(getattr(engine, "module", engine)), list[int](), None
    sums = torch.zeros(len(layers), dtype=torch.float64, device=comm.device)

    def see(i: int, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], after: Tensor) -> Tensor:
        before: Tensor = args[0] if args else named["hidden_states"]
        change = 1 - cosine_similarity(before.float(), after.float(), dim=-1)
        sums[i] += (change if mask is None else change[mask]).sum(dtype=torch.float64)
        return before if i in dropped else after

    hooks = [layer.register_forward_hook(partial(see, i), with_kwargs=True) for i, layer in enumerate(layers)]
    while len(dropped) < len(as_many):
        sums.zero_()
        for step in range(-(-SAMPLES // context.config.train.global_batch_size)):
            batch = prepared.order.batch(step)
            for _, indices in rank_micro_batches(batch, micro_batch_size, comm.rank, comm.world_size):
                inside = samples.attention_mask(indices)
                mask = None if inside is None else to_device(inside)
                engine(**{name: to_device(tensor) for name, tensor in samples.inputs(indices).items()})
        influence = comm.all_reduce(sums.clone()).tolist()
        if not all(map(math.isfinite, influence)):
            raise RunError("prune.depth_ratio: hidden states of the dense model are not finite")
        dropped.append(min({*may} - {*dropped}, key=lambda i: (influence[i], i)))
        context.recorder.show(f"drops layer {dropped[-1]}, which changes the hidden states least")
    for hook in hooks:
        hook.remove()
    return sorted(dropped)
