"""Does on the ranks what the tests of a single cut or a single scoring look at."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed
from deepspeed import comm as ds_comm
from deepspeed.utils import safe_set_local_grad
from torch import Tensor

from loraprune_ds.model.adapters import add_lora, lora_linear, lora_weights
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning import prunable_model
from loraprune_ds.pruning.importance import score_groups
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks import comm
from loraprune_ds.ranks.flat import GATHERED_NUMEL, owned_range, pad, partition_numel
from loraprune_ds.train import optimizer
from loraprune_ds.zero import sharded
from loraprune_ds.zero.sharded import ShardedState
from tests.support.driver import MOMENTS, Job, ShardedTrainer, as_pair, build, gather_everywhere
from tests.support.families import LLAMA_LINEARS, LlamaLinear
from tests.support.ranks import RENAMED
from tests.support.refusals import refused

COLLECTIVES = (
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_reduce",
    "broadcast",
    "all_to_all_single",
)
COLLECTIVES += ("gather", "all_gather")


@contextmanager
def watched_collectives(see: Callable[[str, list[Tensor], Any], None]) -> Iterator[None]:
    """Calls `see` with name, tensors and group of every collective, DeepSpeed's and this package's."""
    backend: Any = ds_comm.comm.cdb

    def watching(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            see(
                name,
                [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)],
                kwargs.get("group"),
            )
            return call(*args, **kwargs)

        return wrapped

    watched: dict[str, Any] = {name: watching(name, getattr(backend, name)) for name in COLLECTIVES}
    own = {name: watching(name, getattr(torch.distributed, name)) for name in COLLECTIVES}
    own |= {new: own[old] for new, old in RENAMED.items()}
    with (
        patch.multiple(backend, **watched),
        patch.object(comm, "dist", SimpleNamespace(**vars(torch.distributed) | own)),
    ):
        yield


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Yields (name, elements given by this rank) of every collective."""
    calls: list[tuple[str, int]] = []

    def see(name: str, tensors: list[Tensor], _: Any) -> None:
        if name != "reduce_scatter_tensor":
            given = (
                tensors[1]
                if name in ("all_gather_into_tensor", "all_to_all_single")
                else tensors[0]
            )
            calls.append((name, given.numel()))

    with watched_collectives(see):
        yield calls


def after_backward(job: Job, step: int = 1) -> ShardedTrainer:
    """A trainer that has the gradients of a step and has not applied them."""
    trainer = build(job)
    for done in range(1, step):
        trainer.step(done)
    batch = trainer.order.batch(step - 1)
    trainer._accumulate(
        step, batch, int((trainer.samples.inputs(batch)["labels"][:, 1:] != -100).sum())
    )
    return trainer


def score_shards_and_whole(
    job: Job, corrupt: bool = False, gathered_numel: int = GATHERED_NUMEL
) -> dict[str, Any]:
    """Scores the owned shards and records the collectives. Adds all that the oracle needs to score the whole."""
    trainer = after_backward(job, step=2)
    model = trainer.model
    weights = [
        {
            linear.name: gather_everywhere(model, _weight(trainer, i, linear))
            for linear in LLAMA_LINEARS
        }
        for i in range(len(model.layers))
    ]
    if corrupt and model.rank == model.world_size - 1:
        shard = model.owned_weight(LinearId(1, LLAMA_LINEARS[1].name)).flat
        shard[len(shard) // 2] += 0.5
    with (
        recorded_collectives() as calls,
        patch.object(prunable_model, "GATHERED_NUMEL", gathered_numel),
    ):
        scores = score_groups(model, "lora", 2).by_layer("none")
    factors = list(model.lora_factors())
    return {
        "scores": [as_pair(s) for s in scores],
        "calls": calls,
        "weights": weights,
        "factors": [
            {n: (f.A, f.B, f.grad_A, f.grad_B, f.scaling) for n, f in layer.items()}
            for layer in factors
        ],
        "lora_shards": sum(p.ds_tensor.ds_numel for p in _trainable(trainer)),
    }


def _weight(trainer: ShardedTrainer, layer: int, linear: LlamaLinear) -> Any:
    return lora_linear(trainer.model.layers[layer], linear.name).base_layer.weight


def _trainable(trainer: ShardedTrainer) -> list[Any]:
    return [p for p in trainer.model.module.parameters() if p.requires_grad]


def whole_state(trainer: ShardedTrainer) -> dict[str, Tensor]:
    """Gathers every tensor that a cut carries: frozen weights, LoRA copies, masters and moments."""
    model = trainer.model
    state = ShardedState(model.zero_optimizer, _trainable(trainer), model.layout)
    found = {}
    for name, parameter in trainer.model.module.named_parameters():
        found[name] = gather_everywhere(model, parameter)
        if parameter.requires_grad:
            for key in ("master", *MOMENTS):
                found[f"{name}/{key}"] = gather_everywhere(
                    model, parameter, state.shard(parameter, key)
                )
    return found


def some_keep(trainer: ShardedTrainer, heads: list[int], channels: list[int]) -> list[LayerKeep]:
    """Keeps these groups in layers 1 and 2, and everything in the others."""
    dense = trainer.model.shape.counts
    chosen = LayerKeep(heads=torch.tensor(heads), channels=torch.tensor(channels))
    whole = [
        LayerKeep(heads=torch.arange(layer["heads"]), channels=torch.arange(layer["channels"]))
        for layer in dense
    ]
    return [chosen if i in (1, 2) else keep for i, keep in enumerate(whole)]


def cut_once(job: Job, heads: list[int], channels: list[int]) -> dict[str, Any]:
    """Makes one cut. Returns the state before and after, the traffic, and how many old shards are alive."""
    trainer = build(job)
    trainer.step(1)
    trainer.step(2)
    before = whole_state(trainer)
    keep = some_keep(trainer, heads, channels)
    old = [weakref.ref(t) for t in _replaced_tensors(trainer)]
    with recorded_collectives() as calls:
        sent = trainer.model.cut(keep)
    trainer.pruner.average.cut(keep)
    gc.collect()
    return {
        "before": before,
        "after": whole_state(trainer),
        "sent": sent,
        "calls": calls,
        "alive": sum(ref() is not None for ref in old),
        "shape": trainer.model.shape,
        "engine_steps": (
            trainer.engine.deepspeed.global_steps,
            float(trainer.engine.deepspeed.get_lr()[0]),
        ),
        "next_loss": trainer.step(3).loss,
    }


def cut_once_with_fp32_lora(job: Job, heads: list[int], channels: list[int]) -> dict[str, Any]:
    """Makes one cut of a live model with fp32 LoRA on a half-precision base, PEFT's default."""

    def add_fp32_lora(*given: Any) -> Any:
        model = add_lora(*given)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
        return model

    with patch.object(optimizer, "add_lora", add_fp32_lora):
        return cut_once(job, heads, channels)


def shards_at_each_emptying(job: Job, heads: list[int], channels: list[int]) -> list[int]:
    """Counts the old shards of cut weights that are alive, each time that a cut gives pinned memory back."""
    trainer = build(job)
    trainer.step(1)
    old = [
        weakref.ref(_weight(trainer, i, linear).ds_tensor)
        for i in (1, 2)
        for linear in LLAMA_LINEARS
    ]
    alive: list[int] = []
    with patch.object(
        sharded, "empty_host_cache", lambda: alive.append(sum(ref() is not None for ref in old))
    ):
        trainer.model.cut(some_keep(trainer, heads, channels))
    return alive


def _replaced_tensors(trainer: ShardedTrainer) -> list[Tensor]:
    zero = trainer.model.zero_optimizer
    cut_weights = [
        _weight(trainer, i, linear).ds_tensor for i in (1, 2) for linear in LLAMA_LINEARS
    ]
    moments = [state[key] for state in zero.optimizer.state.values() for key in MOMENTS]
    copies = (
        zero.param_groups_fp16_flat_cpu_memory if zero.offload_param else [zero.lp_param_buffer]
    )
    return [*cut_weights, *moments, zero.grad_partitions_flat_buffer, *copies]


def masks_from_saved_gradients(job: Job, gradients: dict[str, Tensor] | None) -> dict[str, Any]:
    """Returns the masks of a cut from given whole gradients. By default it takes these ranks' own gradients."""
    trainer = after_backward(job)
    model = trainer.model
    named = {n: p for n, p in trainer.model.module.named_parameters() if p.requires_grad}
    if gradients is not None:
        for name, parameter in named.items():
            start, end = owned_range(gradients[name].numel(), model.world_size, model.rank)
            shard = gradients[name].reshape(-1)[start:end]
            safe_set_local_grad(
                parameter, pad(shard, partition_numel(gradients[name].numel(), model.world_size))
            )
    names = [[n for n, p in named.items() if p is w] for w in _lora_in_order(trainer)]
    whole: dict[str, Tensor] = {}
    for layer in model.lora_factors():
        for factors in layer.values():
            for gradient in (factors.grad_A, factors.grad_B):
                whole[names[len(whole)][0]] = gradient
    trainer.pruner.score(1)
    scores = trainer.pruner.average.scores
    assert scores is not None
    keep = trainer.pruner._rank(scores, job.prune["ratio"])
    return {
        "gradients": whole,
        "masks": [(k["heads"].tolist(), k["channels"].tolist()) for k in keep],
    }


def _lora_in_order(trainer: ShardedTrainer) -> list[Any]:
    linears = (
        lora_linear(layer, linear.name)
        for layer in trainer.model.layers
        for linear in LLAMA_LINEARS
    )
    return [weight for linear in linears for weight in lora_weights(linear)]


# Things that go wrong


def disagree(job: Job) -> str:
    """Makes the last rank rank its groups the other way round. Every rank must say so, cut nothing, and not hang."""
    trainer = build(job)
    model = trainer.model
    trainer.step(1)
    if model.rank == model.world_size - 1:
        for layer in trainer.pruner.average.scores or []:
            for values in layer.values():
                values.neg_()
    before = model.shape
    message = refused(trainer.cut, 1)
    assert model.shape == before
    return message


def poisoned(job: Job, where: str) -> str:
    """Puts a number that is not finite on one rank: into a weight, a gradient, or a weight only as it is scored."""
    trainer = build(job)
    if where == "loss":
        if trainer.model.rank == 0:
            trainer.model.owned_weight(LinearId(2, LLAMA_LINEARS[-1].name)).flat[0] = float("nan")
    elif where == "gradient":
        before_update = trainer.pruning.before_update

        def poison_then_score(*own: Any, **options: Any) -> Any:
            if trainer.model.rank == trainer.model.world_size - 1:
                weight = _lora_in_order(trainer)[2 * 14 + 1]  # layer 2, q_proj, B
                zero = trainer.model.zero_optimizer
                zero.get_local_fp32_grad_for_param(weight)
                slot = zero._get_fp32_grad_state_partition(weight, release_swap_buffers=True)[0]
                slot[0] = float("inf")
            return before_update(*own, **options)

        trainer.pruning.before_update = poison_then_score  # type: ignore[method-assign]
    else:
        trainer.pruner.model = cast(PrunableModel, _PoisonedScores(trainer.model))
    return refused(lambda: (trainer.step(1), trainer.cut(1), trainer.step(2)))


class _PoisonedScores:  # stands in for a PrunableModel
    """A model whose weight of layer 1 overflows only when it is scored."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def owned_weight(self, linear_id: LinearId) -> Any:
        shard = self._model.owned_weight(linear_id)
        if linear_id.layer == 1:
            shard.flat[0] = float("inf")
        return shard
