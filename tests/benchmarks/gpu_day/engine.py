"""The sizes of the parts, and a trainer on random weights and random tokens. Nothing is read from disk."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import Criterion, DataConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.model.pretrained import ModelWeights, PretrainedModel
from loraprune_ds.model.read_shape import LLAMA, read_model, shape_from_config
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import Request, build_request
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.device import accelerator, current_device, is_cpu
from tests.numerics.driver import assemble
from tests.published import sizes_of

STEPS = 1000  # more than any part makes


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
        sizes = sizes_of("llama", self.hidden, self.channels, self.layers, self.heads, vocab_size=self.vocab)
        return sizes | {"architectures": ["LlamaForCausalLM"]}


def sizes(name: str) -> Sizes:
    """Returns the sizes of a named model, or tiny ones without a GPU."""
    if is_cpu():
        return Sizes(64, 4, 4, 256, 97, 32, (1, 2), (256, 255), (16,), (64,), 64, 2)
    hidden, layers, heads, channels = LLAMA[name]
    widths = (11008, 11007, 11006, 11004, 11000, 10944, 4491, 4480)
    rows, hiddens = (700, 2048, 8192), (4096, 8192)
    return Sizes(hidden, layers, heads, channels, 32_000, 512, (1, 4, 16), widths, rows, hiddens, 128, 20)


@dataclass(frozen=True)
class RandomWeights(ModelWeights):
    """Makes its weights up where they are needed, on the device."""

    def read_flat(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(end - start, dtype=dtype, device=current_device())
        return values.fill_(1.0) if name.endswith("norm.weight") else values.normal_(0.0, 0.02)


@dataclass(frozen=True)
class SameBatch:
    """Gives the first samples at every step."""

    size: int

    def batch(self, step: int) -> Tensor:
        return torch.arange(self.size)


def make_request(
    size: Sizes, micro_batch: int, *, deepspeed: str, criterion: Criterion = "lora", ranks: int = 1
) -> Request:
    """Describes the run to the planner and to `make_trainer`."""
    config = RunConfig(
        output_dir="unused",
        deepspeed=deepspeed,
        model=ModelConfig(path="random"),
        data=DataConfig(window=size.window),
        prune=PruneConfig(
            ratio=0.3, criterion=criterion, channel_multiple=size.multiple, protected_first=0, protected_last=0
        ),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=micro_batch * ranks,
            micro_batch_size=micro_batch,
            gradient_checkpointing=True,
        ),
    )
    source, cluster = size.config_json(), Cluster(nodes=1, gpus_per_node=ranks)
    return build_request("random", source, shape_from_config(source, "random"), config, cluster)


def make_trainer(size: Sizes, request: Request) -> Trainer:
    """Builds an engine with a trainer. The ranks have been started."""
    config = request.config
    shape, modules = read_model(size.config_json(), "random")
    model = PretrainedModel(Path("random"), size.config_json(), modules, RandomWeights(shape, {}, {}, {}))
    batch = config.train.global_batch_size
    ids = torch.randint(3, size.vocab, (batch, size.window), generator=torch.Generator().manual_seed(0))
    samples = Samples.of_windows(ids)
    return assemble(config, model, request.ds_config, samples, SameBatch(batch), STEPS)


def device_bytes() -> dict[str, int]:
    """Returns bytes of host memory, and what torch allocated, reserved, and the card has in use (0 on a CPU)."""
    host = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if is_cpu():
        return {"host": host, "allocated": 0, "reserved": 0, "card": 0}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = accelerator().memory_allocated(), accelerator().memory_reserved()
    return {"host": host, "allocated": allocated, "reserved": reserved, "card": total - free}
