"""One training of a tiny model on each engine that joins other loops. tests/numerics/test_engines.py runs over them.

A new engine adds a function to `ENGINES`: it wraps a PEFT model and the optimizer of its LoRA, as its users do.
"""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from loraprune_ds import Pruning
from loraprune_ds.engine.cutting import parameter_cuts
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engines import connect, future_engine, holder
from loraprune_ds.model.adapters import base_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.passes import KeptPasses
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.replay import refit_by_replay
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import current_device, storage_bytes
from loraprune_ds.session.live import live_shape
from tests.oracle.models import ODD_SIZES, make_batches
from tests.support.driver import MOMENTS
from tests.support.local_training import PRUNE, STEPS, make_model

SAMPLES = 4
TOKENS = 12
MAX_NORM = 1e-3  # every step is clipped
KEEP = LayerKeep(heads=torch.tensor([0, 2]), channels=torch.tensor([i for i in range(45) if i % 3]))
CUT_LAYERS = (1, 2)
# whose gradients become NaN, and whose weight is overwritten
LAYER = 2
LINEAR = "mlp.up_proj"


@dataclass(frozen=True)
class Loop:
    """What a training loop calls.

    Attributes:
        model: makes the passes.
        optimizer: as the loop gets it, for `connect`.
        backward: of a loss, which is a mean over this rank's samples.
        update: clips to `MAX_NORM`, makes the update and drops the gradients.
    """

    model: nn.Module
    optimizer: Any
    backward: Callable[[Tensor], Any]
    update: Callable[[], None]


def on_zero_3(peft_model: nn.Module, optimizer: AdamW) -> Loop:
    engine, *_ = deepspeed.initialize(
        model=peft_model, optimizer=optimizer, config=ds_config(), dist_init_required=False
    )
    return Loop(engine, engine.optimizer, engine.backward, engine.step)


def ds_config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    } | more


def locally(peft_model: nn.Module, optimizer: AdamW) -> Loop:
    model = peft_model
    if dist.get_world_size() > 1:
        model = DistributedDataParallel(peft_model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Loop(model, optimizer, torch.Tensor.backward, update)


def on_fsdp2(peft_model: nn.Module, optimizer: AdamW) -> Loop:
    shard_rows(peft_model)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer.param_groups[0]["params"] = trained

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Loop(peft_model, optimizer, torch.Tensor.backward, update)


def shard_rows(peft_model: nn.Module) -> None:
    if isinstance(peft_model, FSDPModule):
        return
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder_layers(peft_model):
        fully_shard(layer, mesh=mesh)
    fully_shard(peft_model, mesh=mesh)


def sharded_at_birth(peft_model: nn.Module) -> None:
    """Shards all but LoRA, which PEFT adds to a sharded model."""
    for name, module in peft_model.named_modules():
        if ".lora_" not in name and list(module.parameters(recurse=False)):
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config())


# name of the engine -> wraps a model; and shards a dense model before there is an optimizer, where users do that
ENGINES: dict[str, Callable[[nn.Module, AdamW], Loop]] = {
    "zero3": on_zero_3,
    "fsdp2": on_fsdp2,
    "local": locally,
}
BEFORE: dict[str, Callable[[nn.Module], None]] = {"zero3": sharded_at_birth, "fsdp2": shard_rows}


@dataclass
class Found:
    """What one training shows. Tensors are full, and on rank 0 alone."""

    engine: str = ""
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    norms: list[float] = field(default_factory=list)
    nonfinite: list[int | None] = field(default_factory=list)  # in a good step, then with a NaN
    losses: list[float] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)  # after one more step
    restored: dict[str, Tensor] = field(default_factory=dict)  # from `after`
    updates: set[float] = field(default_factory=set)  # that Adam has counted then
    overwritten: Tensor | None = None
    owned: tuple[int, Tensor] = (
        0,
        torch.empty(0),
    )  # where its part of a weight begins, and that part
    weight_bytes: list[list[int]] = field(default_factory=list)  # before and after the cut
    freed: int = 0  # bytes of all tensors of this rank


class Training:
    """Trains on one engine, connected with the pruner as `Pruning` does it."""

    def __init__(self, name: str, peft_model: Any) -> None:
        trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        self.peft_model = peft_model
        self.loop = ENGINES[name](peft_model, AdamW(trained, lr=1e-2))
        self.model: PrunableModel = connect(
            LiveTraining(
                self.loop.model, peft_model, live_shape(peft_model), self.loop.optimizer, None
            )
        )
        self.loop.model.train()

    def step(self, number: int, passes: KeptPasses | None = None) -> float:
        """Makes the step of a global batch. Returns the mean loss over the ranks."""
        size = SAMPLES // self.model.world_size
        first = self.model.rank * size
        ids = batch(number)[first : first + size].to(self.model.device)
        with nullcontext() if passes is None else passes.record_forward(None):
            loss = self.loop.model(input_ids=ids, labels=ids).loss
        self.loop.backward(loss)
        self.loop.update()
        return sum(self.model.comm.gather_objects(loss.item())) / self.model.world_size

    def tensors(self) -> dict[str, Tensor]:
        """Collects weights by their names, masters, and moments ("{name}/exp_avg"). Collective."""
        found = dict[str, Tensor]()
        names = {parameter: name for name, parameter in self.peft_model.named_parameters()}
        for parameter, name in names.items():
            full = self.model.collect(parameter, 0)
            if full is not None:
                found[name] = full.cpu().clone()
        for layer in self.model.lora_parameters():
            masters = self.model.collect_named(layer, 0, master=True)
            states = self.model.optimizer_state.collect(layer, 0)
            found |= {f"{names[layer[key]]}/master": x.cpu().clone() for key, x in masters.items()}
            for key, state in states.items():
                short, _, kind = key.rpartition(".")
                if kind != "step":
                    found[f"{names[layer[short]]}/{kind}"] = state.cpu().clone()
        return found


def batch(number: int) -> Tensor:
    """Returns the samples of a global batch: (SAMPLES, TOKENS)."""
    return make_batches(steps=number, samples=SAMPLES, tokens=TOKENS, vocab=97, seed=3)[-1][0]


def some_keep(shape: ModelShape) -> list[LayerKeep]:
    """Keeps some groups in two layers, and all in the others."""
    keep = list[LayerKeep]()
    for i, counts in enumerate(shape.counts):
        whole = LayerKeep({kind: torch.arange(count) for kind, count in counts.items()})
        keep.append(KEEP if i in CUT_LAYERS else whole)
    return keep


def sliced(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cuts full tensors by plain index_select. It asks a whole model in this process which parameters are cut."""
    model = make_model(folder)
    shape = live_shape(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    cuts = dict[str, Any]()
    for i in CUT_LAYERS:
        layer = model.get_base_model().model.layers[i]
        cuts |= {names[p]: kept for p, kept in parameter_cuts(layer, shape.layers[i], KEEP)}
    expected = dict[str, Tensor]()
    for name, tensor in tensors.items():
        kept = cuts.get(name.partition("/")[0])
        expected[name] = tensor if kept is None else tensor.index_select(kept.axis, kept.keep)
    return expected


def train(name: str, folder: Path) -> Found:
    """Makes two steps, a cut, a step, a return to the state after the cut, and a step with a NaN."""
    found = Found()
    training = Training(name, make_model(folder))
    model = training.model
    found.engine = model.engine

    def look() -> None:
        for i, layer in enumerate(model.lora_factors()):
            for linear, factors in layer.items():
                name = f"base_model.model.model.layers.{i}.{linear}.lora_"
                found.gradients.setdefault(f"{name}A.default.weight", factors.grad_A)
                found.gradients.setdefault(f"{name}B.default.weight", factors.grad_B)
        found.nonfinite.append(model.nonfinite_layer())
        norms = model.comm.gather_objects(float(model.gradient_norm()))
        found.norms.append(model.layout.norm(norms))

    undo = model.before_each_update(look)
    found.losses.append(training.step(1))
    undo()
    found.losses.append(training.step(2))
    found.before = training.tensors()
    found.weight_bytes.append(model.weight_bytes())
    found.freed = live_bytes()
    model.cut(some_keep(model.shape))
    found.freed -= live_bytes()
    found.weight_bytes.append(model.weight_bytes())
    found.after = training.tensors()
    found.losses.append(training.step(3))
    found.trained = training.tensors()
    _restore(training, found.after)
    found.restored = training.tensors()
    first = model.lora_parameters()[0]
    states = model.optimizer_state.collect(first, 0)
    found.updates = {float(x) for name, x in states.items() if name.endswith(".step")}
    found.overwritten = _overwrite(model)
    part = model.owned_weight(LinearId(LAYER, LINEAR))
    found.owned = (part.start, part.flat.clone())
    _poison(model)
    model.before_each_update(look)
    training.step(4)
    return found


def refit(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Makes two steps, a refit by their passes, and a step. Returns all before and after it, and the last loss."""
    training = Training(name, make_model(folder).to(current_device()))
    model = training.model
    passes = KeptPasses(model)
    passes.begin_step()
    for number in (1, 2):
        training.step(number, passes)
    passes.detach()
    before = training.tensors()
    refit_by_replay(model, some_keep(model.shape), passes.passes(), 2)
    return before, training.tensors(), training.step(3)


def live_bytes() -> int:
    gc.collect()
    tensors = (x for x in gc.get_objects() if isinstance(x, Tensor) and not x.is_meta)
    # the rows of a DTensor are a tensor of their own
    return storage_bytes(x for x in tensors if not isinstance(x, DTensor))


def _restore(training: Training, saved: dict[str, Tensor]) -> None:
    """Restores masters and moments from full tensors of rank 0."""
    model = training.model
    (saved, *_) = model.comm.gather_objects(saved)
    names = {parameter: name for name, parameter in training.peft_model.named_parameters()}
    layers = model.lora_parameters()

    def read(layer: int) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for short, parameter in layers[layer].items():
            found[short] = saved[f"{names[parameter]}/master"]
            found[f"{short}.step"] = torch.tensor(2.0)
            for key in MOMENTS:
                found[f"{short}.{key}"] = saved[f"{names[parameter]}/{key}"]
        return found

    model.optimizer_state.restore(layers, read)


def _overwrite(model: PrunableModel) -> Tensor | None:
    """Overwrites a weight by what the last rank has. Returns it on rank 0."""
    weight = base_parameter(model.layers[LAYER], f"{LINEAR}.weight")
    owner = model.world_size - 1
    with torch.no_grad():
        model.overwrite(weight, owner, new_weight() if model.rank == owner else None)
    return model.collect(weight, 0)


def new_weight() -> Tensor:
    """Returns a weight for that linear after the cut. No two elements are equal."""
    shape = (len(KEEP["channels"]), ODD_SIZES["hidden"])
    return torch.arange(math.prod(shape)).view(shape) / math.prod(shape)


def _poison(model: PrunableModel) -> None:
    """Makes the gradients of one linear's LoRA NaN, and no others."""
    linear: Any = model.layers[LAYER].get_submodule(LINEAR)
    linear.lora_A.default.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
    linear.lora_B.default.register_forward_hook(_return_nan)


def _return_nan(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient * math.nan)


def cut_before_training(name: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Cuts a dense model, and fills a weight again. Returns the engine that it expects, and the tensors that it has."""
    peft_model = make_model(folder)
    comm = Communicator()
    if name in BEFORE:
        BEFORE[name](peft_model)
    engine = future_engine(peft_model)
    shape = live_shape(peft_model)
    engine.cut_before_training(peft_model, shape, some_keep(shape), comm)
    weight = base_parameter(decoder_layers(peft_model)[LAYER], f"{LINEAR}.weight")
    with torch.no_grad():
        layout = holder(weight).layout(weight, comm)
        layout.fill(weight, lambda start, end: new_weight().view(-1)[start:end])
    return engine.name, Training(name, peft_model).tensors()


def overflow_on_zero_3(folder: Path) -> list[bool]:
    """Trains in fp16, with a loss scale that is too large at first. Returns which steps were skipped."""
    peft_model = make_model(folder).half().train()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    half = {"enabled": True, "initial_scale_power": 15, "hysteresis": 1}
    # Some CPUs have no fp16 in oneDNN, and torch's own kernels, which are enough here, always do.
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        engine, *_ = deepspeed.initialize(
            model=peft_model,
            optimizer=AdamW(trained, lr=1e-2),
            config=ds_config(fp16=half),
            dist_init_required=False,
        )
    pruning = Pruning(engine, engine.optimizer, PRUNE, STEPS)
    ids = batch(1)[pruning.model.rank :: pruning.model.world_size]
    for _ in range(3):
        pruning.begin_step()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        pruning.end_step()
    return [step.skipped for step in pruning.recorder.history.steps]
