"""Refuses a checkpoint that a Trainer loads into a dense model, before its library fails on other sizes."""

from typing import Any

from torch import Tensor, nn

from loraprune_ds.engines import holder
from loraprune_ds.errors import UserError

# torch.distributed.checkpoint asks a module for other names of its children. A FULL_STATE_DICT passes no other hook.
OTHER_NAMES = "_fqn_modifiers"


class LoadGuard:
    """Watches a model until its training begins.

    Under FSDP2 nothing but a load reads the state of a sharded model that early. A load of accelerate that fills the
    shards for the first time finds them on the meta device.
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
        if other_sizes or self._is_held_by("zero3"):
            self._refuse()

    def _check_read(self, *_: Any) -> None:
        if self._is_held_by("fsdp2"):
            self._refuse()

    def _other_names(self) -> dict[str, str]:
        self._check_read()
        return {}

    def _is_held_by(self, engine: str) -> bool:
        return any(
            holder(parameter).name == engine and not parameter.is_meta
            for parameter in self._model.parameters()
        )

    def _refuse(self) -> None:
        raise UserError(
            f"a checkpoint is loaded, but pruning does not resume from it: {self._advice}"
        )
