"""What both engines of our trainer share: LoRA with AdamW and its schedule, a step's passes, and the saved state."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import RunConfig, TrainConfig
from loraprune_ds.model.adapters import add_lora, load_adapter
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel, full_shape
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range, pad

MOMENTS = ("exp_avg", "exp_avg_sq")
# (layer, "{linear}.lora_A", key of the state, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, str, int, int], Tensor]


class OptimizerState(ABC):
    """The fp32 masters of LoRA and Adam's moments. Steps hold them whole, for any number of ranks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer  # torch's

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Returns the fp32 tensors that Adam updates."""

    @abstractmethod
    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns a flat view of this rank's (padded) fp32 part of `master`, `exp_avg` or `exp_avg_sq`."""

    def part(self, numel: int, comm: Communicator) -> tuple[int, int]:
        """Returns the flat elements [start, end) in the `shard` of a parameter with `numel`."""
        return owned_range(numel, comm.world_size, comm.rank)

    def keys(self) -> tuple[str, ...]:
        """Names the tensors that are cut and saved along with a parameter. Adam creates moments at its first step."""
        return ("master", *MOMENTS) if self.optimizer.state else ("master",)

    def create_moments(self, others: dict[str, Any]) -> None:
        """Creates zero moments for every master, and a copy of `others`, such as the counts of updates."""
        for master in self.masters():
            moments = {key: torch.zeros_like(master.data) for key in MOMENTS}
            self.optimizer.state[master] = copy.deepcopy(others) | moments

    @property
    def adam_step(self) -> int:
        """The updates that Adam has counted."""
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    def collect(
        self, parameters: dict[str, nn.Parameter], owner: int, comm: Communicator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gathers a layer's masters ("{linear}.lora_A") and moments ("….lora_A.exp_avg") on its owner. Collective."""
        shards = ((name, key, p) for name, p in parameters.items() for key in self.keys())
        found = {
            (n, key): collect_shards(self.shard(p, key), full_shape(p), owner, comm)
            for n, key, p in shards
        }
        whole = {pair: tensor for pair, tensor in found.items() if tensor is not None}
        moments = {
            f"{name}.{key}": tensor for (name, key), tensor in whole.items() if key != "master"
        }
        return {name: tensor for (name, key), tensor in whole.items() if key == "master"}, moments

    @torch.no_grad()
    def restore(
        self,
        layers: Iterable[dict[str, nn.Parameter]],
        read: ReadState,
        adam_step: int,
        comm: Communicator,
    ) -> None:
        """Reads this rank's shards of the state."""
        if adam_step:
            self.create_moments({"step": torch.tensor(float(adam_step))})
        for layer, parameters in enumerate(layers):
            for name, parameter in parameters.items():
                numel = math.prod(full_shape(parameter))
                start, end = self.part(numel, comm)
                for key in self.keys():
                    shard = self.shard(parameter, key)
                    read_shard = read(layer, name, key, start, end).to(comm.device)
                    shard.copy_(pad(read_shard, len(shard)))


def collect_shards(
    shard: Tensor, shape: Sequence[int], owner: int, comm: Communicator
) -> Tensor | None:
    """Gathers a tensor of `shape` from the flat, padded shards of all ranks, on rank `owner`. Collective."""
    # an offloaded shard is on the host
    gathered = comm.gather_to(owner, shard.detach().to(comm.device))
    return None if gathered is None else gathered.reshape(-1)[: math.prod(shape)].view(tuple(shape))


class TrainingEngine(ABC):
    """Trains the LoRA of `model`. `module` makes the passes. Every method is collective."""

    def __init__(
        self, module: Any, model: PrunableModel, state: OptimizerState, schedule: LambdaLR
    ) -> None:
        self.module, self.model, self.optimizer_state, self.schedule = (
            module,
            model,
            state,
            schedule,
        )

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss`: its share of the step's loss."""

    @abstractmethod
    def update(self, *, skipped: bool) -> float | None:
        """Makes the update, unless fp16 has `skipped` it. Returns the gradient norm before clipping, or None."""

    @torch.no_grad()
    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode."""
        self.module.eval()
        outputs = self.module(**inputs)
        self.module.train()
        return outputs

    def loss_scale(self) -> dict[str, Any]:
        """Returns the state of fp16's loss scaler for JSON, if there is one."""
        return {}

    def restore_counters(
        self, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]
    ) -> None:
        """Restores the schedule, the loss scale and the counts of steps."""
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(
            self.schedule.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate

    @abstractmethod
    def release(self) -> None:
        """Frees weights and optimizer state, even if they are still referenced. The engine is unusable then."""


def build_lora(
    base: Any, shape: ModelShape, config: RunConfig, cycles: Sequence[int]
) -> tuple[Any, AdamW, LambdaLR]:
    """Adds LoRA to the frozen model, fresh or from `model.adapter`, with its AdamW and learning-rate schedule."""
    lora, train = config.lora, config.train
    model = add_lora(base, shape, lora, config.seed)
    if config.model.adapter:
        load_adapter(model, Path(config.model.adapter).expanduser(), shape, lora.r)
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=train.learning_rate, eps=train.adam_epsilon, weight_decay=0.0)
    return (
        model,
        optimizer,
        LambdaLR(optimizer, lambda step: learning_rate_factor(train, cycles, step)),
    )


def learning_rate_factor(config: TrainConfig, cycles: Sequence[int], step: int) -> float:
    """Returns the schedule's factor on the learning rate at a 0-based step.

    It warms up linearly, then stays, or falls to zero linearly or as a cosine. Each of the `cycles`, in steps, has its
    own schedule. Only the first has a warm-up, because Adam's moments exist later.
    """
    steps, *others = cycles
    if others and step >= steps:
        return learning_rate_factor(replace(config, warmup_steps=0), others, step - steps)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_scheduler == "cosine" else 1.0
