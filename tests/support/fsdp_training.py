"""Trains under `Pruning` in a plain loop: in one process, or on gloo ranks that shard the model by `fully_shard`."""

import gc
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW

from loraprune_ds import PruneConfig, Pruning, linear_names, prepare_model
from loraprune_ds.fsdp import checks
from loraprune_ds.fsdp.model import sharded_units
from loraprune_ds.fsdp.private import find_slots
from loraprune_ds.fsdp.rows import RowShards
from loraprune_ds.ranks.flat import partition_numel
from tests.support.paper import FREE, PAPER
from tests.support.refusals import refused

LORA = PAPER | {"normalize": "step"}
FISHER = LORA | {"criterion": "fisher"}
REFIT: dict[str, Any] = {"compensate": "least_squares"}


@dataclass(frozen=True)
class Training:
    """A training, small enough to send to a worker.

    Attributes:
        prune: settings beside those of `LORA`.
        mesh: the ranks of FSDP2: (shards,), or (replicas, shards). Empty: DDP, or one process.
        reshard: `reshard_after_forward` of the layers.
        checkpointing: `reentrant`, `not reentrant`, or `wrapper`, which is torch's around each layer.
        parts: micro-batches of a step. Gradients are averaged in the last alone.
        evaluates: makes forward passes without a backward after each step.
        half: the base is in bf16.
        scale: of the loss, by a scaler. 0: none.
        policy: reduces in this dtype, and computes in bf16.
        autocast: computes in this dtype.
        device: of the model. Not the CPU: the simulated one (tests/support/device.py).
    """

    folder: Path
    prune: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] = ()
    reshard: bool | int = True
    checkpointing: str | None = None
    parts: int = 1
    offload: bool = False
    prefetches: bool = False
    evaluates: bool = False
    half: bool = False
    scale: float = 0.0
    policy: torch.dtype | None = None
    autocast: torch.dtype | None = None
    device: str = "cpu"
    r: int = 4
    steps: int = 7
    samples: int = 12

    @property
    def config(self) -> PruneConfig:
        """Cuts after steps 3 and 5."""
        schedule: dict[str, Any] = {"ratio": 0.4, "prune_every": 2, "warmup_fraction": 0.2}
        schedule |= {"cooldown_fraction": 0.2}
        return PruneConfig(**LORA | FREE | schedule | self.prune)


@dataclass
class Result:
    """What a training did. `scores` are of the last step, and `tensors` LoRA and its moments, full."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight_bytes: list[list[int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


def build(training: Training) -> Any:
    """Builds the same PEFT model on every rank, with LoRA that counts."""
    config = transformers.AutoConfig.from_pretrained(training.folder)
    seq2seq = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    dtype = torch.bfloat16 if training.half else torch.float32
    base: Any = kind.from_pretrained(training.folder, dtype=dtype, attn_implementation="eager")
    base.config.use_cache = False
    base = prepare_model(base)
    torch.manual_seed(0)
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    lora = LoraConfig(
        r=training.r,
        lora_alpha=2 * training.r,  # a larger scale would make rounding grow from step to step
        target_modules=linear_names(base),
        init_lora_weights=False,
        task_type=task,
    )
    model: Any = get_peft_model(base, lora)
    if training.checkpointing in ("reentrant", "not reentrant"):
        reentrant = training.checkpointing == "reentrant"
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    return model.train().to(training.device)


def layer_lists(model: Any) -> list[Any]:
    base = model.get_base_model()
    if base.config.is_encoder_decoder:
        return [base.encoder.block, base.decoder.block]
    return [base.model.layers]


def shard(model: Any, training: Training) -> None:
    """Shards as torch's own examples do: each layer, then the rest."""
    names = ("replicas", "shards")[-len(training.mesh) :]
    options: dict[str, Any] = {
        "mesh": init_device_mesh(training.device, training.mesh, mesh_dim_names=names),
        "offload_policy": CPUOffloadPolicy(pin_memory=False)
        if training.offload
        else OffloadPolicy(),
    }
    if training.policy is not None:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, training.policy)
    layers = list[Any]()
    for blocks in layer_lists(model):
        for i, layer in enumerate(blocks):
            if training.checkpointing == "wrapper":
                blocks[i] = checkpoint_wrapper(layer, preserve_rng_state=False)
            layers.append(fully_shard(blocks[i], reshard_after_forward=training.reshard, **options))
    fully_shard(model, **options)
    if training.prefetches:
        for layer, following in pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])


def prepare(training: Training) -> tuple[Any, AdamW]:
    """Returns the model, sharded if the training is, and its optimizer."""
    model = build(training)
    if training.mesh:
        shard(model, training)
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # a larger epsilon keeps rounding small: Adam divides by the roots of tiny second moments
    optimizer: Any = AdamW(trained, lr=5e-3, eps=1e-3, weight_decay=0.0)
    if training.scale:
        optimizer.scaler = torch.amp.GradScaler(training.device, init_scale=training.scale)
    return model, optimizer


def train(training: Training, out: Path | None = None) -> Result:
    """Trains to the end. Collective on the ranks of FSDP2 or DDP."""
    model, optimizer = prepare(training)
    wrapped = model
    joined = dist.is_initialized() and dist.get_world_size() > 1
    if joined and not training.mesh:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    pruning = Pruning(wrapped, optimizer, training.config, training.steps)
    result = Result()
    for step in range(1, training.steps + 1):
        one_step(training, step, wrapped, optimizer, pruning, result)
    pruning.close()
    collect(pruning, result)
    if out is not None:
        pruning.save_model(out)
    return result


def one_step(
    training: Training, step: int, model: Any, optimizer: Any, pruning: Pruning, result: Result
) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 97, (training.samples, 16), generator=generator).chunk(ranks)[rank]
    ids = ids.to(training.device)
    pruning.begin_step()
    total = torch.zeros((), device=training.device)
    parts = ids.chunk(training.parts)
    loss = None
    scaler = getattr(optimizer, "scaler", None) or torch.amp.GradScaler(
        training.device, enabled=False
    )
    for i, part in enumerate(parts):
        if training.mesh:
            model.set_requires_gradient_sync(i == len(parts) - 1)
        with torch.autocast(training.device, training.autocast, training.autocast is not None):
            loss = model(input_ids=part, labels=part).loss / len(parts)
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm: Any = torch.nn.utils.clip_grad_norm_(trained, 0.5)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    record = pruning.end_step()  # the graph of the last loss is alive
    if record is not None:
        result.sent.append(record.bytes_sent)
    if training.evaluates:
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
    found = pruning.recorder.history.steps[-1].grad_norm or 0.0
    torch.testing.assert_close(found, float(norm), rtol=1e-5, atol=0)
    if ranks > 1:
        dist.all_reduce(total)
    result.losses.append(float(total) / ranks)
    result.norms.append(found)
    kept = [groups.tolist() for layer in pruning.pruner.kept_of_dense for groups in layer.values()]
    result.kept.append(kept)
    result.weight_bytes.append(pruning.model.weight_bytes())
    if training.mesh:
        assert result.weight_bytes[-1][rank] == expected_bytes(model)


def collect(pruning: Pruning, result: Result) -> None:
    """Keeps the scores, and gathers LoRA and its moments on rank 0."""
    model = pruning.model
    scores = pruning.pruner.average.scores or []
    result.scores = [x.cpu() for layer in scores for x in layer.values()]
    for i, layer in enumerate(model.lora_parameters()):
        masters = model.collect_named(layer, 0, master=True)
        states = model.optimizer_state.collect(layer, 0)
        result.tensors |= {f"{i}.{name}": x.cpu().clone() for name, x in (masters | states).items()}


def expected_bytes(model: Any) -> int:
    """Returns the bytes of this rank's rows of all parameters, where it has any, and of their padding."""
    numbers = list[int]()
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        if not parameter.to_local().numel():
            continue
        shards = parameter.device_mesh.size(-1)
        rows = partition_numel(parameter.shape[0], shards)
        numbers.append(rows * math.prod(parameter.shape[1:]) * parameter.element_size())
    return sum(numbers)


def what_a_cut_leaves(training: Training) -> tuple[int, int]:
    """Trains over a cut. Returns how many of FSDP2's parameters and moments from before it are alive, and were cut."""
    model, optimizer = prepare(training)
    pruning = Pruning(model, optimizer, training.config, training.steps)
    result = Result()
    for step in (1, 2):
        one_step(training, step, model, optimizer, pruning, result)
    before = {p: p.shape for p in model.parameters()}
    slots = find_slots(sharded_units(model))
    old = {p: [weakref.ref(slots[p].param)] for p in before}
    for parameter, state in optimizer.state.items():
        old[parameter] += [weakref.ref(x) for x in state.values() if isinstance(x, DTensor)]
    del slots, state
    one_step(training, 3, model, optimizer, pruning, result)
    gc.collect()
    cut = [ref for p, shape in before.items() if p.shape != shape for ref in old[p]]
    assert {id(p) for p in model.parameters()} == set(map(id, before))
    pruning.close()
    return sum(ref() is not None for ref in cut), len(cut)


def event_after_a_cut(training: Training) -> Any:
    """Names an event that the next gather would wait for. Returns what it waits for after a cut."""
    model, optimizer = prepare(training)
    pruning = Pruning(model, optimizer, training.config, training.steps)
    result = Result()
    for step in (1, 2):
        one_step(training, step, model, optimizer, pruning, result)
    optimizer.register_step_post_hook(lambda *_: model.set_post_optim_event("after the update"))
    one_step(training, 3, model, optimizer, pruning, result)
    pruning.close()
    return model._get_fsdp_state()._state_ctx.post_optim_event


def has_open_forward_after_a_refit(training: Training) -> bool:
    """Makes what is inside the causal model a unit of its own. Says whether FSDP2 holds a pass open after a cut."""
    model = build(training)
    mesh = init_device_mesh(training.device, training.mesh)
    for layer in layer_lists(model)[0]:
        fully_shard(layer, mesh=mesh)
    inner: Any = fully_shard(model.get_base_model().model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    pruning = Pruning(model, optimizer, training.config, training.steps)
    for step in (1, 2, 3):
        one_step(training, step, model, optimizer, pruning, Result())
    assert pruning.cuts
    pruning.close()
    return inner._get_fsdp_state()._state_ctx.iter_forward_root is not None


def overwritten_by(owner: int) -> list[float]:
    """Overwrites rows in two replicas by those of a rank. Returns what this rank has."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    rows, local = RowShards(mesh, torch.device("cpu")), torch.zeros(3, 1)
    full = torch.arange(3.0)[:, None] if dist.get_rank() == owner else None
    rows.overwrite(local, owner, full)
    return local[:, 0].tolist()


def warnings_of(training: Training) -> list[str]:
    """Returns what the package warns of when pruning begins."""
    messages = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    with patch.object(logging.getLogger("loraprune_ds"), "handlers", [handler]):
        Pruning(*prepare(training), training.config, training.steps)
    return messages


# Sharded in ways that cannot be cut


def fsdp1(model: Any) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def in_a_layer_fsdp1(model: Any) -> None:
    layers = model.get_base_model().model.layers
    layers[1] = FullyShardedDataParallel(
        layers[1], device_id=torch.device("cpu"), use_orig_params=True
    )


def by_columns(model: Any) -> None:
    even = {id(p) for p in model.parameters() if p.ndim > 1 and p.shape[1] % 2 == 0}
    fully_shard(
        model,
        mesh=init_device_mesh("cpu", (2,)),
        shard_placement_fn=lambda p: Shard(int(id(p) in even)),
    )


def without_lora(model: Any) -> None:
    ignored = {p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)


def without_a_weight(model: Any) -> None:
    ignored = {p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.base_layer" in n}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)


def over_some_ranks(model: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "shards"))
    fully_shard(model, mesh=mesh["shards"])


def with_half_lora(model: Any) -> None:
    whole(model.bfloat16())


def whole(model: Any) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def refuse_on_an_old_torch(training: Training) -> str:
    with patch.object(checks, "ONE_DTYPE_BEFORE", "99"):
        return refuse(training, whole)


def compiled(model: Any) -> None:
    whole(model)
    model.get_base_model().model.layers[1].compile(backend="eager")


def refuse(training: Training, change: Callable[[Any], Any]) -> str:
    """Shards a model by `change`, and returns the line with which its pruning is refused."""
    model = build(training)
    sharded = change(model) or model
    trained = [parameter for parameter in sharded.parameters() if parameter.requires_grad]
    return refused(Pruning, sharded, AdamW(trained), training.config, training.steps)
