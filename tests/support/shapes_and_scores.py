"""Model shapes and group scores that the unit tests of pruning make up for themselves."""

import random
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.groups import Attribute, LayerKeep, LayerSpec, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.goal import Goal, make_goal
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.ranking import rank
from tests.support.families import LLAMA_LINEARS
from tests.support.paper import FREE, PAPER

KINDS = ("heads", "channels")


def make_layer(marks: Iterable[TensorSpec | Attribute], hidden: int) -> LayerSpec:
    """A layer of these tensors, whose other axis is the hidden one, with two norms."""
    marks = list(marks)
    tensors = [resize(mark, hidden) for mark in marks if isinstance(mark, TensorSpec)]
    tensors += [
        TensorSpec(f"{name}_layernorm.weight", shape=(hidden,))
        for name in ("input", "post_attention")
    ]
    return LayerSpec(
        0, tuple(tensors), tuple(mark for mark in marks if isinstance(mark, Attribute))
    )


def llama_marks(config: SimpleNamespace) -> list[TensorSpec | Attribute]:
    """The marks of a LLaMA's tensors. The family has names of other MLPs, too."""
    names = {linear.name for linear in LLAMA_LINEARS}
    marks = FAMILIES["llama"].layer(config, 0)
    return [mark for mark in marks if not isinstance(mark, TensorSpec) or mark.linear in names]


def resize(mark: TensorSpec, hidden: int) -> TensorSpec:
    along = sum(run.size for run in mark.spans)
    return replace(mark, shape=(along, hidden) if mark.axis == 0 else (hidden, along))


def make_shape(
    layers: list[tuple[int, int]],
    *,
    hidden: int = 16,
    head_dim: int = 4,
    queries_per_group: int = 1,
) -> ModelShape:
    """A Llama of (heads, channels) per layer."""
    outer = {
        "model.embed_tokens.weight": (50, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (50, hidden),
    }
    configs = {
        (heads, channels): SimpleNamespace(
            hidden_size=hidden,
            vocab_size=50,
            head_dim=head_dim,
            num_attention_heads=heads * queries_per_group,
            num_key_value_heads=heads,
            intermediate_size=channels,
        )
        for heads, channels in layers
    }
    made = {counts: make_layer(llama_marks(c), hidden) for counts, c in configs.items()}
    return ModelShape(
        model_type="llama",
        kinds=KINDS,
        layers=tuple(made[counts] for counts in layers),
        outer=tuple(TensorSpec(name, shape=shape) for name, shape in outer.items()),
        config=configs[layers[0]],
    )


SMOLLM2 = make_shape([(3, 1536)] * 30, hidden=576, head_dim=64, queries_per_group=3)
LLAMA_7B = make_shape([(32, 11008)] * 32, hidden=4096, head_dim=128)


def random_scores_of(
    shape: ModelShape, generator: torch.Generator, *, levels: int | None = None
) -> list[LayerScores]:
    """One draw per group; with `levels` few distinct values, so that most groups are tied."""

    def draw(count: int) -> Tensor:
        scores = torch.rand(count, generator=generator, dtype=torch.float64)
        return scores if levels is None else (scores * levels).floor()

    return [
        LayerScores({kind: draw(layer[kind]) for kind in shape.kinds}) for layer in shape.counts
    ]


def random_shape(draw: random.Random, *, uniform: bool) -> ModelShape:
    layers = draw.randint(1, 7)
    counts = [(draw.randint(1, 9), draw.randint(1, 60)) for _ in range(1 if uniform else layers)]
    return make_shape(
        counts * layers if uniform else counts,
        hidden=draw.choice([8, 24]),
        head_dim=draw.choice([2, 4, 7]),
        queries_per_group=draw.choice([1, 2, 3]),
    )


def goal_of(shape: ModelShape, **prune: Any) -> Goal:
    """The goal of a run. No layer is protected and no multiple is above 1, unless `prune` says so."""
    return make_goal(PruneConfig(**PAPER | FREE | {"ratio": 1e-4} | prune), shape)


def random_goal(draw: random.Random, *, uniform: bool, **drawn: list[Any]) -> Goal:
    """Settings that leave something to cut. `drawn` has the values of more settings to draw from."""
    choices = {
        "channel_multiple": [1, 1, 4, 16],
        "tensor_parallel": [1, 1, 1, 2],
        "protected_last": [0, 1],
        **drawn,
    }
    while True:
        prune = {name: draw.choice(values) for name, values in choices.items()}
        try:
            return goal_of(random_shape(draw, uniform=uniform), **prune)
        except UserError:
            continue


def keep_of(kept: Iterable[tuple[list[int], list[int]]]) -> list[LayerKeep]:
    """The groups to keep, from (heads, channels) per layer."""
    return [
        LayerKeep(heads=torch.tensor(heads), channels=torch.tensor(channels))
        for heads, channels in kept
    ]


def gone(shape: ModelShape, dense: ModelShape) -> int:
    """Linear parameters removed so far."""
    return dense.linear_numel() - shape.linear_numel()


def cut_to(shape: ModelShape, seed: int = 0, **prune: Any) -> ModelShape:
    """Returns the shape after a cut with random scores."""
    scores = random_scores_of(shape, torch.Generator().manual_seed(seed))
    goal = make_goal(PruneConfig(**PAPER | prune), shape)
    return shape.after(rank(scores, shape, goal, 1))
