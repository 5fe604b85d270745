"""Compares bytes that real ranks hold, send and keep for autograd with their plan. Traffic is a bound."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as ds_comm
from deepspeed.utils import groups
from torch import Tensor, nn

from loraprune_ds import config
from loraprune_ds.engines import run_engine
from loraprune_ds.model.frozen import DENSE
from loraprune_ds.model.groups import LayerKeep, LayerSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.plan.activations import saved_in_layer
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import Request, build_request
from loraprune_ds.plan.stages import split_state, training_stage
from loraprune_ds.pretrained.pretrained import open_for_pruning
from loraprune_ds.pretrained.read_shape import read_model_config, shape_from_config
from loraprune_ds.ranks.device import resident_bytes, storage_bytes
from loraprune_ds.ranks.flat import AxisCut
from loraprune_ds.train.data.samples import Samples
from tests.benchmarks.memory import Peak
from tests.support.cutting import watched_collectives
from tests.support.driver import Consecutive, ShardedTrainer, assemble
from tests.support.zero_bytes import elements_sent, second_copies, state_tensors, weight_shards

STEPS = 4  # the cut follows the second
IN_GROUP = "weights_in_group"  # gathered inside a group of hpZ. Other bytes go to all ranks


@dataclass(frozen=True)
class Case:
    """A small run: one micro-batch per rank and step, or more."""

    folder: Path
    deepspeed: str | None = "ds_configs/zero3.json"
    dtype: config.Dtype = "bfloat16"
    frozen: config.Frozen | None = None
    window: int = 16
    micro_batch_size: int = 1
    micro_batches: int = 1
    per_node: int | None = None  # ranks. None: all are on one node
    checkpointing: bool = False
    dropout: float = 0.0
    compensate: config.Compensation = "none"
    criterion: config.Criterion = "lora"
    ratio: float = 0.4
    head_ratio: float | None = None
    distilled: bool = False
    protected_first: int | None = None

    def request(self, world_size: int) -> Request:
        schedule: Any = {"prune_every": 1, "warmup_fraction": 0.25, "cooldown_fraction": 0.5}
        prune: Any = {
            "channel_multiple": 1,
            "ratio": self.ratio,
            "head_ratio": self.head_ratio,
            "ranking": "uniform",
        }
        prune |= {"criterion": self.criterion, "normalize": "l2", "compensate": self.compensate}
        size = self.micro_batch_size
        train: Any = {
            "micro_batch_size": size,
            "global_batch_size": size * self.micro_batches * world_size,
        }
        train |= {"steps": STEPS, "distill_weight": 0.5 * self.distilled}
        run = config.RunConfig(
            output_dir="unused",
            deepspeed=self.deepspeed,
            model=config.ModelConfig(path=str(self.folder), dtype=self.dtype, frozen=self.frozen),
            lora=config.LoraConfig(lora_dropout=self.dropout),
            data=config.DataConfig(window=self.window),
            prune=config.PruneConfig(
                **prune, **schedule, protected_first=self.protected_first, protected_last=0
            ),
            train=config.TrainConfig(**train, gradient_checkpointing=self.checkpointing),
        )
        name, per_node = str(self.folder), self.per_node or world_size
        source, where = (
            read_model_config(name),
            Cluster(nodes=world_size // per_node, gpus_per_node=per_node),
        )
        return build_request(name, source, shape_from_config(source, name), run, where)


def build(request: Request) -> ShardedTrainer:
    """Builds the package's trainer on random tokens."""
    run = request.config
    pretrained = open_for_pruning(Path(run.model.path), run.model)
    pretrained = pretrained.with_refits(run.prune.compensate)
    generator = torch.Generator().manual_seed(0)
    size = run.train.global_batch_size
    ids = torch.randint(
        3, request.shape.vocab_size, (STEPS * size, run.data.window), generator=generator
    )
    labels = ids.clone()
    if request.shape.family.has_encoder:  # the first half of each window is a source
        labels[:, : run.data.window // 2 + 1] = IGNORE_INDEX
    samples = Samples.of_windows(ids, labels)
    trainer = assemble(run, pretrained, request.ds_config, samples, Consecutive(size), STEPS)
    if request.taught:
        given = "sdpa", run.model.dtype, request.ds_config
        engine = run_engine(sharded=not request.is_local)
        trainer.teacher = engine.build_inference_engine(pretrained, *given, head=False)
    return trainer


def modules(trainer: ShardedTrainer) -> list[nn.Module]:
    """Lists the model and the teacher."""
    return [trainer.model.module, *([trainer.teacher.module] if trainer.teacher else [])]


@contextmanager
def counted_bytes(world_size: int, rank: int) -> Iterator[dict[str, int]]:
    """Counts bytes that this rank sends by collective. All-gathers of a part of the ranks are `IN_GROUP`."""
    sent: dict[str, int] = defaultdict(int)
    others = world_size - 1
    # position of what is given, elements sent of it
    rules: dict[str, tuple[int, Callable[[Tensor], float]]] = {
        "all_gather_into_tensor": (1, lambda given: given.numel() * others),
        "reduce_scatter_tensor": (1, lambda given: given.numel() // world_size * others),
        "all_reduce": (0, lambda given: given.numel() if others else 0),
        "broadcast": (0, lambda given: given.numel() if others and rank == 0 else 0),
    }

    def see(name: str, tensors: list[Tensor], group: Any) -> None:
        if name in rules:
            position, elements = rules[name]
            given = tensors[position]
            if group is not None and group is groups._ZERO_PARAM_INTRA_PARALLEL_GROUP:
                assert name == "all_gather_into_tensor", f"{name} of a part of the ranks"
                sent[IN_GROUP] += (
                    given.numel() * (ds_comm.get_world_size(group) - 1) * given.element_size()
                )
            else:
                sent[name] += int(elements(given)) * given.element_size()

    with watched_collectives(see):
        yield sent


def run_beside_plan(case: Case) -> dict[str, Any]:
    """Makes four steps and a cut on this rank. Returns each planned number with the measured one."""
    gc.collect()
    baseline = resident_bytes()
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    request = case.request(world_size)
    trainer = build(request)
    rows, steps = (
        [_state_row("loaded", request, trainer, stepped=False, baseline=baseline)],
        list[dict[str, Any]](),
    )
    for step in range(1, STEPS + 1):
        steps.append(_measured_step(step, request, trainer, baseline))
        before, sent_before = trainer.model.shape, trainer.model.comm.bytes_sent
        with Peak() as cutting:
            record = trainer.cut(step)
        if record is None:
            continue
        after, sent = trainer.model.shape, trainer.model.comm.bytes_sent - sent_before
        keep = trainer.pruner.kept_of_dense  # the first cut: indices into the dense model
        layers = [
            (layer, keep[i])
            for i, layer in enumerate(before.layers)
            if layer.counts != after.layers[i].counts
        ]
        cut_layers = [cut for layer, kept in layers for cut in layer_cuts(layer, kept, request)]
        moved = sum(elements_sent(c, world_size, rank) * size for c, size in cut_layers)
        rows.append(_state_row("after the cut", request, trainer, stepped=True, baseline=baseline))
        rows[-1] |= {"sent": {"moved": moved, "counted": sent}, "peak_rss": cutting.peak - baseline}
    return {"rank": rank, "states": rows, "steps": steps}


def layer_cuts(layer: LayerSpec, keep: LayerKeep, request: Request) -> list[tuple[AxisCut, int]]:
    """Lists (cut, bytes of an element) of every tensor that is cut in a layer, LoRA's master and moments too."""
    cuts: list[tuple[AxisCut, int]] = []
    lora_rank = request.config.lora.r
    element_size = request.element_size
    for spec, kept in layer.cuts(keep):
        stored_as = request.storage.format(spec) or DENSE
        for stored in request.storage.parts(spec).values():
            cuts.append((AxisCut(stored.shape, *stored_as.kept(kept)), stored.dtype.itemsize))
        if spec.lora:
            factors = spec.lora_shapes(lora_rank)
            for which, stays in spec.lora_cuts(lora_rank, kept.keep, keep):
                cuts.append((AxisCut(factors[which], *stays), element_size + 12))
    return cuts


def run_with_second_copy(case: Case) -> dict[str, Any]:
    """Does the same with a DeepSpeed config that has hpZ. Its groups are the process's: no later test may find them."""
    try:
        return run_beside_plan(case)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def held_in_one_process(case: Case) -> tuple[int, int]:
    """Makes a step in this process. Returns the planned and the held bytes, gradients apart, which are None again."""
    request = case.request(1)
    trainer = build(request)
    trainer.step(1)
    terms, _ = split_state(request, trainer.model.shape)
    tensors = [parameter for module in modules(trainer) for parameter in module.parameters()]
    optimizer = trainer.model.optimizer
    assert optimizer is not None
    state = [value for of in optimizer.state.values() for value in of.values() if value.dim()]
    return sum(terms.values()) - terms["lora_gradients"], storage_bytes([*tensors, *state])


def _state_row(
    name: str, request: Request, trainer: ShardedTrainer, *, stepped: bool, baseline: int
) -> dict[str, Any]:
    gc.collect()
    terms, _ = split_state(request, trainer.model.shape)
    terms["lora_moments"] *= stepped
    terms.pop("second_copy", None)  # no pass has gathered weights of this shape yet
    return {
        "at": name,
        "planned_storages": sum(terms.values()),
        "storages": storage_bytes(
            [*state_tensors(trainer.model), *chain(*map(weight_shards, modules(trainer)))]
        ),
        "rss": resident_bytes() - baseline,
        "terms": terms,
    }


def _measured_step(
    step: int, request: Request, trainer: ShardedTrainer, baseline: int
) -> dict[str, Any]:
    shape, world_size, rank = trainer.model.shape, request.world_size, trainer.model.rank
    comm, before = trainer.model.comm, trainer.model.comm.bytes_sent
    with counted_bytes(world_size, rank) as sent, Peak() as peak:
        trainer.step(step)
    scores, own = step <= request.schedule.last_cut, comm.bytes_sent - before
    lora_scored = scores and request.config.prune.criterion in ("lora", "magnitude")
    lora_shards = request.lora_shards(shape) * (world_size - 1)
    of_lora = 8 * lora_shards * lora_scored
    agreed = 8 * 8 * (world_size - 1)  # fp64 numbers of a step (`RankNumbers`)
    return {
        "step": step,
        "weights": sent["all_gather_into_tensor"] - of_lora - agreed,
        IN_GROUP: sent[IN_GROUP],
        "second_copy": {
            "planned": split_state(request, shape)[0].get("second_copy", 0),
            "counted": storage_bytes(chain(*map(second_copies, modules(trainer)))),
        },
        "lora_gradients": {
            "planned": 4 * request.micro_batches * lora_shards,
            "counted": sent["reduce_scatter_tensor"],
        },
        "pruning": {
            "planned": of_lora + 8 * _scores(request, shape) * (scores and world_size > 1),
            "counted": own - agreed,
        },
        "resident_planned": training_stage("", request, shape, scores=scores).resident,
        "peak_planned": planned_peak(request, shape, scores=scores),
        "peak_rss": peak.peak - baseline,
        "rss": resident_bytes() - baseline,
    }


def _scores(request: Request, shape: ModelShape) -> int:
    """Counts the scores that ranks add up."""
    if request.config.prune.criterion == "fisher":
        return sum(run.scores for _, linear in shape.input_linears() for run in linear.spans)
    return sum(run.groups for _, linear in shape.linears() for run in linear.spans)


def planned_peak(request: Request, shape: ModelShape, *, scores: bool) -> int:
    """Returns the peak of a step, without evaluation."""
    stage = training_stage("", request, shape, scores=scores)
    phases = (sum(terms.values()) for name, terms in stage.phases.items() if name != "evaluation")
    return stage.resident + max(phases)


def saved_activations(case: Case) -> dict[str, int]:
    """Counts the bytes that autograd keeps of one forward pass, weights apart. Returns those of the formula, too."""
    request = case.request(1)
    trainer = build(request)
    parameters = list(trainer.model.module.parameters())
    # held: a delta net drops a part of its graph, and its memory with it
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in parameters}
            # which is the mask of a dropout
            and (tensor.is_floating_point() or tensor.dtype == torch.uint8)
        ):
            kept[storage.data_ptr()] = storage
        return tensor

    ids = trainer.samples.inputs(torch.arange(case.micro_batch_size))["input_ids"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.engine.module(input_ids=ids, labels=ids).sum()
    del loss
    batch, shape = request.batch(case.micro_batch_size, case.window), request.shape
    counted = sum(storage.nbytes() for storage in kept.values())
    return {
        "counted": counted,
        "last_layer": saved_in_layer(request, shape, len(shape.layers) - 1, batch),
    }
