"""In which order a training or evaluation pass enters and leaves the modules of a LoRA LLaMA: shapes only.

ZeRO-3 gathers a module's parameters when the pass enters it and frees them when it leaves, so this order decides what
is sent and what is in memory. The backward order is autograd's: the reverse of forward. With activation checkpointing
the inside of a layer runs once more, when the first of its saved tensors is asked for: in lora_B of down_proj, the
last module of the layer, where the recomputation also stops (torch's early stop).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from loraprune_ds.model.shapes import ModelShape

Phase = Literal["forward", "backward", "recompute"]


@dataclass(eq=False)
class Parameter:
    """A parameter as ZeRO-3 sees it; a tied head is the embedding itself."""

    name: str
    numel: int
    trainable: bool = False


@dataclass(eq=False)
class Module:
    """A module with its own parameters and its children, in the order in which its forward calls them.

    Attributes:
        has_input: called with positional tensors, through which ZeRO-3 learns that its backward is over.
    """

    name: str
    parameters: tuple[Parameter, ...] = ()
    children: list["Module"] = field(default_factory=list)
    has_input: bool = True


@dataclass(frozen=True)
class Visit:
    """The pass enters or leaves a module."""

    module: Module
    phase: Phase
    enters: bool


class Network:
    """PEFT's LoRA around a LLaMA or Mistral, as modules and parameters without values.

    Attributes:
        parameters: by the names of the checkpoint; LoRA factors as "{linear}.lora_A" and "{linear}.lora_B".
    """

    def __init__(self, shape: ModelShape, lora_rank: int) -> None:
        self.lora_rank = lora_rank
        self.parameters = {
            name: Parameter(name, numel, trainable=".lora_" in name)
            for name, numel in parameter_sizes(shape, lora_rank).items()
        }
        head = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        self.embedding = self._leaf("model.embed_tokens")
        self.layers = [self._layer(i, shape) for i in range(len(shape.layers))]
        inner = [self.embedding, Module("model.rotary_emb", has_input=False), *self.layers, self._leaf("model.norm")]
        model = Module("model", children=inner, has_input=False)
        causal_lm = Module("", children=[model, Module("lm_head", (self.parameters[head],))], has_input=False)
        lora = Module("base_model", children=[causal_lm], has_input=False)
        self.root = Module("peft", children=[lora], has_input=False)

    def resize(self, shape: ModelShape) -> None:
        """The sizes after a cut; the parameters stay the same objects, as on the engine."""
        for name, numel in parameter_sizes(shape, self.lora_rank).items():
            self.parameters[name].numel = numel

    def evaluation_pass(self) -> list[Visit]:
        """Forward only."""
        return list(_forward(self.root))

    def training_pass(self, *, checkpointing: bool) -> list[Visit]:
        """Forward and backward of one micro-batch."""
        return [*_forward(self.root), *self._backward(self.root, checkpointing)]

    def _leaf(self, name: str) -> Module:
        own = (f"{name}.weight", f"{name}.bias")
        return Module(name, tuple(self.parameters[n] for n in own if n in self.parameters))

    def _layer(self, index: int, shape: ModelShape) -> Module:
        prefix = f"model.layers.{index}"
        linears = {linear.name: self._lora_linear(f"{prefix}.{linear.name}") for linear in shape.linears}
        attention = [linears[f"self_attn.{x}_proj"] for x in "qkvo"]
        gate, up, down = (linears[f"mlp.{x}_proj"] for x in ("gate", "up", "down"))
        children = [
            self._leaf(f"{prefix}.input_layernorm"),
            Module(f"{prefix}.self_attn", children=attention, has_input=False),
            self._leaf(f"{prefix}.post_attention_layernorm"),
            Module(f"{prefix}.mlp", children=[gate, Module(f"{prefix}.mlp.act_fn"), up, down]),
        ]
        return Module(prefix, children=children)

    def _lora_linear(self, name: str) -> Module:
        base, dropout = self._leaf(name), Module(f"{name}.lora_dropout")
        base.name = f"{name}.base_layer"
        factors = [Module(f"{name}.{x}", (self.parameters[f"{name}.{x}"],)) for x in ("lora_A", "lora_B")]
        # PEFT's wrapper looks at lora_A's dtype before it calls it, so DeepSpeed counts lora_A among what it needs.
        return Module(name, factors[0].parameters, [base, dropout, *factors])

    def _backward(self, module: Module, checkpointing: bool) -> Iterator[Visit]:
        yield Visit(module, "backward", enters=True)
        for child in reversed(module.children):
            if child.name.endswith("rotary_emb") or (child is self.embedding and not checkpointing):
                continue  # its output needs no gradient
            if child is self.layers[0] and not checkpointing:
                yield from self._backward_of_first_layer(child)
                continue
            if checkpointing and child in self.layers:
                yield from self._backward_with_recompute(child)
                continue
            yield from self._backward(child, checkpointing)
        if module.has_input and module is not self.embedding:
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
        """Without checkpointing the embedding's output needs no gradient, nor does what precedes lora_A of q, k, v."""
        norm, attention = layer.children[:2]
        without_gradient = {norm}
        without_input_gradient = {layer}
        for linear in attention.children[:3]:
            base, dropout, lora_a, _ = linear.children
            without_gradient |= {base, dropout}
            without_input_gradient |= {linear, lora_a}
        for visit in self._backward(layer, checkpointing=False):
            if visit.module in without_gradient or (not visit.enters and visit.module in without_input_gradient):
                continue
            yield visit


def parameter_sizes(shape: ModelShape, lora_rank: int) -> dict[str, int]:
    """Elements of every parameter of the model and its LoRA by name."""
    sizes = {}
    for name, dimensions in shape.parameters().items():
        sizes[name] = math.prod(dimensions)
    for index in range(len(shape.layers)):
        factors = [
            f"model.layers.{index}.{linear.name}.{factor}"
            for linear in shape.linears
            for factor in ("lora_A", "lora_B")
        ]
        sizes |= dict(zip(factors, shape.layer_lora_sizes(index, lora_rank), strict=True))
    return sizes


def _forward(module: Module, phase: Phase = "forward") -> Iterator[Visit]:
    yield Visit(module, phase, enters=True)
    for child in module.children:
        yield from _forward(child, phase)
    yield Visit(module, phase, enters=False)
