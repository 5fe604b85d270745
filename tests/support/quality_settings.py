"""Runs refit, `fisher` and distillation on real ranks. Returns what a dense computation is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pruning.step import all_groups
from loraprune_ds.ranks.device import storage_bytes
from loraprune_ds.train.data.samples import PADDING_ID
from tests.support.cutting import whole_state
from tests.support.driver import Job, ShardedTrainer, as_pair, build, gather_everywhere

INPUTS = ("self_attn.o_proj", "mlp.down_proj")
CUT_LAYERS = (1, 2)


@contextmanager
def seen_inputs(trainer: ShardedTrainer) -> Iterator[dict[str, list[Tensor]]]:
    """Yields what enters o_proj and down_proj in the measured passes, without padding, by hooks of our own."""
    seen: dict[str, list[Tensor]] = {}
    attention_mask: list[Tensor] = []

    def see_ids(module: Any, args: tuple[Any, ...], fields: dict[str, Tensor]) -> None:
        ids = fields["input_ids"]
        padded = int(trainer.samples.lengths().min()) < trainer.samples.window
        attention_mask[:] = [ids != PADDING_ID if padded else torch.ones_like(ids).bool()]

    def see(key: str, module: Any, inputs: tuple[Any, ...]) -> None:
        if trainer.pruner.moments is not None and trainer.pruner.moments._masks is not None:
            seen.setdefault(key, []).append(inputs[0].detach()[attention_mask[0]].clone())

    handles = [trainer.engine.deepspeed.register_forward_pre_hook(see_ids, with_kwargs=True)]
    handles += [
        lora_linear(trainer.model.layers[i], linear.linear).register_forward_pre_hook(
            partial(see, f"{i}.{linear.linear}")
        )
        for i, linear in trainer.model.shape.linears()
        if linear.linear in INPUTS
    ]
    yield seen
    for handle in handles:
        handle.remove()


def whole_layers(
    trainer: ShardedTrainer, names: tuple[str, ...] = INPUTS
) -> dict[str, dict[str, Tensor]]:
    """Gathers weight, bias and LoRA of linears of all layers, by names like "1.mlp.down_proj"."""
    found = {}
    for i, linear in ((i, x) for i, x in trainer.model.shape.linears() if x.linear in names):
        module = lora_linear(trainer.model.layers[i], linear.linear)
        own: dict[str, Any] = {
            n.split(".")[0]: p for n, p in module.named_parameters() if not n.endswith("bias")
        }
        if module.base_layer.bias is not None:
            own["bias"] = module.base_layer.bias
        found[f"{i}.{linear.linear}"] = {
            n: gather_everywhere(trainer.model, p) for n, p in own.items()
        }
    return found


def compensate_once(job: Job, *kept: list[int]) -> dict[str, Any]:
    """Makes two measured steps, a refit for a cut of nothing, and one for a cut of layers 1 and 2 to `kept`."""
    trainer = build(job)
    moments = trainer.pruner.moments
    assert moments is not None
    steps: list[dict[str, Tensor]] = []
    for step in (1, 2):
        with seen_inputs(trainer) as seen:
            trainer.step(step)
        mine = {key: torch.cat(parts) for key, parts in seen.items()}
        parts = trainer.model.comm.gather_objects(mine)
        steps.append({key: torch.cat([part[key] for part in parts]) for key in mine})
    before = whole_layers(trainer)
    everything = all_groups(trainer.model.shape)
    moments.compensate(everything, 1)
    untouched = whole_layers(trainer)
    chosen = LayerKeep(zip(trainer.model.shape.kinds, map(torch.tensor, kept), strict=True))
    keep = [chosen if i in CUT_LAYERS else k for i, k in enumerate(everything)]
    held = storage_bytes(moments.sums.values())
    owned = {f"{linear_id.layer}.{linear_id.name}" for linear_id in moments.sums}
    moments.compensate(keep, 1)
    after = whole_layers(trainer)
    moments.cut(keep)
    trainer.model.cut(keep)
    trainer.pruner.average.cut(keep)
    return {
        "steps": steps,
        "before": before,
        "untouched": untouched,
        "after": after,
        "owned": owned,
        "moment_bytes": held,
        "moments": {
            f"{key.layer}.{key.name}": value / moments.tokens for key, value in moments.sums.items()
        },
        "next_loss": trainer.step(3).loss,
    }


def fisher_scores(job: Job) -> dict[str, Any]:
    """Makes one step with `fisher`. Returns scores and bytes sent to score."""
    trainer = build(job)
    model, score = trainer.model, trainer.pruner.score
    sent: list[int] = []

    def count_and_score(step: int) -> None:
        before = model.comm.bytes_sent
        score(step)
        sent.append(model.comm.bytes_sent - before)

    model.lora_factors = Mock(side_effect=AssertionError("LoRA was gathered"))  # type: ignore[method-assign]
    trainer.pruner.score = count_and_score  # type: ignore[method-assign]
    trainer.step(1)
    return {"scores": [as_pair(s) for s in trainer.pruner.average.scores or []], "sent": sent}


def train_and_cut(job: Job) -> dict[str, Tensor]:
    """Makes all steps and cuts of a job. Returns every weight, master and moment."""
    trainer = build(job)
    for step in range(1, len(job.batches) + 1):
        trainer.step(step)
        trainer.cut(step)
    return whole_state(trainer)


def first_pass(job: Job) -> dict[str, Any]:
    """Makes the passes of the first step. Returns its loss and averaged LoRA gradients."""
    trainer = build(job)
    model, samples = trainer.model, trainer.samples
    batch = trainer.order.batch(0)
    supervised = int((samples.inputs(batch)["labels"][:, 1:] != -100).sum())
    loss = float(trainer._accumulate(1, batch, supervised)) / supervised
    gradients = {}
    for i, layer in enumerate(model.lora_factors()):
        for name, factors in layer.items():
            gradients[f"layers.{i}.{name}.lora_A"] = factors.grad_A
            gradients[f"layers.{i}.{name}.lora_B"] = factors.grad_B
    return {"loss": sum(model.comm.gather_objects(loss)), "gradients": gradients}
