"""The model under pruning in one process, or as a replica of DistributedDataParallel. Only scores and refits travel.

After a backward pass every rank has all averaged gradients. Each scores the part of a weight that ZeRO-3 would give it,
so both engines remove the same groups.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loraprune_ds.engine.cutting import ParameterCut, cut_layers, cut_whole, select
from loraprune_ds.engine.watched_model import WatchedModel
from loraprune_ds.errors import require
from loraprune_ds.model.frozen import storage_format, stored_tensors
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import OwnedShard
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range
from loraprune_ds.ranks.layout import Whole

PRIVATE = ((DistributedDataParallel, "_get_active_ddp_module"),)  # beside `_comm_hooks`


class LocalModel(WatchedModel):
    """A PEFT model whose parameters are whole, and the torch optimizer of its LoRA.

    Args:
        optimizer: None before there is one.
        scaler: fp16's `torch.amp.GradScaler`, if the trainer has one.
    """

    engine = "local"

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
    ) -> None:
        comm = Communicator(device=next(module.parameters()).device)
        super().__init__(module, shape, Whole(comm), optimizer, scaler)
        self._ddp: Any = None  # found in the first forward pass

    # Scoring

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        base = self._module(linear_id).base_layer
        weight = storage_format(base).join(stored_tensors(base)).detach()
        start, end = owned_range(weight.numel(), self.world_size, self.rank)
        rows, columns = weight.shape
        return OwnedShard(weight.reshape(-1)[start:end], start, (rows, columns))

    # A cut

    @torch.no_grad()
    def cut(self, keep: list[LayerKeep]) -> int:
        """Cuts in place. The optimizer and the trainer keep their parameters."""
        with _without_reducer(self._ddp):
            cut_layers(self.layers, self.shape, keep, self._cut_layer)
            self.shape = self.shape.after(keep)
        return 0

    def _cut_layer(self, cuts: Iterable[ParameterCut]) -> None:
        for parameter, kept in cuts:
            self.cut_moments(parameter, partial(select, kept=kept))
            cut_whole([(parameter, kept)])

    # Training

    def before_each_update(
        self, action: Callable[[], None], *, reads_gradients: bool = True
    ) -> Callable[[], None]:
        undo = ExitStack()
        undo.callback(super().before_each_update(action, reads_gradients=reads_gradients))
        undo.enter_context(self.module.register_forward_pre_hook(self._find_ddp))
        return undo.close

    def _find_ddp(self, module: nn.Module, args: Any) -> None:
        """Finds DDP in the first forward pass, because a trainer hands the model inside it to its callbacks."""
        if self._ddp is not None or not module.training or not torch.is_grad_enabled():
            return
        ddp = DistributedDataParallel._get_active_ddp_module()
        self._ddp = ddp
        if ddp is None:
            require(
                self.world_size == 1,
                f"{self.world_size} processes train without DistributedDataParallel",
            )
            return
        require(
            not ddp.static_graph, "static_graph=True: DDP would keep the sizes from before a cut"
        )
        require(not ddp._comm_hooks, "a communication hook of DDP would be lost in a cut")


@contextmanager
def _without_reducer(ddp: Any) -> Generator[None]:
    """Makes DDP lay out its buckets again, as after a pickle. Its reducer keeps the old sizes of gradients alive."""
    if ddp is None:
        yield
        return
    state = ddp.__getstate__()
    del ddp.reducer, ddp.logger
    yield
    ddp.__setstate__(state)
