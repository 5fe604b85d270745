"""The FSDP2 model under pruning, and the optimizer state of its LoRA. Every rank cuts its rows in place.

FSDP2 swaps the parameters of a unit for gathered ones in a forward pass. After one without a backward pass, as in an
evaluation, the last units stay gathered. Therefore everything here reshards before it reads parameters of a module.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraprune_ds.engine.gathered_lora import gather_factors
from loraprune_ds.engine.torch_state import TorchState
from loraprune_ds.engine.watched_model import WatchedModel, cut_layers
from loraprune_ds.fsdp.private import Slot, close_forward, find_slots, install, like_parameter
from loraprune_ds.fsdp.rows import RowShards
from loraprune_ds.model.groups import LayerKeep, Slice
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import current_device
from loraprune_ds.ranks.flat import AxisCut, owned_range


class FsdpModel(WatchedModel):
    """A PEFT model whose parameters FSDP2 has sharded by rows, and the torch optimizer of its LoRA.

    Under CPU offload rows and optimizer state are on the host. Scoring and cutting copy them to the device and back.

    Args:
        optimizer: None before there is one.
        scaler: fp16's `torch.amp.GradScaler`, if the trainer has one.
    """

    engine = "fsdp2"

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
    ) -> None:
        self._units = sharded_units(module)
        self._reshard()
        mesh = next(p for p in module.parameters() if isinstance(p, DTensor)).device_mesh
        device = torch.device("cpu") if mesh.device_type == "cpu" else current_device()
        super().__init__(module, shape, Communicator(device=device), optimizer, scaler)
        self._rows = RowShards(mesh, device)
        self.optimizer_state = None if optimizer is None else RowState(optimizer, self._rows)

    def held(self, parameter: Tensor) -> Tensor:
        return held(parameter)

    def _reshard(self) -> None:
        """Gives every unit its sharded parameters back. FSDP2 gathers them in the next forward pass."""
        for unit in self._units:
            unit.reshard()

    # Scoring

    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        return gather_factors(self, self._rows.shards, self._rows.padded)

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        weight = self._module(linear_id).base_layer.weight
        shape = cast(tuple[int, int], tuple(weight.shape))
        flat = held(weight).to(self.device).reshape(-1)
        start, _ = self._rows.owned_flat(shape)
        # every replica has these rows, so each scores a part
        low, high = owned_range(len(flat), self._rows.replica_count, self._rows.replica)
        return OwnedShard(flat[low:high], start + low, shape)

    # A cut

    @contextmanager
    def repeating_passes(self) -> Generator[None]:
        try:
            yield
        finally:
            self._reshard()
            close_forward(self._units)

    def gathered(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Gathers the outermost unit, whose own forward pass does not run. Others are gathered in theirs."""
        self._units[0].unshard()  # which a refit has resharded
        return nullcontext()

    @torch.no_grad()
    def overwrite(self, parameter: nn.Parameter, owner: int, tensor: Tensor | None) -> None:
        self._rows.overwrite(held(parameter), parameter.shape, owner, tensor)
        self._forget_event()

    @torch.no_grad()
    def cut(self, keep: list[LayerKeep]) -> int:
        """Cuts one parameter after another, with the state of the optimizer. Each stays the same object."""
        before = self._rows.shards.bytes_sent
        self._reshard()
        slots = find_slots(self._units)
        cut_layers(self.layers, self.shape, keep, lambda p, kept: self._select(p, kept, slots[p]))
        self.shape = self.shape.after(keep)
        self._forget_event()
        return sum(self.comm.gather_objects(self._rows.shards.bytes_sent - before))

    def _select(self, parameter: nn.Parameter, kept: Slice, slot: Slot) -> None:
        shape = tuple(parameter.shape)
        new_shape = AxisCut(shape, kept.axis, kept.keep).new_shape

        def cut_moment(moment: Tensor) -> DTensor:
            rows = self._rows.cut(held(moment), shape, kept)
            return like_parameter(rows, parameter, new_shape)

        self.cut_moments(parameter, cut_moment)
        parameter.grad = None
        install(slot, parameter, self._rows.cut(held(parameter), shape, kept), new_shape)

    def _forget_event(self) -> None:
        """Orders new weights before the next gather.

        A trainer may have named an event after its update, which is all that the next gather would wait for. Without
        one it waits for everything before it.
        """
        for unit in self._units:
            unit.set_post_optim_event(cast(Any, None))

    # Checkpoints and exports

    @torch.no_grad()
    def collect(
        self, parameter: nn.Parameter, owner: int, *, master: bool = False
    ) -> Tensor | None:
        if not isinstance(parameter, DTensor):  # outside all units
            return parameter.detach() if self.rank == owner else None
        rows = held(parameter)
        if master:
            rows = rows.float()
        return self._rows.collect(rows, parameter.shape, owner)

    def collect_stored(self, linear_id: LinearId) -> dict[str, Tensor]:
        self._reshard()
        return super().collect_stored(linear_id)

    def weight_bytes(self) -> list[int]:
        self._reshard()
        return super().weight_bytes()

    # Training

    def lora_parameters(self) -> list[dict[str, nn.Parameter]]:
        self._reshard()
        return super().lora_parameters()

    def norm_over_ranks(self, norms: list[float]) -> float:
        return self._rows.norm(norms)


class RowState(TorchState):
    """The state of Adam over rows of LoRA. Each rank has the state of its rows."""

    def __init__(self, optimizer: torch.optim.Optimizer, rows: RowShards) -> None:
        super().__init__(optimizer)
        self._rows = rows

    def held(self, tensor: Tensor) -> Tensor:
        return held(tensor)

    def part(self, shape: Sequence[int], comm: Communicator) -> tuple[int, int]:
        return self._rows.owned_flat(shape)

    def gather(
        self, parameter: nn.Parameter, key: str, owner: int, comm: Communicator
    ) -> Tensor | None:
        return self._rows.collect(self.shard(parameter, key), parameter.shape, owner)


@torch.no_grad()
def held(tensor: Tensor) -> Tensor:
    """Returns the rows of a sharded tensor that this rank holds. A view, or all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_units(module: nn.Module) -> list[FSDPModule]:
    """Lists the modules that FSDP2 gathers as one, outer ones first."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
