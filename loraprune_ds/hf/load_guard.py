"""Refuses a checkpoint that a Trainer loads into a dense model, before its library fails on other sizes."""

from traceback import walk_stack
from typing import Any

from accelerate.utils import load_fsdp_model
from torch import Tensor, nn

from loraprune_ds.engines import holder
from loraprune_ds.errors import UserError

# torch.distributed.checkpoint asks a module for other names of its children. A FULL_STATE_DICT passes no other hook.
OTHER_NAMES = "_fqn_modifiers"


class LoadGuard:
    """Watches a model until its training begins.

    Under FSDP2 a load of accelerate first reads the state of the model, as a save does. Only its caller tells which.
    """

    def __init__(self, model: nn.Module, advice: str) -> None:
        """Begins to watch. `advice` says how to resume."""
        self._model = model
        self._advice = advice
        self._handles = [
            model.register_load_state_dict_pre_hook(self._check_load),
            model.register_state_dict_pre_hook(self._check_read),
        ]
        setattr(model, OTHER_NAMES, self._other_names)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        vars(self._model).pop(OTHER_NAMES, None)

    def _check_load(self, module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        parameters = dict(module.named_parameters())
        common = parameters.keys() & state.keys()
        other_sizes = any(state[name].shape != parameters[name].shape for name in common)
        if other_sizes or any(holder(p).name == "zero3" for p in parameters.values()):
            self._refuse()

    def _check_read(self, *_: Any) -> None:
        codes = [frame.f_code for frame, _ in walk_stack(None)]
        if load_fsdp_model.__code__ in codes:
            self._refuse()

    def _other_names(self) -> dict[str, str]:
        self._check_read()
        return {}

    def _refuse(self) -> None:
        raise UserError(
            f"a checkpoint is loaded, but pruning does not resume from it: {self._advice}"
        )
