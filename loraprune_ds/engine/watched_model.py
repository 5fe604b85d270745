"""A model whose LoRA an optimizer of torch trains, and its gradients as they are before the trainer changes them.

A trainer clips or unscales gradients between a backward pass and the update. So at the end of each backward pass they
are noted: the norm of each, and copies, if a criterion reads them.
"""

from abc import ABC
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.linalg import vector_norm

from loraprune_ds.engine.torch_state import TorchState
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.passes import AUTOGRAD
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.device import foreach
from loraprune_ds.ranks.layout import Layout

# (holder, private name of torch)
PrivateName = tuple[Any, str]
PRIVATE: tuple[PrivateName, ...] = ((AUTOGRAD, "queue_callback"),)


def check_private_names(names: Iterable[PrivateName]) -> None:
    """Raises UserError if torch lacks one of these names, or one that a `WatchedModel` needs."""
    for holder, name in (*PRIVATE, *names):
        require(
            hasattr(holder, name),
            f"torch {torch.__version__} lacks {name}; install one of pyproject.toml",
        )


class WatchedModel(PrunableModel, ABC):
    """A PEFT model and the torch optimizer of its LoRA.

    Args:
        optimizer: None before there is one.
        scaler: fp16's `torch.amp.GradScaler`, if the trainer has one.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        layout: Layout,
        optimizer: torch.optim.Optimizer | None,
        scaler: Any,
    ) -> None:
        super().__init__(module, shape, layout)
        self.optimizer = optimizer
        self.optimizer_state = TorchState(optimizer, layout)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.skips_updates = self._scaler is not None
        # One walk over the modules: a cut keeps the parameters.
        self._lora = [parameter for layer in self.lora_parameters() for parameter in layer.values()]
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # The last backward pass left these.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._norms: Tensor | None = None
        self._zero = torch.zeros((), device=self.device)
        self._one = torch.ones((), device=self.device)
        self._copies = False
        self._queued = False

    @property
    def loss_scale(self) -> float | Tensor:
        # to ask the scaler for its number would wait for the device
        return 1.0 if self._scaler is None else self._scaler.scale(self._one)

    def scaler_state(self) -> JsonObject:
        return {} if self._scaler is None else self._scaler.state_dict()

    def restore_scaler(self, saved: JsonObject) -> None:
        if self._scaler is not None and "scale" in saved:  # DeepSpeed's has other names
            self._scaler.load_state_dict(saved)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self._gradients.get(parameter)
        if gradient is None and parameter.grad is not None:
            gradient = self.held(parameter.grad)
        return torch.zeros_like(self.held(parameter)) if gradient is None else gradient.float()

    def gradient_norm(self) -> Tensor:
        (norm,) = self.unscaled([vector_norm(self._last_norms())])
        return norm

    def nonfinite_layer(self) -> int | None:
        norms = dict(zip(self._trained, self._last_norms(), strict=True))
        return self.first_nonfinite(
            map(norms.__getitem__, layer.values()) for layer in self.lora_parameters()
        )

    def before_each_update(
        self, action: Callable[[], None], *, reads_gradients: bool = True
    ) -> Callable[[], None]:
        def act(*_: Any) -> None:
            action()
            self._gradients.clear()
            self._norms = None

        self._copies = reads_gradients
        undo = ExitStack()
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        undo.enter_context(optimizer.register_step_pre_hook(act))
        path, _, _ = self.shape.family.layer_lists[-1].path.rpartition(".")
        decoder = cast(PeftModel, self.module).get_base_model().get_submodule(path)
        undo.enter_context(decoder.register_forward_hook(self._watch_backward))
        return undo.close

    def cut_moments(self, parameter: nn.Parameter, cut: Callable[[Tensor], Tensor]) -> None:
        """Cuts all state of the optimizer that has the shape of a parameter, which is still uncut."""
        state: dict[str, Any] = {}
        if self.optimizer is not None:
            state = self.optimizer.state.get(parameter, state)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = cut(value)

    def _watch_backward(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._queued = False  # in case a backward pass failed
        if output[0].requires_grad:
            require(
                self.skips_updates or _compute_dtype(output[0]) != torch.float16,
                "gradients are in float16, but no loss scaler is known, so they underflow; train in bfloat16, set "
                "fp16=True of a Trainer, or pass your own as Pruning(..., scaler=...)",
            )
            output[0].register_hook(self._await_gradients)

    def _await_gradients(self, _: Tensor) -> None:
        """Waits for the end of the backward pass, and of the averaging over ranks, which is queued meanwhile."""
        if not self._queued:  # several forward passes may share one backward pass
            self._queued = True
            queue = AUTOGRAD.queue_callback
            queue(lambda: queue(self._note_gradients))

    @torch.no_grad()
    def _note_gradients(self) -> None:
        self._queued = False
        self._norms = self._gradient_norms()
        if self._copies:
            changed = [parameter for parameter in self._lora if parameter.grad is not None]
            gradients = [self.held(cast(Tensor, parameter.grad)) for parameter in changed]
            copies = [torch.empty_like(gradient, device=self.device) for gradient in gradients]
            if copies:  # torch refuses an empty list
                foreach._foreach_copy_(copies, gradients)
            self._gradients = dict(zip(changed, copies, strict=True))

    def _last_norms(self) -> Tensor:
        return self._gradient_norms() if self._norms is None else self._norms

    def _gradient_norms(self) -> Tensor:
        """Returns the norm of this rank's part of each trained parameter's gradient: (parameters,)."""
        gradients = [
            self._zero if parameter.grad is None else self.held(parameter.grad).to(self.device)
            for parameter in self._trained
        ]
        return torch.stack(foreach._foreach_norm(gradients))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
