"""The sizes of the models, and a trainer on random weights and random tokens. The weights are not on the disk."""

import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from loraprune_ds.config import ModelConfig
from loraprune_ds.files import write_json
from loraprune_ds.plan.request import Request
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.pretrained.read_shape import LLAMA_SIZES, read_model, read_model_config
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.ranks.device import current_device, is_cpu
from loraprune_ds.zero.device import accelerator
from tests.support.driver import ShardedTrainer
from tests.support.plan_cases import Case, build
from tests.support.published import sizes_of

# the default would wait at every fetch, of which one rank needs none
OVERLAP = "ds_configs/zero3_overlap.json"


@dataclass(frozen=True)
class Sizes:
    """Describes a LLaMA and its runs."""

    hidden: int
    layers: int
    heads: int
    channels: int
    vocab: int
    window: int
    micro_batches: Sequence[int]
    multiple: int  # of channels, that a cut takes
    cuts: int


def sizes(name: str) -> Sizes:
    """Returns the sizes of a named model, or tiny ones without a GPU."""
    if is_cpu():
        return Sizes(64, 4, 4, 256, 97, 32, (1, 2), 64, 2)
    return Sizes(
        *LLAMA_SIZES[name],
        vocab=32_000,
        window=512,
        micro_batches=(1, 4, 16),
        multiple=128,
        cuts=20,
    )


@dataclass(frozen=True)
class RandomWeights(ModelWeights):
    """Makes its weights up where they are needed, on the device."""

    def read_flat(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(end - start, dtype=dtype, device=current_device())
        return values.fill_(1.0) if name.endswith("norm.weight") else values.normal_(0.0, 0.02)


def open_random(folder: Path, _: ModelConfig) -> PretrainedModel:
    config = read_model_config(str(folder))
    shape, modules = read_model(config, str(folder))
    return PretrainedModel(folder, config, modules, RandomWeights(shape, {}, {}, {}))


def make_trainer(
    size: Sizes, *, ranks: int = 1, deepspeed: str = OVERLAP, **settings: Any
) -> tuple[ShardedTrainer, Request]:
    """Builds an engine with a trainer, and what the planner needs. The ranks have been started."""
    config = sizes_of(
        "llama", size.hidden, size.channels, size.layers, size.heads, vocab_size=size.vocab
    )
    with (
        tempfile.TemporaryDirectory() as name,
        patch("tests.support.plan_cases.open_for_pruning", open_random),
    ):
        write_json(Path(name, "config.json"), config | {"architectures": ["LlamaForCausalLM"]})
        common: dict[str, Any] = {
            "checkpointing": True,
            "dropout": 0.05,
            "ratio": 0.3,
            "protected_first": 0,
        }
        case = Case(Path(name), deepspeed, window=size.window, **common, **settings)
        return build(request := case.request(ranks)), request


def device_bytes() -> dict[str, int]:
    """Returns bytes of host memory, and what torch allocated, reserved, and the card has in use (0 on a CPU)."""
    host = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if is_cpu():
        return {"host": host, "allocated": 0, "reserved": 0, "card": 0}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = accelerator().memory_allocated(), accelerator().memory_reserved()
    return {"host": host, "allocated": allocated, "reserved": reserved, "card": total - free}
