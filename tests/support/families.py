"""Random tiny models of every family: grouped queries, odd counts, and every special field in use."""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from loraprune_ds.model.classes import causal_lm_class, config_object
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.families.base import Family, Marks
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.groups import QUERY_HEADS, LayerCounts, TensorSpec
from loraprune_ds.model.shape import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text())
TINY: dict[str, dict[str, Any]] = _FILE["families"]
YARN: dict[str, Any] = _FILE["shared"]["yarn"]
COARSE = ("heads", "delta", "cross_heads", QUERY_HEADS)


class LlamaLinear(NamedTuple):
    """A linear of a LLaMA's layer: the kind of its groups, the axis that loses them, whether these are query heads."""

    name: str
    kind: str
    axis: int
    queries: bool = False


LLAMA_LINEARS = (
    LlamaLinear("self_attn.q_proj", "heads", 0, queries=True),
    LlamaLinear("self_attn.k_proj", "heads", 0),
    LlamaLinear("self_attn.v_proj", "heads", 0),
    LlamaLinear("self_attn.o_proj", "heads", 1, queries=True),
    LlamaLinear("mlp.gate_proj", "channels", 0),
    LlamaLinear("mlp.up_proj", "channels", 0),
    LlamaLinear("mlp.down_proj", "channels", 1),
)
EQUAL = tuple(name for name in TINY if FAMILIES[name].equal_layers)
CAUSAL = tuple(name for name in TINY if len(FAMILIES[name].layer_lists) == 1)
MIXTURES = tuple(name for name in TINY if FAMILIES[name].has_experts)
# Their first layer is dense, and the second one sparse.
MIXED = ("qwen2_moe", "glm4_moe", "ernie4_5_moe", "deepseek_v3", "deepseek_v2", "glm4_moe_lite")
MIXED += ("dots1", "exaone_moe", "lfm2_moe", "glm_moe_dsa", "mistral4")


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Returns the config of a tiny model of a family, with other fields where `changes` names them."""
    return AutoConfig.for_model(family, **SIZES | TINY[family] | changes)


def layers_with(shape: ModelShape, *counts: tuple[int, int]) -> tuple[LayerCounts, ...]:
    """Returns the layers of a model with these numbers of heads, and of channels or experts, where a layer has any.

    Of query heads so many stay for each key-value head. More layers than counts have them in turn.
    """

    def other(layer: int, kind: str, own: int, heads: int, others: int) -> int:
        if kind in shape.family.fixed or own == 0:
            return own
        return (
            heads * shape.layers[layer].ranges[kind]
            if kind in COARSE
            else others * shape.times(layer, kind)
        )

    assert 0 < len(counts) <= len(shape.counts)
    layers = enumerate(zip(shape.counts, cycle(counts), strict=False))
    return tuple(
        LayerCounts((kind, other(i, kind, own, *x)) for kind, own in layer.items())
        for i, (layer, x) in layers
    )


def is_seq2seq(family: str) -> bool:
    return family not in CAUSAL


def marks(family: str, layer: int = 0, **changes: Any) -> list[TensorSpec]:
    """Returns the tensors that the family of a tiny model marks."""
    config = FAMILIES[family].explicit(tiny_config(family, **changes).to_dict())
    found = FAMILIES[family].layer(config_object(config), layer)
    return [mark for mark in found if isinstance(mark, TensorSpec)]


def changed(family: str, change: Callable[[list[Any]], list[Any]]) -> Family:
    """Returns a family whose marks are changed."""

    class Changed(type(FAMILIES[family])):
        def layer(self, c: Any, i: int) -> Marks:
            return change(list(super().layer(c, i)))

    return Changed()


def kinds(family: str) -> list[str]:
    """Returns the kinds of groups of a family, in the order of the forward."""
    return list(
        dict.fromkeys(run.kind for mark in marks(family) if mark.lora for run in mark.spans)
    )


def norms_are_wide(family: str) -> bool:
    """Returns whether its norms run over all heads, which a cut may take."""
    return FAMILIES[family].wide_norms and "heads" not in FAMILIES[family].fixed


def families(*in_ci: str, of: Iterable[str] = TINY) -> list[Any]:
    """Returns the parameters of a test of families. Those that are not named wait for tests/run_heavy.sh."""
    return [name if name in in_ci else heavy(name) for name in of]


def heavy(*values: Any) -> Any:
    """Returns a case that waits for tests/run_heavy.sh."""
    return pytest.param(*values, marks=pytest.mark.heavy)


def heads_divide_hidden(family: str) -> bool:
    """Returns whether the stock config class wants a head count that divides hidden_size."""
    try:
        tiny_config(family, num_attention_heads=8, num_key_value_heads=4)
    except StrictDataclassError:
        return family not in EQUAL
    return False


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    attn_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Builds a tiny model with random weights, in evaluation mode. All norms and biases differ from their defaults."""
    config = tiny_config(family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # GPT-OSS draws its sinks
        how: Any = {"attn_implementation": attn_implementation, "experts_implementation": "eager"}
        model = causal_lm_class(family)._from_config(config, **how)
        if not (TINY[family] | changes).get("tie_word_embeddings", True) and is_seq2seq(family):
            model.all_tied_weights_keys.pop("lm_head.weight")
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                if name.endswith("A_log"):
                    # as initialised, sums of decays are so large that they round away what counts
                    parameter.fill_(-3)
                parameter.add_(noise * 0.3)
                if family == "nemotron" and name.endswith("norm.weight"):
                    # the norm adds one, and its weights begin with one all the same
                    parameter.sub_(1)
            elif name.endswith(CORRECTION):  # more would leave experts that no token chooses
                parameter.copy_(noise * 0.03)
            else:
                # in a T5, whose attention would be saturated
                unscaled = name.endswith((".q.weight", ".k.weight"))
                parameter.copy_(noise * (0.5 if "embed" in name else 0.05 if unscaled else 0.25))
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored:  # a router's correction
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.03)
    return model.to(dtype).eval()  # pyright: ignore[reportArgumentType]  # a decorator hides the type of `to`
