"""The sizes of the parts: LLaMA's on a GPU, tiny ones on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraprune_ds.model.read_shape import LLAMA
from loraprune_ds.zero.device import is_cpu


@dataclass(frozen=True)
class Sizes:
    """Describes a LLaMA, its batches and the widths that are compared."""

    hidden: int
    layers: int
    heads: int
    channels: int
    vocab: int
    window: int
    micro_batches: Sequence[int]
    widths: Sequence[int]  # of the MLP: even and odd ones
    rows: Sequence[int]  # tokens of a product
    hiddens: Sequence[int]  # hidden sizes of a product
    multiple: int  # of channels, that a cut takes
    cuts: int

    def config_json(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.channels,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        }


def sizes(name: str) -> Sizes:
    """Returns the sizes of a named model, or tiny ones without a GPU."""
    if is_cpu():
        return Sizes(64, 4, 4, 256, 97, 32, (1, 2), (256, 255), (16,), (64,), 64, 2)
    hidden, layers, heads, channels = LLAMA[name]
    widths = (11008, 11007, 11006, 11004, 11000, 10944, 4491, 4480)
    rows, hiddens = (700, 2048, 8192), (4096, 8192)
    return Sizes(hidden, layers, heads, channels, 32_000, 512, (1, 4, 16), widths, rows, hiddens, 128, 20)
