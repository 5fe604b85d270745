"""The FSDP2 model under pruning, and the optimizer state of its LoRA. Every rank cuts its rows in place.

FSDP2 swaps the parameters of a unit for gathered ones in a forward pass. After one without a backward pass, as in an
evaluation, the last units stay gathered. Therefore everything here reshards before it reads parameters of a module.
"""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraprune_ds.engine.cutting import ParameterCut, cut_layers
from loraprune_ds.engine.watched_model import WatchedModel
from loraprune_ds.fsdp.private import Slot, close_forward, find_slots, install, like_parameter
from loraprune_ds.fsdp.rows import RowShards
from loraprune_ds.model.groups import LayerKeep, Slice
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import OwnedShard
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
    layout: RowShards

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
        super().__init__(module, shape, RowShards(mesh, device), optimizer, scaler)

    def _reshard(self) -> None:
        """Gives every unit its sharded parameters back. FSDP2 gathers them in the next forward pass."""
        for unit in self._units:
            unit.reshard()

    # Scoring

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        weight = self._module(linear_id).base_layer.weight
        shape = cast(tuple[int, int], tuple(weight.shape))
        flat = self.held(weight).to(self.device).reshape(-1)
        start, _ = self.layout.part(shape)
        replicas = self.layout.replicas
        if replicas is None:
            return OwnedShard(flat, start, shape)
        # every replica has these rows, so each scores a part
        low, high = owned_range(len(flat), replicas.world_size, replicas.rank)
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

    def overwrite(self, parameter: nn.Parameter, owner: int, tensor: Tensor | None) -> None:
        super().overwrite(parameter, owner, tensor)
        self._forget_event()

    @torch.no_grad()
    def cut(self, keep: list[LayerKeep]) -> int:
        """Cuts one parameter after another, with the state of the optimizer. Each stays the same object."""
        before = self.layout.shards.bytes_sent
        self._reshard()
        slots = find_slots(self._units)

        def cut_rows(cuts: Iterable[ParameterCut]) -> None:
            for parameter, kept in cuts:
                self._select(parameter, kept, slots[parameter])

        cut_layers(self.layers, self.shape, keep, cut_rows)
        self.shape = self.shape.after(keep)
        self._forget_event()
        return sum(self.comm.gather_objects(self.layout.shards.bytes_sent - before))

    def _select(self, parameter: nn.Parameter, kept: Slice, slot: Slot) -> None:
        shape = tuple(parameter.shape)
        new_shape = AxisCut(shape, *kept).new_shape

        def cut_moment(moment: Tensor) -> DTensor:
            rows = self.layout.cut(self.held(moment), shape, kept)
            return like_parameter(rows, parameter, new_shape)

        self.cut_moments(parameter, cut_moment)
        parameter.grad = None
        rows = self.layout.cut(self.held(parameter), shape, kept)
        install(slot, parameter, rows, new_shape)

    def _forget_event(self) -> None:
        """Orders new weights before the next gather.

        A trainer may have named an event after its update, which is all that the next gather would wait for. Without
        one it waits for everything before it.
        """
        for unit in self._units:
            unit.set_post_optim_event(cast(Any, None))

    # Checkpoints and exports

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


def sharded_units(module: nn.Module) -> list[FSDPModule]:
    """Lists the modules that FSDP2 gathers as one, outer ones first."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
