"""Runs real ranks beside their plan: what is held, what is sent, and what autograd keeps."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as ds_comm
from deepspeed.utils import groups
from torch import Tensor

from loraprune_ds.config import (
    Compensation,
    Criterion,
    DataConfig,
    Dtype,
    Frozen,
    LoraConfig,
    ModelConfig,
    PruneConfig,
    RunConfig,
    TrainConfig,
)
from loraprune_ds.model.pretrained import open_for_pruning, open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import quality
from loraprune_ds.plan.activations import logits, saved_by_layer
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.fetching import Fetcher, PassTraffic
from loraprune_ds.plan.held import split_state
from loraprune_ds.plan.passes import Network
from loraprune_ds.plan.request import Request, build_request
from loraprune_ds.plan.stages import Stage, cut_stage, training_stage
from loraprune_ds.plan.traffic import (
    IN_GROUP,
    Passes,
    StepKind,
    layer_cuts,
    moved_bytes,
    scales_sent,
    score_count,
    scoring_sent,
    step_sent,
)
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.engine import build_training_engine
from loraprune_ds.zero.memory import resident_bytes, second_copies, state_tensors, storage_bytes
from tests.benchmarks.peak import Peak

STEPS = 4  # the cut follows the second


@dataclass(frozen=True)
class Case:
    """A small run: one micro-batch per rank and step, or more."""

    folder: Path
    deepspeed: str = "ds_configs/zero3.json"
    dtype: Dtype = "bfloat16"
    frozen: Frozen | None = None
    window: int = 16
    micro_batch_size: int = 1
    micro_batches: int = 1
    per_node: int | None = None  # ranks. None: all are on one node
    checkpointing: bool = False
    dropout: float = 0.0
    compensate: Compensation = "none"
    criterion: Criterion = "lora"
    head_ratio: float | None = None
    evaluates: bool = False  # before the first step. The plan is not told, as it must change nothing.

    def request(self, world_size: int) -> Request:
        config = RunConfig(
            output_dir="unused",
            deepspeed=self.deepspeed,
            model=ModelConfig(path=str(self.folder), dtype=self.dtype, frozen=self.frozen),
            lora=LoraConfig(lora_dropout=self.dropout),
            data=DataConfig(window=self.window),
            prune=PruneConfig(
                channel_multiple=1,
                ratio=0.4,
                prune_every=1,
                warmup_fraction=0.25,
                cooldown_fraction=0.5,
                protected_last=0,
                compensate=self.compensate,
                criterion=self.criterion,
                head_ratio=self.head_ratio,
            ),
            train=TrainConfig(
                steps=STEPS,
                global_batch_size=self.micro_batch_size * self.micro_batches * world_size,
                micro_batch_size=self.micro_batch_size,
                gradient_checkpointing=self.checkpointing,
            ),
        )
        pretrained = open_pretrained(self.folder)
        per_node = self.per_node or world_size
        where = Cluster(nodes=world_size // per_node, gpus_per_node=per_node)
        return build_request(str(self.folder), pretrained.config, pretrained.shape, config, where)


@dataclass(frozen=True)
class InOrder:
    size: int

    def batch(self, step: int) -> Tensor:
        return torch.arange(step * self.size, (step + 1) * self.size)


def build(request: Request) -> Trainer:
    """Builds the package's trainer on random tokens."""
    config = request.config
    pretrained = open_for_pruning(Path(config.model.path), config)
    engine = build_training_engine(config, pretrained, request.ds_config, STEPS)
    pruner = Pruner(engine.model, config.prune, request.schedule, request.limits, config.seed)
    generator = torch.Generator().manual_seed(0)
    size = config.train.global_batch_size
    ids = torch.randint(3, request.shape.vocab_size, (STEPS * size, config.data.window), generator=generator)
    return Trainer(
        engine, pruner, Samples.of_windows(ids), InOrder(size), config.train, dtype=config.model.dtype, seed=config.seed
    )


@contextmanager
def counted_bytes(world_size: int, rank: int) -> Iterator[dict[str, int]]:
    """Counts the bytes that this rank sends by collective, below DeepSpeed's own front, whoever calls it.

    All-gathers of a part of the ranks are counted apart, as `IN_GROUP`.
    """
    backend: Any = ds_comm.comm.cdb
    sent: dict[str, int] = defaultdict(int)
    others = world_size - 1
    rules: dict[str, tuple[int, Callable[[Tensor], float]]] = {  # position of what is given, elements sent of it
        "all_gather_into_tensor": (1, lambda given: given.numel() * others),
        "reduce_scatter_tensor": (1, lambda given: given.numel() // world_size * others),
        "all_reduce": (0, lambda given: given.numel() if others else 0),
        "broadcast": (0, lambda given: given.numel() if others and rank == 0 else 0),
    }
    originals = {name: getattr(backend, name) for name in rules}

    def counting(name: str) -> Callable[..., Any]:
        position, elements = rules[name]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)][position]
            members = kwargs.get("group")
            group = ds_comm.get_world_size(members)
            if members is not None and members is groups._ZERO_PARAM_INTRA_PARALLEL_GROUP:
                assert name == "all_gather_into_tensor", f"{name} of a part of the ranks"
                sent[IN_GROUP] += given.numel() * (group - 1) * given.element_size()
            else:
                sent[name] += int(elements(given)) * given.element_size()
            return originals[name](*args, **kwargs)

        return wrapped

    for name in rules:
        setattr(backend, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)


def run_beside_plan(case: Case) -> dict[str, Any]:
    """Makes four steps and a cut on this rank. Every planned number stands beside the measured one."""
    gc.collect()
    baseline = resident_bytes()
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    request = case.request(world_size)
    with Peak() as loading:
        trainer = build(request)
        gc.collect()
    network = Network(request.source, request.shape, request.config.lora.r, request.element_size)
    fetcher = Fetcher(request.fetch_limits, world_size)
    rows = [_state_row("loaded", request, trainer, stepped=False, baseline=baseline)]
    rows[0]["peak_rss"] = loading.peak - baseline
    for _ in range(2 * case.evaluates):  # DeepSpeed would follow in the second the record of the first
        trainer.engine.infer(input_ids=trainer.samples.inputs(torch.arange(1))["input_ids"])
    steps = []
    for step in range(1, STEPS + 1):
        shape = trainer.model.shape
        visits = network.training_pass(checkpointing=case.checkpointing)
        first, *others = [fetcher.run(visits) for _ in range(case.micro_batches)]
        later = others[-1] if others else first
        passes = Passes(shape, PassTraffic(), training=first, later=later, update_sent=fetcher.end_step())
        steps.append(_measured_step(step, request, passes, trainer, baseline))
        before, kept_before = shape, trainer.model.comm.bytes_sent
        with Peak() as cutting:
            record = trainer.cut(step)
        if record is None:
            continue
        keep = trainer.pruner.kept_of_dense  # the first cut: indices into the dense model
        cuts = [layer_cuts(before, i, k, request.config.lora.r, request.element_size) for i, k in enumerate(keep)]
        cut_layers = [c for i, c in enumerate(cuts) if before.layers[i] != trainer.model.shape.layers[i]]
        moved = sum(int(moved_bytes(c, world_size)[rank]) for c in cut_layers)
        planned = (moved if world_size > 1 else 0) + agreement_bytes(before, world_size, rank)[1]
        planned += quality.refit_sent(request, before, trainer.model.shape, rank)
        network.resize(trainer.model.shape)
        fetcher.free_all()
        rows.append(_state_row("after the cut", request, trainer, stepped=True, baseline=baseline))
        planned_stage = cut_stage("", request, before, trainer.model.shape)
        rows[-1] |= {
            "sent": {"planned": planned, "counted": trainer.model.comm.bytes_sent - kept_before},
            "peak_rss": cutting.peak - baseline,
            "extra_rss": cutting.extra,
            "extra_planned": planned_stage.peak - planned_stage.resident,
        }
    return {"rank": rank, "states": rows, "steps": steps}


def run_with_second_copy(case: Case) -> dict[str, Any]:
    """Does the same with a DeepSpeed config that has hpZ. Its groups are the process's: no later test may find them."""
    try:
        return run_beside_plan(case)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def agreement_bytes(shape: ModelShape, world_size: int, rank: int) -> tuple[int, int]:
    """Returns (per step, per cut) what ranks tell each other besides: reports, digests, sizes, and rank 0's mask.

    In a step every rank sends four fp64 numbers. In a cut it sends three int64, and rank 0 one byte per group.
    """
    if world_size == 1:
        return 0, 0
    mask = sum(sum(layer.values()) for layer in shape.layers)
    return 5 * 8 * (world_size - 1), 3 * 8 * (world_size - 1) + (mask if rank == 0 else 0)


def _state_row(name: str, request: Request, trainer: Trainer, *, stepped: bool, baseline: int) -> dict[str, Any]:
    gc.collect()
    terms, _ = split_state(request, trainer.model.shape, stepped=stepped, passed=False)
    return {
        "at": name,
        "planned_storages": sum(terms.values()),
        "storages": storage_bytes(state_tensors(trainer.model)),
        "rss": resident_bytes() - baseline,
        "terms": terms,
    }


def _measured_step(step: int, request: Request, passes: Passes, trainer: Trainer, baseline: int) -> dict[str, Any]:
    shape, traffic = passes.shape, passes.training
    world_size, rank = request.cluster.world_size, trainer.model.rank
    comm, before = trainer.model.comm, trainer.model.comm.bytes_sent
    with counted_bytes(world_size, rank) as sent, Peak() as peak:
        trainer.step(step)
    scores, own = step <= request.schedule.last_cut, comm.bytes_sent - before
    planned = step_sent(request, passes, StepKind(scores, scores))
    if scores:
        planned["input_moments"] = quality.measuring_sent(request, shape, rank)
        planned["scoring"] = scoring_sent(request, shape, rank)
    not_gathered = planned["weight_gradients"] + planned["input_moments"]
    if scores and world_size > 1:
        not_gathered += 8 * score_count(request, shape)
        not_gathered += 0 if request.config.prune.criterion == "fisher" else scales_sent(request, shape, rank)
    pruning = planned["scoring"] + planned["weight_gradients"] + planned["input_moments"]
    stage = training_stage("", request, passes, scores=scores)
    return {
        "step": step,
        "weights": {
            "planned": planned["weights"],
            "counted": sent["all_gather_into_tensor"] - (own - not_gathered),
        },
        IN_GROUP: {"planned": planned[IN_GROUP], "counted": sent[IN_GROUP]},
        "second_copy": {
            "planned": split_state(request, shape)[0].get("second_copy", 0),
            "counted": storage_bytes(second_copies(trainer.model.module)),
        },
        "lora_gradients": {
            "planned": planned["lora_gradients"],
            "counted": sent["reduce_scatter_tensor"] - planned["weight_gradients"],
        },
        "pruning": {"planned": pruning + agreement_bytes(shape, world_size, rank)[0], "counted": own},
        "unplanned": {name: sent[name] for name in ("broadcast",)},
        "resident_planned": stage.resident,
        "peak_planned": planned_peak(stage, traffic, request),
        "peak_rss": peak.peak - baseline,
        "moments": stage.phases,
        "rss": resident_bytes() - baseline,
    }


def planned_peak(stage: Stage, traffic: PassTraffic, request: Request) -> int:
    """Returns the peak of a step, without evaluation and export. On CPU ranks gloo copies what it gathers."""
    copied = traffic.largest_gather if request.cluster.world_size > 1 else 0
    moments = {
        name: sum(terms.values()) + (copied if name == "training" else 0) for name, terms in stage.phases.items()
    }
    return stage.resident + max(held for name, held in moments.items() if name not in ("evaluation", "export"))


def saved_activations(case: Case) -> dict[str, int]:
    """Counts the bytes that autograd keeps of one forward pass, weights apart. The formula's stand beside them."""
    world_size = torch.distributed.get_world_size()
    request = case.request(world_size)
    trainer = build(request)
    parameters = list(trainer.model.module.parameters())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in parameters}
            and (tensor.is_floating_point() or tensor.dtype == torch.uint8)  # which is the mask of a dropout
        ):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = trainer.samples.inputs(torch.arange(case.micro_batch_size))["input_ids"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.engine.deepspeed(input_ids=ids, labels=ids).sum()
    del loss
    batch = request.batch(case.micro_batch_size, case.window)
    shape = request.shape
    dropout = case.dropout > 0
    layers = [
        saved_by_layer(request.source, shape, i, batch, lora_rank=8, dropout=dropout) for i in range(len(shape.layers))
    ]
    return {
        "counted": sum(kept.values()),
        "layers": sum(layers),
        "last_layer": layers[-1],
        "logits": logits(shape, batch, None),
    }
