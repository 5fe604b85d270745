"""The order in which a pass enters and leaves the modules of a LoRA model.

ZeRO-3 gathers a module's parameters at its entry and frees them at its exit. So this order decides what is sent and
what is in memory. It is read off a pass through the model on the meta device (modules.py). Every module there has the
hooks that DeepSpeed would put on it. So autograd itself tells the backward order. torch itself tells what activation
checkpointing runs again, and where that stops.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.modules import build_modules, ids

Phase = Literal["forward", "backward", "recompute"]
DEPTH = 2  # of the model that is traced. Every layer but the first is like the second.
LAYER = "model.layers."


@dataclass(eq=False)
class Parameter:
    """Describes a parameter as ZeRO-3 sees it. A tied head is the embedding itself."""

    name: str
    numel: int
    element_size: int

    @property
    def trainable(self) -> bool:
        return ".lora_" in self.name


@dataclass(eq=False)
class Module:
    """Describes a module with its own parameters."""

    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Visit:
    """Tells that the pass enters or leaves a module."""

    module: Module
    phase: Phase
    enters: bool


class Network:
    """Describes PEFT's LoRA around a model, without weights.

    Attributes:
        parameters: by the names of the weight files. LoRA factors are "{linear}.lora_A" and "{linear}.lora_B".
    """

    def __init__(self, source: dict[str, Any], shape: ModelShape, lora_rank: int, element_size: int) -> None:
        self.lora_rank, self.element_size = lora_rank, element_size
        self._depth = len(shape.layers)
        self._traced = (json.dumps(source), shape.with_layers(shape.layers[:DEPTH]))
        sizes = parameter_sizes(shape, lora_rank, element_size)
        self.parameters = {name: Parameter(name, *size) for name, size in sizes.items()}
        self._own: dict[str, list[Parameter]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            self._own[name.rpartition(".")[0]].append(parameter)
        self._modules: dict[str, Module] = {}

    def resize(self, shape: ModelShape) -> None:
        """Takes the sizes after a cut. The parameters stay the same objects, as on the engine."""
        for name, (numel, _) in parameter_sizes(shape, self.lora_rank, self.element_size).items():
            self.parameters[name].numel = numel

    def evaluation_pass(self) -> list[Visit]:
        """Lists the visits of a forward pass alone."""
        return [visit for visit in self.training_pass(checkpointing=False) if visit.phase == "forward"]

    def training_pass(self, *, checkpointing: bool) -> list[Visit]:
        """Lists the visits of one micro-batch, forward and backward."""
        steps = _all_layers(_trace(*self._traced, checkpointing), self._depth)
        return [Visit(self._module(step.module), step.phase, step.enters) for step in steps]

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            self._modules[name] = Module(tuple(self._parameters_of(name)))
        return self._modules[name]

    def _parameters_of(self, name: str) -> Iterable[Parameter]:
        factor = name.removesuffix(".default")
        if factor in self.parameters:
            return [self.parameters[factor]]
        if name == "lm_head" and name not in self._own:
            return self._own["model.embed_tokens"]
        if f"{name}.lora_A" in self.parameters:
            # PEFT's wrapper looks at lora_A's dtype before it calls it. So DeepSpeed gathers lora_A for the wrapper.
            return [self.parameters[f"{name}.lora_A"]]
        return [p for p in self._own.get(name.removesuffix(".base_layer"), ()) if not p.trainable]


def parameter_sizes(shape: ModelShape, lora_rank: int, element_size: int) -> dict[str, tuple[int, int]]:
    """Returns (elements, bytes of one) of every parameter and LoRA factor, by name."""
    sizes = {name: (math.prod(held.shape), held.element_size) for name, held in shape.held(None, element_size).items()}
    linears = [f"{LAYER}{i}.{linear.name}" for i in range(len(shape.layers)) for linear in shape.linears]
    factors = [f"{linear}.{factor}" for linear in linears for factor in ("lora_A", "lora_B")]
    return sizes | {x: (n, element_size) for x, n in zip(factors, shape.lora_sizes(lora_rank), strict=True)}


class _Step(NamedTuple):
    """Names the module that a traced pass enters or leaves."""

    module: str
    phase: Phase
    enters: bool


@cache
def _trace(source: str, shape: ModelShape, checkpointing: bool) -> list[_Step]:
    """Makes one pass, forward and backward."""
    model = build_modules(json.loads(source), shape)
    if checkpointing:
        causal_lm: Any = model.get_base_model()
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch = _Watch()
    for name, module in model.named_modules():
        watch.add(name.removeprefix("base_model.model."), module)
    tokens = ids(1, 2)
    out = model(input_ids=tokens, labels=tokens)
    watch.again = "recompute"
    out.backward(torch.empty_like(out))
    return watch.steps


class _Watch:
    """Puts hooks on modules as DeepSpeed's `_register_deepspeed_module` does.

    The backward pass enters a module when one of its outputs has a gradient. It leaves it when all its positional
    inputs have theirs. If none needs one, DeepSpeed never learns the end.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.again: Phase = "forward"  # of a forward that happens now
        self._missing: dict[str, int] = {}  # gradients of inputs that are still to come

    def add(self, name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, given: Any) -> Any:
            self.steps.append(_Step(name, self.again, enters=True))
            self._missing[name] = sum(x.requires_grad for x in pytree.tree_leaves(given) if isinstance(x, Tensor))
            return _tell(given, ended)

        def leave(_: nn.Module, given: Any, output: Any) -> Any:
            self.steps.append(_Step(name, self.again, enters=False))
            return _tell(output, lambda: self.steps.append(_Step(name, "backward", enters=True)))

        def ended() -> None:
            self._missing[name] -= 1
            if self._missing[name] == 0:
                self.steps.append(_Step(name, "backward", enters=False))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _tell(tensors: Any, call: Any) -> Any:
    """Calls `call` for each of them that gets a gradient, as soon as it does."""
    return pytree.tree_map_only(Tensor, lambda tensor: _Tell.apply(tensor, call), tensors)


class _Tell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradients[0], None


def _all_layers(steps: list[_Step], depth: int) -> Iterator[_Step]:
    """Repeats the steps in the second layer for each one after it, in the order of the pass."""
    second = f"{LAYER}1"
    for in_second, run in groupby(steps, lambda step: f"{step.module}.".startswith(f"{second}.")):
        part = list(run)
        if not in_second:
            yield from part
            continue
        layers = range(1, depth) if part[0].phase == "forward" else reversed(range(1, depth))
        for layer in layers:
            yield from (step._replace(module=step.module.replace(second, f"{LAYER}{layer}", 1)) for step in part)
