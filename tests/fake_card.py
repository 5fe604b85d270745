"""A stand-in for a GPU, named "meta": real numbers, but no operation may mix them with the host's tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CARD = torch.device("meta")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # the indices may be the host's


class OnCard(Tensor):
    held: Tensor  # on the host

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        layout: Any = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=CARD, **layout)
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class FakeCard(TorchDispatchMode):
    """Makes the tensors of the card, which are asked for by its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class FakeCardNumbers(TorchFunctionMode):
    """The same for `torch.tensor`, which no dispatch sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.tensor and given.get("device") is not None and torch.device(given["device"]) == CARD:
            return put(torch.tensor(*args, **{**given, "device": "cpu"}))
        return func(*args, **given)


@contextmanager
def fake_card() -> Iterator[None]:
    with FakeCard(), FakeCardNumbers():
        yield


def put(tensor: Tensor) -> Tensor:
    return OnCard(tensor.detach().clone())


def take(tensor: Tensor) -> Tensor:
    """Returns the host's tensor inside one of the card."""
    return tensor.detach().held if isinstance(tensor, OnCard) else tensor.detach()  # type: ignore[attr-defined]


def put_module(module: nn.Module) -> None:
    """Moves all parameters and buffers of a module to the card. Tied parameters stay one."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                known = moved.get(id(parameter))
                made = known if known is not None else nn.Parameter(put(parameter), parameter.requires_grad)
                moved[id(parameter)] = part._parameters[name] = made
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else put(buffer)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the host's tensors inside, and wraps the result if it belongs on the card."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on_card = [x for x in given if isinstance(x, OnCard)]
    asked = kwargs.get("device")
    goes_to_card = bool(on_card) if asked is None else torch.device(asked) == CARD
    if func not in MOVES:
        _refuse_mixtures(func, args, given, on_card)
    if func is aten.copy_.default:
        goes_to_card = isinstance(args[0], OnCard)
    inner = {**kwargs, **({} if asked is None else {"device": torch.device("cpu")})}
    out = func(*tree_map_only(OnCard, _held, args), **tree_map_only(OnCard, _held, inner))
    if not goes_to_card:
        return out if not on_card else tree_map_only(Tensor, Tensor.clone, out)
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnCard, out))


def _held(tensor: Tensor) -> Tensor:
    return cast(OnCard, tensor).held


def _refuse_mixtures(func: Any, args: Any, given: list[Tensor], on_card: list[OnCard]) -> None:
    """Refuses what CUDA refuses. A number without dimensions may come from the host."""
    if not on_card:
        return
    if func in INDEXED and isinstance(args[0], OnCard):
        given = [x for x in given if not any(x is index for index in args[1])]
    strays = [x for x in given if not isinstance(x, OnCard) and x.dim() > 0]
    if strays:
        raise RuntimeError(f"{func}: a tensor of the host, {tuple(strays[0].shape)}, among tensors of the card")
