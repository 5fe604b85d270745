"""Describes a live training, for the state of a saved step and for records."""

import logging
from collections import Counter
from itertools import chain

from torch import nn

from loraprune_ds.checkpoint.load import keep_to_lists
from loraprune_ds.checkpoint.state import Origin, ResumeState, State, Totals
from loraprune_ds.engine.optimizer_state import optimizer_kind
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import ADAPTER, base_linear, lora_linear
from loraprune_ds.model.frozen import Blocks, storage_format
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Cut, Pruner
from loraprune_ds.ranks.device import device_name
from loraprune_ds.report.records import CutRecord, History

log = logging.getLogger(__name__)


def describe_resume(pruner: Pruner, schedule: JsonObject) -> ResumeState:
    """Describes what only a resume needs."""
    state = pruner.model.optimizer_state
    return ResumeState(
        optimizer=optimizer_kind(state.optimizer),
        groups=state.settings(),
        schedule=schedule,
        loss_scale=pruner.model.scaler_state(),
        updates_since_cut=pruner.average.updates_since_cut,
    )


def lora_scalings(model: PrunableModel) -> dict[str, float]:
    """Returns lora_alpha / r of each linear."""
    return {
        f"{layer}.{linear.linear}": lora_linear(model.layers[layer], linear.linear).scaling[ADAPTER]
        for layer, linear in model.shape.linears()
    }


def storage_formats(layers: nn.ModuleList, shape: ModelShape) -> dict[str, str]:
    """Names the storage formats of linears that are not stored in the model's dtype."""
    formats = dict[str, str]()
    for layer, linear in shape.linears():
        stored_as = storage_format(base_linear(layers[layer], linear.linear))
        if isinstance(stored_as, Blocks):
            formats[f"{layer}.{linear.linear}"] = stored_as.codec.name
    return formats


def sum_up(history: History, step: int) -> Totals:
    """Sums up a history. Only rank 0, which writes the state, has the records from before a resume."""
    perplexity = None
    for evaluation in history.evaluations:
        if evaluation.step == step and evaluation.name != "dense":
            perplexity = evaluation.perplexity
    return Totals(
        tokens=sum(record.tokens for record in history.steps),
        perplexity_dense=history.perplexity("dense"),
        perplexity=perplexity,
    )


def describe_state(
    pruner: Pruner,
    origin: Origin,
    history: History,
    step: int,
    resumed_from: list[int],
    peak_bytes: list[int],
) -> State:
    """Describes a training after `step`. Arguments are as in `State`."""
    model = pruner.model
    scalings = lora_scalings(model)
    ((most_common, _),) = Counter(scalings.values()).most_common(1)
    others = {name: scaling for name, scaling in scalings.items() if scaling != most_common}
    return State(
        step=step,
        origin=origin,
        kept=keep_to_lists(pruner.kept_of_dense, model.shape.kinds),
        engine=model.engine,
        world_size=model.world_size,
        scaling=most_common,
        scalings=others,
        formats=storage_formats(model.layers, model.shape),
        trained=list(chain.from_iterable(model.trained_parameters())),
        asked=pruner.schedule.goal.ratio,
        totals=sum_up(history, step),
        resumed_from=resumed_from,
        accelerator=device_name(),
        peak_bytes=peak_bytes,
    )


def describe_cut(
    pruner: Pruner, cut: Cut, bytes_before: list[int], bytes_after: list[int]
) -> CutRecord:
    """Describes a cut that was made. Bytes are of each rank's weights."""
    pruned = pruner.model.shape
    first = pruner.limits.dense.first
    kept = {kind: [layer[kind] for layer in pruned.counts] for kind in pruned.kinds}
    return CutRecord(
        step=cut.step,
        target=cut.target,
        reached=cut.reached,
        removed_fraction=1 - pruned.total_numel() / first["parameters"],
        seconds=cut.seconds,
        bytes_sent=cut.bytes_sent,
        weight_bytes_before=bytes_before,
        weight_bytes_after=bytes_after,
        **kept,
    )


def warn_of_missing_cuts(pruner: Pruner, step: int) -> None:
    """Warns on rank 0 of a training that ends before its last cut."""
    end = pruner.schedule.last_cut
    if step < end and pruner.model.rank == 0:
        log.warning(
            "training stopped at step %d, before the last cut at step %d: %.1f %% of %.1f %% are removed",
            step,
            end,
            100 * pruner.reached(),
            100 * pruner.schedule.goal.ratio,
        )
