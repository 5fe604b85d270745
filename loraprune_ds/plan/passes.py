"""The order in which a pass enters and leaves the modules of a LoRA model.

ZeRO-3 gathers a module's parameters at its entry and frees them at its exit. So this order decides what is sent and
what is in memory. It is read off a pass through the model on the meta device (modules.py). Every module there has the
hooks that DeepSpeed would put on it. So autograd itself tells the backward order. torch itself tells what activation
checkpointing runs again, and where that stops.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from loraprune_ds.model.adapters import ADAPTER, differentiate_input, gathered_whole
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.lora_product import OneProduct
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.modules import build_modules, ids, with_layers

Phase = Literal["forward", "backward", "recompute"]
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
        modules: of all decoder layers, those without parameters included.
    """

    def __init__(self, source: dict[str, Any], shape: ModelShape, lora_rank: int, element_size: int) -> None:
        self.lora_rank, self.element_size = lora_rank, element_size
        layers, self._like = traced_layers(shape)
        traced = with_layers(source, layers)
        self._traced = (json.dumps(traced), shape.with_layers(tuple(shape.layers[i] for i in layers)))
        sizes = parameter_sizes(shape, lora_rank, element_size)
        self.parameters = {name: Parameter(name, *size) for name, size in sizes.items()}
        self._fetched: dict[str, list[Parameter]] = {}
        for name, parameter in self.parameters.items():
            if not name.startswith(LAYER):
                self._fetched.setdefault(name.rpartition(".")[0], []).append(parameter)
        self._fetched.setdefault("lm_head", self._fetched["model.embed_tokens"])  # tied
        fetched, called = zip(*_layer_modules(*self._traced), strict=True)
        for layer, like in enumerate(self._like):
            prefix = f"{LAYER}{layer}"
            for module, names in fetched[like].items():
                self._fetched[prefix + module] = [self.parameters[prefix + name] for name in names]
        self._modules: dict[str, Module] = {}
        self.modules = sum(called[like] for like in self._like)

    def resize(self, shape: ModelShape) -> None:
        """Takes the sizes after a cut. The parameters stay the same objects, as on the engine."""
        for name, (numel, _) in parameter_sizes(shape, self.lora_rank, self.element_size).items():
            self.parameters[name].numel = numel

    def evaluation_pass(self) -> list[Visit]:
        """Lists the visits of a forward pass alone."""
        return [visit for visit in self.training_pass(checkpointing=False) if visit.phase == "forward"]

    def training_pass(self, *, checkpointing: bool) -> list[Visit]:
        """Lists the visits of one micro-batch, forward and backward."""
        steps = _all_layers(_trace(*self._traced, checkpointing), self._like)
        return [Visit(self._module(step.module), step.phase, step.enters) for step in steps]

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            self._modules[name] = Module(tuple(self._fetched.get(name, ())))
        return self._modules[name]


def parameter_sizes(shape: ModelShape, lora_rank: int, element_size: int) -> dict[str, tuple[int, int]]:
    """Returns (elements, bytes of one) of every parameter and LoRA factor, by name."""
    sizes = {name: (math.prod(held.shape), held.element_size) for name, held in shape.held(None, element_size).items()}
    linears = [f"{LAYER}{i}.{linear.name}" for i, linear in shape.linear_ids()]
    factors = [f"{linear}.{factor}" for linear in linears for factor in ("lora_A", "lora_B")]
    return sizes | {x: (n, element_size) for x, n in zip(factors, shape.lora_sizes(lora_rank), strict=True)}


class _Step(NamedTuple):
    """Names the module that a traced pass enters or leaves."""

    module: str
    phase: Phase
    enters: bool


def traced_layers(shape: ModelShape) -> tuple[list[int], list[int]]:
    """Returns the layers that are traced, and for each layer which of them it is like.

    They are the first, and of the others one of each kind. Only those before a first layer have no gradient.
    """
    layers = [0, *{layer.kinds: i for i, layer in reversed([*enumerate(shape.layers)][1:])}.values()]
    layers.sort()
    kinds = [shape.layers[i].kinds for i in layers]
    return layers, [0, *(kinds.index(layer.kinds, 1) for layer in shape.layers[1:])]


@cache
def _layer_modules(source: str, shape: ModelShape) -> list[tuple[dict[str, list[str]], int]]:
    """Returns of each layer the names of the parameters that a module gets, and how many modules are called."""
    layers = decoder_layers(build_modules(json.loads(source), shape))
    return [(_fetched_in_layer(layer, shape), _modules_in_layer(layer)) for layer in layers]


def _fetched_in_layer(layer: nn.Module, shape: ModelShape) -> dict[str, list[str]]:
    """Returns the names of the parameters that each module of a decoder layer gets, both from the layer on.

    They come in the order in which DeepSpeed counts them: LoRA is last.
    """
    whole = gathered_whole(layer, shape)
    fetched: dict[str, list[str]] = {}
    for module_name, module in layer.named_modules(prefix=""):
        prefix = f".{module_name}" if module_name else ""
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=module in whole)]
        plain = [name.replace(".base_layer", "").removesuffix(f".{ADAPTER}.weight") for name in own]
        fetched[prefix] = sorted(plain, key=lambda name: ".lora_" in name)
    return fetched


def _modules_in_layer(layer: nn.Module) -> int:
    """Counts the modules of a decoder layer that are called, itself included. LoRA's are one with their linear."""
    inside = {child for module in layer.modules() if isinstance(module, OneProduct) for child in module.modules()}
    return sum(isinstance(module, OneProduct) or module not in inside for module in layer.modules())


@cache
def _trace(source: str, shape: ModelShape, checkpointing: bool) -> list[_Step]:
    """Makes one pass, forward and backward."""
    model = build_modules(json.loads(source), shape)
    if checkpointing:
        causal_lm: Any = model.get_base_model()
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch = _Watch()
    layers = decoder_layers(model)
    differentiate_input(layers[0])
    whole = [module for layer in layers for module in gathered_whole(layer, shape)]
    inside = {id(child) for module in whole for child in module.modules() if child is not module}
    for name, module in model.named_modules():
        if id(module) not in inside:
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


def _all_layers(steps: list[_Step], like: list[int]) -> Iterator[_Step]:
    """Repeats the steps in the traced layers but the first for all layers like them, in the order of the pass."""
    for repeats, run in groupby(steps, lambda step: _layer(step) > 0):
        part = list(run)
        if not repeats:
            yield from part
            continue
        layers = range(1, len(like)) if part[0].phase == "forward" else reversed(range(1, len(like)))
        for layer in layers:
            old, new = f"{LAYER}{like[layer]}", f"{LAYER}{layer}"
            same = (step for step in part if _layer(step) == like[layer])
            yield from (step._replace(module=step.module.replace(old, new, 1)) for step in same)


def _layer(step: _Step) -> int:
    """Returns the layer that a step is in. 0 if it is in none."""
    return int(step.module.removeprefix(LAYER).split(".")[0]) if step.module.startswith(LAYER) else 0
