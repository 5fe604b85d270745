"""What pruning adds to a training on the simulated device: launches, waits and bytes, beside PEFT alone."""

import gc
from collections import Counter
from dataclasses import dataclass, field, replace
from operator import sub
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from loraprune_ds import PruneConfig, Pruning
from loraprune_ds.config_types import Frozen
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import QuantisedLinear
from loraprune_ds.model.storage import Storage
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.session.quantised import AdoptedLora
from tests.support.device import MEMORY, NAME, Counts, counted

SAMPLES, TOKENS, VOCABULARY = 4, 32, 512  # of a rank and step
STEPS = 9
CUT = 3  # the first: all layers lose groups of both kinds
PLAIN = 2  # a step without a cut. AdamW has its state by then
MOMENTS = "add_half_of_product"  # adds a pass to the moments of a linear


@dataclass(frozen=True)
class Case:
    """A training of a small Llama, up to its first cut.

    Attributes:
        engine: `one`, `ddp`, `fsdp2` or `zero3`.
        criterion: None: PEFT alone.
        frozen: storage of the decoder layers' linears, in one process and on DDP. None: fp32.
    """

    engine: str = "one"
    criterion: str | None = None
    refit: bool = False
    layers: int = 6
    hidden: int = 128
    frozen: Frozen | None = None


@dataclass
class Counted:
    """Counts of each step, and of its end, where the cut is. `alive` are the bytes right before the end.

    Attributes:
        before: bytes that the process held before the training.
    """

    before: int
    steps: list[Counts] = field(default_factory=list)
    ends: list[Counts] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)


class Cost(NamedTuple):
    """What a rank does. `peak` and `moved` are bytes."""

    launches: int
    waits: int
    peak: int
    moved: int


@dataclass
class Added:
    """What pruning adds on a rank.

    Attributes:
        alone: what a step of PEFT alone has. Its peak has the training's state.
        step: beside it.
        cut: of the lines of the package alone. What passes that are repeated launch is the model's. Its peak is above
            what is alive.
        moments: launches that add the passes to the moments of linears. They are in `cut`, too.
    """

    alone: Cost
    step: Cost
    cut: Cost
    moments: int


def added(*cases: Case) -> list[Added]:
    """Trains each case, and PEFT alone of the first. Collective."""
    alone = _plain_step(train(replace(cases[0], criterion=None)))
    return [_added(train(case), alone) for case in cases]


def _plain_step(found: Counted) -> Cost:
    return cost_of_step(found.steps[PLAIN - 1], found.before)


def _added(pruned: Counted, alone: Cost) -> Added:
    end = pruned.ends[CUT - 1]
    by_function = Counter[str]()
    for (_, line), times in end.launches.items():
        by_function[line.partition(" ")[2]] += times
    return Added(
        alone=alone,
        step=beside(_plain_step(pruned), alone),
        cut=cost_of_cut(end, pruned.alive[CUT - 1]),
        moments=by_function[MOMENTS],
    )


def cost_of_step(counts: Counts, before: int) -> Cost:
    """Returns what a step costs. `before` are bytes that were alive before its training."""
    peak = counts.peak - before
    return Cost(counts.launches.total(), counts.waits.total(), peak, moved(counts))


def cost_of_cut(counts: Counts, alive: int) -> Cost:
    """Returns what lines of the package cost. `alive` are the bytes before the cut."""
    above = counts.peak - alive
    return Cost(of_ours(counts.launches), of_ours(counts.waits), above, moved(counts))


def beside(step: Cost, alone: Cost) -> Cost:
    return Cost(*map(sub, step, alone))


def moved(counts: Counts) -> int:
    """Counts the bytes between host and device, and those put into collectives."""
    return counts.bytes_to_device + counts.bytes_to_host + counts.bytes_collected


def shards_of_a_cut(case: Case) -> float:
    """Returns the bytes that the cut takes above what is alive, in shards of a layer. Collective."""
    found = train(case)
    layer = _model(case).base_model.model.model.layers[0]
    copies = dist.get_world_size() if case.engine in ("fsdp2", "zero3") else 1
    shard = sum(parameter.nbytes for parameter in layer.parameters()) / copies
    return (found.ends[CUT - 1].peak - found.alive[CUT - 1]) / shard


def of_ours(counts: Counter[tuple[str, str]]) -> int:
    """Counts what a line of the package does."""
    return sum(times for (_, line), times in counts.items() if line)


def train(case: Case) -> Counted:
    """Makes the steps up to the first cut. Collective."""
    gc.collect()
    found = Counted(before=MEMORY.alive)
    model = _model(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = _wrap(case, model, AdamW(trained, lr=1e-2, foreach=True))
    pruning = _pruning(case, wrapped, optimizer)
    for step in range(1, CUT + 1):
        ids = _batch(step).to(NAME)
        with counted() as counts:
            if pruning is not None:
                pruning.begin_step()
            loss = wrapped(input_ids=ids, labels=ids).loss
            if case.engine == "zero3":
                wrapped.backward(loss)
                wrapped.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            del loss
            gc.collect()
            found.alive.append(counts.alive)
            with counted() as end:
                if pruning is not None:
                    pruning.end_step()
        found.steps.append(counts)
        found.ends.append(end)
    if pruning is not None:
        pruning.close()
    return found


def _model(case: Case) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    base = AutoModelForCausalLM.from_config(config)
    if case.frozen is not None:
        _store(base, Storage(case.frozen, case.refit, torch.float32))
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), QuantisedLinear):
            module.__class__ = AdoptedLora
    return model.train().to(NAME)


def _store(base: Any, storage: Storage) -> None:
    """Stores the linears as QLoRA's base has them, once it is adopted."""
    in_4_bits = storage.frozen == "nf4"
    bits = {"load_in_4bit": in_4_bits, "load_in_8bit": not in_4_bits, "bnb_4bit_quant_type": "nf4"}
    base.config.quantization_config = BitsAndBytesConfig(**bits)
    shape = shape_from_config(base.config.to_dict(), "counted")
    layers = decoder_layers(base)
    for i, spec in shape.linears():
        stored_as = storage.format(spec)
        assert stored_as is not None
        stock: Any = layers[i].get_submodule(spec.linear)
        tensors = stored_as.split(stock.weight)
        layers[i].set_submodule(spec.linear, QuantisedLinear(stock, stored_as, tensors))


def _wrap(case: Case, model: Any, optimizer: AdamW) -> tuple[Any, Any]:
    """Wraps a model and its optimizer as users of the engine do."""
    if case.engine == "ddp":
        return DistributedDataParallel(model), optimizer
    if case.engine == "fsdp2":
        mesh = init_device_mesh(NAME, (dist.get_world_size(),))
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    if case.engine == "zero3":
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}
        config = {"train_micro_batch_size_per_gpu": SAMPLES, "zero_optimization": zero}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        engine.train()
        return engine, engine.optimizer
    return model, optimizer


def _pruning(case: Case, wrapped: nn.Module, optimizer: Any) -> Pruning | None:
    """Returns the pruning. All layers lose as much in each cut, so that counts don't depend on scores."""
    if case.criterion is None:
        return None
    settings: Any = {
        "criterion": case.criterion,
        "compensate": "least_squares" if case.refit else "none",
        "ranking": "uniform",
        "ratio": 0.4,
        "prune_every": CUT,
        "channel_multiple": 1,
        "protected_first": 0,
        "protected_last": 0,
    }
    return Pruning(wrapped, optimizer, PruneConfig(**settings), STEPS)


def _batch(step: int) -> torch.Tensor:
    """Returns the samples of this rank."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SAMPLES * ranks, TOKENS), generator=generator)
    return ids.chunk(ranks)[dist.get_rank()]
