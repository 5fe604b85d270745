"""Describes the parts of a live training for the state of a saved step."""

from typing import Any

from torch import nn
from torch.optim import Adam, AdamW

from loraprune_ds.checkpoint.state import ResumeState, Totals
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import ADAPTER, base_linear, lora_linear
from loraprune_ds.model.frozen import DENSE, storage_format
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import History


def has_plain_adam(model: PrunableModel) -> bool:
    """Tells whether torch's Adam or AdamW trains. Checkpoints of others go on with one engine."""
    optimizer = model.optimizer
    if not isinstance(optimizer, (Adam, AdamW)):
        return False
    return not any(group["amsgrad"] for group in optimizer.param_groups)


def describe_resume(pruner: Pruner, schedule: JsonObject, loss_scale: JsonObject) -> ResumeState:
    """Describes what only a resume needs. Every engine can restore Adam's state, and no other."""
    state = pruner.model.optimizer_state
    adam_step = None
    adam_groups: list[JsonObject] = []
    if has_plain_adam(pruner.model):
        adam_step = state.adam_step
        adam_groups = _param_groups(state.optimizer)
    return ResumeState(
        adam_step=adam_step,
        adam_groups=adam_groups,
        schedule=schedule,
        loss_scale=loss_scale,
        updates_since_cut=pruner.average.updates_since_cut,
    )


def _param_groups(optimizer: Any) -> list[JsonObject]:
    """Returns param_groups without parameters, for JSON. DeepSpeed knows no empty group."""
    groups = optimizer.param_groups
    # DeepSpeed has all in separate buffers
    groups = [group for group in groups if group["params"]] or groups
    return [group | {"params": []} for group in groups]


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
        if stored_as is not DENSE:
            formats[f"{layer}.{linear.linear}"] = type(stored_as).__name__.lower()
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
