"""The sizes of the network, read from a Hugging Face config and nowhere else.

A decoder layer has two kinds of groups. All of a group leaves together.
  heads     one key-value head with all the query heads that read it. Under MHA it is one head.
  channels  one MLP channel.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from loraprune_ds.errors import UserError

Kind = Literal["heads", "channels"]
KINDS: tuple[Kind, Kind] = ("heads", "channels")
# The models that can be pruned: `model_type` in config.json -> class name. build.CAUSAL_LMS has the classes.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "pruned_llama": "PrunedLlamaForCausalLM",
    "pruned_mistral": "PrunedMistralForCausalLM",
}
SUPPORTED_MODEL_TYPES = tuple(ARCHITECTURES)


@dataclass(frozen=True)
class Linear:
    """Describes one LoRA-adapted linear of a decoder layer and its part in a group."""

    name: str  # path inside the decoder layer, as in the weight files
    kind: Kind
    axis: Literal[0, 1]  # the axis of weight (out_features, in_features) that a cut makes smaller
    queries: bool = False  # True: one group is head_dim * queries_per_group wide, else head_dim


LINEARS: tuple[Linear, ...] = (
    Linear("self_attn.q_proj", "heads", 0, queries=True),
    Linear("self_attn.k_proj", "heads", 0),
    Linear("self_attn.v_proj", "heads", 0),
    Linear("self_attn.o_proj", "heads", 1, queries=True),
    Linear("mlp.gate_proj", "channels", 0),
    Linear("mlp.up_proj", "channels", 0),
    Linear("mlp.down_proj", "channels", 1),
)
LINEAR_NAMES = tuple(linear.name.split(".")[1] for linear in LINEARS)  # PEFT's target_modules
INPUT_LINEARS = tuple(linear for linear in LINEARS if linear.axis == 1)  # o_proj and down_proj, which lose inputs


@dataclass(frozen=True)
class LayerShape:
    """Holds the counts of one decoder layer that pruning changes."""

    heads: int  # key-value heads = head groups
    channels: int  # intermediate_size

    def count(self, kind: Kind) -> int:
        return self.heads if kind == "heads" else self.channels


@dataclass(frozen=True)
class ModelShape:
    """Holds all sizes that matter to pruning. Names are those of the Hugging Face config where it has them."""

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_group: int  # num_attention_heads / num_key_value_heads, the same in every layer
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    layers: tuple[LayerShape, ...]

    def group_width(self, linear: Linear) -> int:
        """Counts the rows (axis 0) or columns (axis 1) of `linear` that belong to one group."""
        if linear.kind == "channels":
            return 1
        return self.head_dim * (self.queries_per_group if linear.queries else 1)

    def linear_shape(self, layer: int, linear: Linear) -> tuple[int, int]:
        """Returns (out_features, in_features) of a linear at this layer's current width."""
        width = self.layers[layer].count(linear.kind) * self.group_width(linear)
        return (width, self.hidden_size) if linear.axis == 0 else (self.hidden_size, width)

    def has_bias(self, linear: Linear) -> bool:
        """Tells if this linear has one, in every layer."""
        return self.attention_bias if linear.kind == "heads" else self.mlp_bias

    def lora_sizes(self, lora_rank: int) -> list[int]:
        """Returns the elements of every LoRA factor, layer by layer."""
        return [numel for i in range(len(self.layers)) for numel in self.layer_lora_sizes(i, lora_rank)]

    def layer_lora_sizes(self, layer: int, lora_rank: int) -> list[int]:
        """Returns those of one layer. Each linear has A (r, in_features), then B (out_features, r)."""
        return [lora_rank * width for linear in LINEARS for width in reversed(self.linear_shape(layer, linear))]

    def group_numel(self, kind: Kind) -> int:
        """Counts the linear parameters that leave with one group, without biases."""
        return sum(self.group_width(linear) * self.hidden_size for linear in LINEARS if linear.kind == kind)

    def layer_numel(self, layer: int) -> int:
        """Counts the linear parameters of one decoder layer. `prune.ratio` is a fraction of these."""
        return sum(self.layers[layer].count(kind) * self.group_numel(kind) for kind in KINDS)

    def linear_numel(self) -> int:
        """Counts the linear parameters of all decoder layers."""
        return sum(self.layer_numel(i) for i in range(len(self.layers)))

    def total_numel(self) -> int:
        """Counts all parameters once: embedding, head unless tied, norms, linears and their biases."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = self.hidden_size * (2 * len(self.layers) + 1)
        return embeddings + norms + self.linear_numel() + sum(self._bias_numel(layer) for layer in self.layers)

    def _bias_numel(self, layer: LayerShape) -> int:
        numel = 0
        if self.attention_bias:
            numel += layer.heads * self.head_dim * (self.queries_per_group + 2) + self.hidden_size
        if self.mlp_bias:
            numel += 2 * layer.channels + self.hidden_size
        return numel

    def with_layers(self, layers: tuple[LayerShape, ...]) -> "ModelShape":
        """Returns the same model with other widths."""
        return replace(self, layers=layers)

    @property
    def is_uniform(self) -> bool:
        """True if every layer has the same counts, so that a stock model class can hold it."""
        return len(set(self.layers)) == 1


def with_biases(shape: ModelShape, where: str) -> ModelShape:
    """Adds biases on all linears of the decoder layers, for `prune.compensate: bias`.

    Raises:
        UserError: its linears cannot have any. The line names `where`, the folder or hub id.
    """
    if shape.model_type not in ("llama", "pruned_llama"):
        raise UserError(f"prune.compensate: bias needs linears with biases, which a {shape.model_type} ({where}) lacks")
    return replace(shape, attention_bias=True, mlp_bias=True)


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """Reads `config.json` of a model of the LLaMA family, `per_layer_config` included.

    Raises:
        UserError: the model type is not supported. A size is missing or impossible. Key-value heads do not divide query
            heads. transformers refuses the query heads. The line names `where`, the folder or hub id.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: llama, mistral (and pruned)")
    try:
        num_layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
        given = cast(dict[str, dict[str, Any]], config.get("per_layer_config") or {})
        per_layer = {int(k): v for k, v in given.items()}
        sizes = [_layer_sizes(config | per_layer.get(i, {})) for i in range(num_layers)]
        vocab_size = int(config["vocab_size"])
        head_dim = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    except KeyError as error:
        raise UserError(f"{where}: config.json has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: config.json holds a size that is no number: {error}") from None
    if min(num_layers, hidden, vocab_size, head_dim, *(size for layer in sizes for size in layer)) < 1:
        raise UserError(f"{where}: config.json holds a size below 1")
    _check_heads(where, sizes, head_dim)
    if model_type == "llama" and hidden % sizes[0][0]:
        raise UserError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {sizes[0][0]}, which "
            "transformers' Llama requires"
        )
    llama_biases = model_type in ("llama", "pruned_llama")  # Mistral's linears never have any
    return ModelShape(
        model_type=model_type,
        hidden_size=hidden,
        head_dim=head_dim,
        queries_per_group=sizes[0][0] // sizes[0][1],
        vocab_size=vocab_size,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=llama_biases and bool(config.get("attention_bias", False)),
        mlp_bias=llama_biases and bool(config.get("mlp_bias", False)),
        layers=tuple(LayerShape(heads, channels) for _, heads, channels in sizes),
    )


def _check_heads(where: str, sizes: list[tuple[int, int, int]], head_dim: int) -> None:
    for i, (queries, heads, _) in enumerate(sizes):
        if queries % heads or queries // heads != sizes[0][0] // sizes[0][1]:
            raise UserError(
                f"{where}: layer {i} has {queries} query heads for {heads} key-value heads; every layer must have "
                "the same whole number of query heads per key-value head"
            )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")


def _layer_sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Returns query heads, key-value heads and channels."""
    queries = int(config["num_attention_heads"])
    return queries, int(config.get("num_key_value_heads") or queries), int(config["intermediate_size"])
