"""Runs refit, `fisher` and distillation on real ranks. Returns what a dense computation is compared with."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning import replay
from loraprune_ds.pruning.compensate import empty_half
from loraprune_ds.pruning.prunable_model import CollectedLinear, ComputeWeight, PrunableModel
from loraprune_ds.pruning.step import all_groups
from tests.support.cutting import whole_state
from tests.support.driver import Job, ShardedTrainer, as_pair, build, gather_everywhere

INPUTS = ("self_attn.o_proj", "mlp.down_proj")
CUT_LAYERS = (1, 2, 3)


@torch.no_grad()
def inputs_of_whole_passes(trainer: ShardedTrainer, job: Job, steps: int) -> dict[str, Tensor]:
    """Returns what enters o_proj and down_proj in the samples of the first steps, without padding.

    Every rank makes one ordinary forward pass over all of them, in evaluation mode.
    """
    samples = torch.arange(steps * len(job.batches[0][0]))
    ids = trainer.samples.inputs(samples)["input_ids"]
    inside = torch.ones_like(ids).bool()
    if job.lengths is not None:
        inside = torch.arange(ids.shape[1]) < torch.tensor(job.lengths)[samples, None]
    seen: dict[str, Tensor] = {}

    def see(key: str, module: Any, inputs: tuple[Any, ...]) -> None:
        seen[key] = inputs[0][inside].clone()

    handles = [
        lora_linear(trainer.model.layers[i], linear.linear).register_forward_pre_hook(
            partial(see, f"{i}.{linear.linear}")
        )
        for i, linear in trainer.model.shape.linears()
        if linear.linear in INPUTS
    ]
    trainer.engine.infer(input_ids=ids, labels=ids)
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def counted_halves() -> Iterator[list[int]]:
    """Lists how many halves of moments this rank holds, whenever there is one more."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def make(*arguments: Any) -> Tensor:
        half = empty_half(*arguments)
        made.append(weakref.ref(half))
        alive.append(sum(reference() is not None for reference in made))
        return half

    with patch.object(replay, "empty_half", make):
        yield alive


@contextmanager
def computed_weights(model: PrunableModel) -> Iterator[list[LinearId]]:
    """Lists the linears whose new weights this rank computes."""
    computed: list[LinearId] = []
    replace_weights = model.replace_weights

    def watch(linear_ids: Sequence[LinearId], compute: ComputeWeight) -> None:
        def compute_here(key: LinearId, linear: CollectedLinear) -> Tensor:
            computed.append(key)
            return compute(key, linear)

        replace_weights(linear_ids, compute_here)

    with patch.object(model, "replace_weights", watch):
        yield computed


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
    """Makes two steps, a refit for a cut of nothing, and one for a cut of some layers to `kept`."""
    trainer = build(job)
    model = trainer.model
    for step in (1, 2):
        trainer.step(step)
    passes = trainer.pruner.passes
    assert passes is not None
    inputs = inputs_of_whole_passes(trainer, job, steps=2)
    before = whole_layers(trainer)
    modes = [module.training for module in model.module.modules()]
    everything = all_groups(model.shape)
    replay.refit_by_replay(model, everything, passes.passes(), 2)
    untouched = whole_layers(trainer)
    chosen = LayerKeep(zip(model.shape.kinds, map(torch.tensor, kept), strict=True))
    keep = [chosen if i in CUT_LAYERS else k for i, k in enumerate(everything)]
    with counted_halves() as halves, computed_weights(model) as computed:
        replay.refit_by_replay(model, keep, passes.passes(), 2)
    after = whole_layers(trainer)
    assert [module.training for module in model.module.modules()] == modes
    model.cut(keep)
    trainer.pruner.average.cut(keep)
    return {
        "inputs": inputs,
        "before": before,
        "untouched": untouched,
        "after": after,
        "tokens": [step.tokens for step in passes.steps],
        "passes": [len(step.passes) for step in passes.steps],
        "halves": max(halves),
        "computed": {key.layer for key in computed},
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
