"""The order in which a pass enters and leaves the modules of a LoRA LLaMA.

ZeRO-3 gathers a module's parameters at its entry and frees them at its exit. So this order decides what is sent and
what is in memory. The backward order is autograd's: the reverse of forward. With activation checkpointing the inside of
a layer runs once more. Autograd starts that when it needs the first saved tensor, in lora_B of down_proj. This is the
last module of the layer, and the second run also stops there (torch's early stop).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from loraprune_ds.model.shapes import ModelShape

Phase = Literal["forward", "backward", "recompute"]


@dataclass(eq=False)
class Parameter:
    """Describes a parameter as ZeRO-3 sees it. A tied head is the embedding itself."""

    name: str
    numel: int

    @property
    def trainable(self) -> bool:
        return ".lora_" in self.name


@dataclass(eq=False)
class Module:
    """Describes a module with its own parameters, and its children in forward order.

    Attributes:
        ends_backward: a positional input has a gradient. Through it ZeRO-3 learns that the backward pass is over.
    """

    parameters: tuple[Parameter, ...] = ()
    children: list["Module"] = field(default_factory=list)
    ends_backward: bool = True


@dataclass(frozen=True)
class Visit:
    """Tells that the pass enters or leaves a module."""

    module: Module
    phase: Phase
    enters: bool


class Network:
    """Describes PEFT's LoRA around a LLaMA or Mistral, without weights.

    Attributes:
        parameters: by the names of the weight files. LoRA factors are "{linear}.lora_A" and "{linear}.lora_B".
    """

    def __init__(self, shape: ModelShape, lora_rank: int) -> None:
        self.lora_rank = lora_rank
        sizes = parameter_sizes(shape, lora_rank)
        self.parameters = {name: Parameter(name, numel) for name, numel in sizes.items()}
        head = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        self.embedding = self._leaf("model.embed_tokens", ends_backward=False)
        self.rotary = _outer()
        self.layers = [self._layer(f"model.layers.{i}", shape) for i in range(len(shape.layers))]
        model = _outer(self.embedding, self.rotary, *self.layers, self._leaf("model.norm"))
        causal_lm = _outer(model, Module((self.parameters[head],)))
        self.root = _outer(_outer(causal_lm))  # PEFT's model, and in it LoRA's

    def resize(self, shape: ModelShape) -> None:
        """Takes the sizes after a cut. The parameters stay the same objects, as on the engine."""
        for name, numel in parameter_sizes(shape, self.lora_rank).items():
            self.parameters[name].numel = numel

    def evaluation_pass(self) -> list[Visit]:
        """Lists the visits of a forward pass alone."""
        return list(_forward(self.root))

    def training_pass(self, *, checkpointing: bool) -> list[Visit]:
        """Lists the visits of one micro-batch, forward and backward."""
        return [*_forward(self.root), *self._backward(self.root, checkpointing)]

    def _leaf(self, name: str, *, ends_backward: bool = True) -> Module:
        own = [self.parameters.get(f"{name}.{x}") for x in ("weight", "bias")]
        return Module(tuple(p for p in own if p), ends_backward=ends_backward)

    def _layer(self, name: str, shape: ModelShape) -> Module:
        q, k, v, o, gate, up, down = (self._lora_linear(f"{name}.{linear.name}") for linear in shape.linears)
        children = [
            self._leaf(f"{name}.input_layernorm"),
            _outer(q, k, v, o),
            self._leaf(f"{name}.post_attention_layernorm"),
            Module(children=[gate, Module(), up, down]),  # with SiLU
        ]
        return Module(children=children)

    def _lora_linear(self, name: str) -> Module:
        a, b = (self.parameters[f"{name}.{factor}"] for factor in ("lora_A", "lora_B"))
        # PEFT's wrapper looks at lora_A's dtype before it calls it. So DeepSpeed gathers lora_A for the wrapper.
        return Module((a,), [self._leaf(name), Module(), Module((a,)), Module((b,))])  # with dropout

    def _backward(self, module: Module, checkpointing: bool) -> Iterator[Visit]:
        yield Visit(module, "backward", enters=True)
        for child in reversed(module.children):
            if child is self.rotary or (child is self.embedding and not checkpointing):
                continue  # its output needs no gradient
            if checkpointing and child in self.layers:
                yield from self._backward_with_recompute(child)
            elif child is self.layers[0]:
                yield from self._backward_of_first_layer(child)
            else:
                yield from self._backward(child, checkpointing)
        if module.ends_backward:
            yield Visit(module, "backward", enters=False)

    def _backward_with_recompute(self, layer: Module) -> Iterator[Visit]:
        last = layer.children[-1].children[-1].children[-1]  # lora_B of down_proj
        for visit in self._backward(layer, checkpointing=False):
            yield visit
            if visit.module is last and visit.enters:
                for again in _forward(layer, "recompute"):
                    if again.module is not layer:
                        yield again
                    if again.module is last:
                        break  # the early stop: nothing that is still open is left

    def _backward_of_first_layer(self, layer: Module) -> Iterator[Visit]:
        """Yields the visits without checkpointing. Nothing before lora_A of q, k, v needs a gradient then."""
        norm, attention = layer.children[:2]
        without_gradient, without_input_gradient = {norm}, {layer}
        for linear in attention.children[:3]:
            base, dropout, lora_a, _ = linear.children
            without_gradient |= {base, dropout}
            without_input_gradient |= {linear, lora_a}
        for visit in self._backward(layer, checkpointing=False):
            skipped = without_gradient if visit.enters else without_gradient | without_input_gradient
            if visit.module not in skipped:
                yield visit


def parameter_sizes(shape: ModelShape, lora_rank: int) -> dict[str, int]:
    """Counts the elements of every parameter and LoRA factor, by name."""
    sizes = {name: math.prod(dimensions) for name, dimensions in shape.parameters().items()}
    layers = [f"model.layers.{i}" for i in range(len(shape.layers))]
    linears = [f"{layer}.{linear.name}" for layer in layers for linear in shape.linears]
    factors = [f"{linear}.{factor}" for linear in linears for factor in ("lora_A", "lora_B")]
    return sizes | dict(zip(factors, shape.lora_sizes(lora_rank), strict=True))


def _outer(*children: Module) -> Module:
    """Builds a module that is called with keyword arguments only."""
    return Module(children=list(children), ends_backward=False)


def _forward(module: Module, phase: Phase = "forward") -> Iterator[Visit]:
    yield Visit(module, phase, enters=True)
    for child in module.children:
        yield from _forward(child, phase)
    yield Visit(module, phase, enters=False)
