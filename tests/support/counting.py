"""What pruning adds to a training on the simulated device: launches, waits and bytes, beside PEFT alone."""

import gc
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig

from loraprune_ds import PruneConfig, Pruning
from loraprune_ds.model.classes import decoder_layers
from tests.support.device import NAME, Counts, counted

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
    """

    engine: str = "one"
    criterion: str | None = None
    refit: bool = False
    layers: int = 6
    hidden: int = 128


@dataclass
class Counted:
    """Counts of each step, and of its end, where the cut is. `alive` are the bytes right before the end."""

    steps: list[Counts] = field(default_factory=list)
    ends: list[Counts] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)


@dataclass
class Added:
    """(launches, waits) that pruning adds on a rank.

    Attributes:
        alone: what a step of PEFT alone has.
        step: beside it.
        cut: of the lines of the package alone. What passes that are repeated launch is the model's.
        moments: launches that add the passes to the moments of linears. They are in `cut`, too.
    """

    alone: tuple[int, int]
    step: tuple[int, int]
    cut: tuple[int, int]
    moments: int


def added(*cases: Case) -> list[Added]:
    """Trains each case, and PEFT alone of the first. Collective."""
    alone = train(replace(cases[0], criterion=None)).steps[PLAIN - 1]
    return [_added(train(case), alone) for case in cases]


def _added(pruned: Counted, without: Counts) -> Added:
    with_it = pruned.steps[PLAIN - 1]
    end = pruned.ends[CUT - 1]
    by_function = Counter[str]()
    for (_, line), times in end.launches.items():
        by_function[line.partition(" ")[2]] += times
    alone_launches, alone_waits = without.launches.total(), without.waits.total()
    return Added(
        alone=(alone_launches, alone_waits),
        step=(with_it.launches.total() - alone_launches, with_it.waits.total() - alone_waits),
        cut=(of_ours(end.launches), of_ours(end.waits)),
        moments=by_function[MOMENTS],
    )


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
    model = _model(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = _wrap(case, model, AdamW(trained, lr=1e-2, foreach=True))
    pruning = _pruning(case, wrapped, optimizer)
    found = Counted()
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
    lora = LoraConfig(r=8, target_modules="all-linear")
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora).train().to(NAME)


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
