"""The model under pruning in one process, or as a replica of DistributedDataParallel. Only scores and refits travel.

After a backward pass every rank has all averaged gradients. Each scores the part of a weight that ZeRO-3 would give it,
so both engines remove the same groups.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.parallel import DistributedDataParallel

from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.errors import fail_point, require
from loraprune_ds.model.adapters import set_sizes
from loraprune_ds.model.groups import LayerKeep, Slice
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import (
    LoraFactors,
    OwnedShard,
    PrunableModel,
    parameter_cuts,
    replace_data,
)
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range

AUTOGRAD: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
# Private names of torch, beside `_comm_hooks` of DDP. Every start checks them.
PRIVATE = (
    (AUTOGRAD, "queue_callback"),
    (torch, "_foreach_norm"),
    (DistributedDataParallel, "_get_active_ddp_module"),
)
OTHER_STATE = ("Adafactor", "LBFGS", "SparseAdam")  # with other shapes than the parameter has


class LocalModel(PrunableModel):
    """A PEFT model whose parameters are whole, and the torch optimizer of its LoRA.

    Args:
        optimizer: None before there is one.
        scaler: fp16's `torch.amp.GradScaler`, if the trainer has one.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
    ) -> None:
        super().__init__(module, shape, Communicator(device=next(module.parameters()).device))
        self.optimizer = optimizer
        self.optimizer_state = None if optimizer is None else WholeState(optimizer)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.skips_updates = self._scaler is not None
        self._ddp: Any = None  # found in the first forward pass
        # One walk over the modules: a cut keeps the parameters.
        self._lora = [parameter for layer in self.lora_parameters() for parameter in layer.values()]
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Of the last backward pass, before the trainer clips: copies, if a criterion reads them, and the norm of each.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._norms: Tensor | None = None
        self._zero = torch.zeros((), device=self.device)
        self._norm = self._zero
        self._copies = False
        self._queued = False

    # Scoring

    @torch.no_grad()
    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        for i, layer in enumerate(self.lora_parameters()):
            weights = (factor.detach().float() for factor in layer.values())
            yield self._named_factors(i, weights, map(self.unscaled_gradient, layer.values()))

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        weight = self._module(linear_id).base_layer.weight.detach()
        start, end = owned_range(weight.numel(), self.world_size, self.rank)
        return OwnedShard(weight.reshape(-1)[start:end], start, tuple(weight.shape))

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    # A cut

    def overwrite(self, parameter: nn.Parameter, owner: int, tensor: Tensor | None) -> None:
        if tensor is not None:
            parameter.copy_(tensor)
        self.comm.broadcast_from(owner, parameter.data)

    @torch.no_grad()
    def cut(self, keep: list[LayerKeep]) -> int:
        """Cuts in place. The optimizer and the trainer keep their parameters."""
        with _without_reducer(self._ddp):
            for layer, spec, layer_keep in zip(self.layers, self.shape.layers, keep, strict=True):
                for parameter, kept in parameter_cuts(layer, spec, layer_keep):
                    # A base that is sharded before there is an engine has no elements here, and is cut already.
                    if parameter.numel():
                        self._select(parameter, kept)
                set_sizes(layer, spec.resized(layer_keep.counts))
                fail_point("cut.layer")
            self.shape = self.shape.after(keep)
        return 0

    def _select(self, parameter: nn.Parameter, kept: Slice) -> None:
        state: dict[str, Any] = {}
        if self.optimizer is not None:
            state = self.optimizer.state.get(parameter, state)
        indices = kept.keep.to(parameter.device)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value.index_select(kept.axis, indices)
        parameter.grad = None
        replace_data(parameter, parameter.data.index_select(kept.axis, indices))

    # Checkpoints and exports

    def collect(
        self, parameter: nn.Parameter, owner: int, *, master: bool = False
    ) -> Tensor | None:
        if self.rank != owner:
            return None
        return parameter.detach().float() if master else parameter.detach()

    # Training

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self._gradients.get(parameter, parameter.grad)
        return torch.zeros_like(parameter) if gradient is None else gradient.float()

    def gradient_sum(self) -> Tensor:
        return vector_norm(self._last_norms())

    def nonfinite_layer(self) -> int | None:
        norms = dict(zip(self._trained, self._last_norms(), strict=True))
        return self.first_nonfinite(
            map(norms.__getitem__, layer.values()) for layer in self.lora_parameters()
        )

    def _last_norms(self) -> Tensor:
        return self._gradient_norms() if self._norms is None else self._norms

    def gradient_norm(self) -> float:
        return float(self._norm)

    def before_each_update(
        self, action: Callable[[], None], *, reads_gradients: bool = True
    ) -> Callable[[], None]:
        def act(*_: Any) -> None:
            self._norm = self.gradient_sum() / self.loss_scale
            action()
            self._gradients.clear()
            self._norms = None

        self._copies = reads_gradients
        undo = ExitStack()
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        undo.enter_context(optimizer.register_step_pre_hook(act))
        model = cast(PeftModel, self.module)
        undo.enter_context(model.register_forward_pre_hook(self._find_ddp))
        path, _, _ = self.shape.family.layer_lists[-1].path.rpartition(".")
        decoder = model.get_base_model().get_submodule(path)
        undo.enter_context(decoder.register_forward_hook(self._watch_backward))
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

    def _watch_backward(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._queued = False  # in case a backward pass failed
        if output[0].requires_grad:
            output[0].register_hook(self._await_gradients)

    def _await_gradients(self, _: Tensor) -> None:
        """Waits for the end of the backward pass, and of the averaging of DDP, which is queued meanwhile."""
        if not self._queued:  # several forward passes may share one backward pass
            self._queued = True
            queue = AUTOGRAD.queue_callback
            queue(lambda: queue(self._note_gradients))

    @torch.no_grad()
    def _note_gradients(self) -> None:
        self._queued = False
        self._norms = self._gradient_norms()
        if self._copies:
            self._gradients = {p: p.grad.clone() for p in self._lora if p.grad is not None}

    def _gradient_norms(self) -> Tensor:
        """Returns the norm of each trained parameter's gradient: (parameters,)."""
        gradients = [self._zero if p.grad is None else p.grad for p in self._trained]
        return torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]


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


class WholeState(OptimizerState):
    """The state of Adam over fp32 LoRA, which is its own master. Each rank of DDP has all of it."""

    def masters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        if key == "master":
            return parameter.detach().view(-1)
        moment = self.optimizer.state[parameter].get(key)
        if moment is None:  # before its first gradient
            moment = torch.zeros_like(parameter)
        return moment.view(-1)

    def part(self, numel: int, comm: Communicator) -> tuple[int, int]:
        return 0, numel

    def restore(self, *arguments: Any) -> None:
        super().restore(*arguments)
        # moves the counts to where a fused Adam has them
        self.optimizer.load_state_dict(self.optimizer.state_dict())


def check_optimizer(optimizer: Any) -> None:
    """Raises UserError if a cut does not know the optimizer's state, or if torch lacks a private name."""
    for holder, name in PRIVATE:
        require(
            hasattr(holder, name),
            f"torch {torch.__version__} lacks {name}; install one of pyproject.toml",
        )
    kind = type(optimizer)
    is_torch = isinstance(optimizer, torch.optim.Optimizer)
    is_torch = is_torch and kind.__module__.startswith("torch.optim")
    require(
        is_torch and kind.__name__ not in OTHER_STATE,
        f"the optimizer state of {kind.__module__}.{kind.__name__} cannot be cut along with LoRA; "
        "use torch's AdamW",
    )
