"""Model shapes and group scores that the unit tests of pruning make up for themselves."""

import random
from pathlib import Path

import torch
from torch import Tensor

from loraprune_ds.model.family import LLAMA_LINEARS, Linear
from loraprune_ds.model.shapes import LayerShape, ModelShape
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.prunable_model import LayerKeep

BY_NAME: dict[str, Linear] = {linear.name: linear for linear in LLAMA_LINEARS}


def make_shape(
    layers: list[tuple[int, int]], *, hidden: int = 16, head_dim: int = 4, queries_per_group: int = 1
) -> ModelShape:
    """A Llama of (heads, channels) per layer."""
    return ModelShape(
        model_type="llama",
        hidden_size=hidden,
        head_dim=head_dim,
        queries_per_group=queries_per_group,
        vocab_size=50,
        tie_word_embeddings=False,
        layers=tuple(LayerShape(*layer) for layer in layers),
        layer_others={"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)},
        ends={
            "model.embed_tokens.weight": (50, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (50, hidden),
        },
    )


SMOLLM2 = make_shape([(3, 1536)] * 30, hidden=576, head_dim=64, queries_per_group=3)
LLAMA_7B = make_shape([(32, 11008)] * 32, hidden=4096, head_dim=128)


def random_scores_of(shape: ModelShape, generator: torch.Generator, *, levels: int | None = None) -> list[LayerScores]:
    """One draw per group; with `levels` few distinct values, so that most groups are tied."""

    def draw(count: int) -> Tensor:
        scores = torch.rand(count, generator=generator, dtype=torch.float64)
        return scores if levels is None else (scores * levels).floor()

    return [LayerScores(draw(layer.heads), draw(layer.channels)) for layer in shape.layers]


def random_shape(draw: random.Random, *, uniform: bool) -> ModelShape:
    layers = draw.randint(1, 7)
    counts = [(draw.randint(1, 9), draw.randint(1, 60)) for _ in range(1 if uniform else layers)]
    return make_shape(
        counts * layers if uniform else counts,
        hidden=draw.choice([8, 24]),
        head_dim=draw.choice([2, 4, 7]),
        queries_per_group=draw.choice([1, 2, 3]),
    )


def after(shape: ModelShape, keep: list[LayerKeep]) -> ModelShape:
    """The shape that is left."""
    return shape.with_layers(tuple(LayerShape(len(k.heads), len(k.channels)) for k in keep))


def gone(shape: ModelShape, dense: ModelShape) -> int:
    """Linear parameters removed so far."""
    return dense.linear_numel() - shape.linear_numel()


def repository() -> Path:
    return Path(__file__).parents[2]
