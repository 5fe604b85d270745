"""The experts of a decoder layer as two stacks of linears, with LoRA for each expert.

transformers holds the experts of a layer in two three-dimensional tensors. Here these are matrices: first the rows of
expert 0, then the rows of expert 1, and so on.

    gate_up  (experts · 2 · expert_size, hidden_size)   A (experts · r, hidden_size)   B (experts · 2 · expert_size, r)
    down     (experts · hidden_size, expert_size)       A (experts · r, expert_size)   B (experts · hidden_size, r)

Experts without a gate have `up` in place of `gate_up`, with half its rows.

An expert is a range of rows in each matrix, so a cut of experts is along axis 0. The same is true of codes and their
scales (frozen.py), whose blocks run along the columns. A product dequantises one expert at a time.

GPT-OSS stores the matrices transposed. The rows of a range are then inputs, and the columns outputs. LoRA's A and B are
still factors of that range, so only the products differ.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.frozen import DENSE, FrozenLinear, StorageFormat, stored_tensors
from loraprune_ds.model.groups import Shape, TensorSpec


class Routing(NamedTuple):
    """Says how tokens, sorted by expert, meet the matrices of a stack."""

    counts: list[int]  # the tokens of each expert
    transposed: bool  # the stack is (experts * inputs, outputs), not (experts * outputs, inputs)
    stored_as: StorageFormat = DENSE


# makes a tensor (experts, rows, columns) a frozen matrix. Returns its shape before, too
Join = Callable[[Tensor], tuple[Shape, nn.Parameter]]


def join_rows(stacked: Tensor) -> tuple[Shape, nn.Parameter]:
    return stacked.shape, nn.Parameter(stacked.detach().flatten(0, 1), requires_grad=False)


class ExpertStack(FrozenLinear):
    """Holds one linear of every expert: `weight` (experts * rows, columns)."""

    def __init__(self, stacked: Tensor, transposed: bool, join: Join = join_rows) -> None:
        """Takes transformers' tensor, (experts, rows, columns). If transposed, its rows are inputs."""
        nn.Module.__init__(self)
        self.transposed = transposed
        (experts, self.rows, self.in_features), self.weight = join(stacked)
        self.out_features = experts * self.rows
        self.register_parameter("bias", None)

    @property
    def experts(self) -> int:
        return self.out_features // self.rows

    def forward(self, input: Tensor, counts: list[int]) -> Tensor:
        """Maps tokens, sorted by expert. `counts` has the tokens of each expert."""
        routing = Routing(counts, self.transposed, self.stored_as)
        return multiply(input, routing, *stored_tensors(self))


class ExpertLora(LoraLinear):
    """PEFT's LoRA on a stack. Each expert has separate factors."""

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        # PEFT's further arguments differ from version to version
        super().update_layer(adapter_name, r, *args, **kwargs)
        experts = cast(ExpertStack, self.get_base_layer()).experts
        self.lora_A[adapter_name] = nn.Linear(cast(int, self.in_features), experts * r, bias=False)
        self.reset_lora_parameters(adapter_name, True)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:  # type: ignore[override]
        result = self.base_layer(x, counts)
        if self.disable_adapters:
            return result
        routing = Routing(counts, cast(ExpertStack, self.base_layer).transposed)
        for name in self.active_adapters:
            factors = [
                cast(Tensor, lora[name].weight).to(x.dtype) for lora in (self.lora_A, self.lora_B)
            ]
            if routing.transposed:
                factors.reverse()
            update = self.lora_dropout[name](x)
            for factor in factors:
                update = multiply(update, routing, factor)
            result = result + update * self.scaling[name]
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the change of the stack when LoRA is merged."""
        a = cast(Tensor, self.lora_A[adapter].weight)
        b = cast(Tensor, self.lora_B[adapter].weight)
        split = (len(a) // b.shape[1], -1)  # by expert
        product = torch.bmm(b.unflatten(0, split), a.unflatten(0, split))
        return product.flatten(0, 1) * self.scaling[adapter]


CORRECTION = "e_score_correction_bias"
# (experts, outputs), if the stock class has biases
BIASES = ("gate_up_proj_bias", "down_proj_bias")


class Experts(nn.Module):
    """Replaces transformers' experts of a decoder layer."""

    def __init__(self, stock: Any, join: Join) -> None:
        super().__init__()
        self._first = "gate_up" if stock.has_gate else "up"
        first: Tensor = getattr(stock, f"{self._first}_proj")
        self.add_module(self._first, ExpertStack(first, stock.is_transposed, join))
        self.down = ExpertStack(stock.down_proj, stock.is_transposed, join)
        for name in BIASES:
            bias: nn.Parameter | None = getattr(stock, name, None)
            if bias is not None:
                bias.requires_grad_(False)
            self.register_parameter(name, bias)
        self._activate: Callable[[Tensor], Tensor] = (
            stock._apply_gate if stock.has_gate else stock.act_fn
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Maps (tokens, hidden_size) by the chosen experts (tokens, k) and their weights (tokens, k)."""
        chosen = top_k_index.flatten()  # (tokens · k,)
        order = chosen.argsort(stable=True)
        down: Any = getattr(self.down, "base_layer", self.down)  # inside PEFT's LoRA
        counts = tokens_per_expert(chosen, down.experts)
        experts = chosen[order]
        tokens = order // top_k_index.shape[1]
        inside = getattr(self, self._first)(hidden_states[tokens], counts)
        inside = self._add_bias(BIASES[0], inside, experts)
        by_expert = self.down(self._activate(inside), counts)  # (tokens · k, hidden_size)
        by_expert = self._add_bias(BIASES[1], by_expert, experts)
        by_token = by_expert[order.argsort()].unflatten(0, top_k_index.shape)
        return (by_token * top_k_weights.unsqueeze(-1)).to(hidden_states.dtype).sum(1)

    def _add_bias(self, name: str, outputs: Tensor, experts: Tensor) -> Tensor:
        bias = cast(Tensor | None, getattr(self, name))
        return outputs if bias is None else outputs + bias[experts]


def stack_experts(model: nn.Module, join: Join = join_rows) -> None:
    """Replaces the experts of all layers. Buffers in weight files become frozen parameters, which can be cut.

    Args:
        join: for weights that are already sharded.
    """
    for module in list(model.modules()):
        _freeze_buffers(module)
        for name, child in list(module.named_children()):
            if isinstance(getattr(child, "down_proj", None), nn.Parameter):  # not a linear
                setattr(module, name, Experts(child, join))


def has_stacks(model: nn.Module) -> bool:
    """Tells whether `stack_experts` has replaced experts of this model."""
    return any(isinstance(module, ExpertStack) for module in model.modules())


def _freeze_buffers(module: nn.Module) -> None:
    """DeepSeek keeps a router's correction in a buffer, because another rule trains it."""
    # In order, because a gather joins parameters in their order.
    for name, buffer in list(module._buffers.items()):
        if buffer is not None and name not in module._non_persistent_buffers_set:
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def tokens_per_expert(chosen: Tensor, experts: int) -> list[int]:
    """Returns the tokens of each expert. Waits for the device. On the meta device all experts have equal numbers."""
    if chosen.is_meta:
        ends = [len(chosen) * i // experts for i in range(experts + 1)]
        return [end - start for start, end in pairwise(ends)]
    return cast(list[int], torch.bincount(chosen, minlength=experts).tolist())


def multiply(x: Tensor, routing: Routing, *stored: Tensor) -> Tensor:
    """Maps tokens (tokens, inputs), sorted by expert, each by the rows of its expert.

    Args:
        stored: the tensors of `routing.stored_as`. A dense weight may be trained.
    """
    return _Product.apply(x, routing, *stored)  # type: ignore[return-value]


def products(outputs: Tensor, inputs: Tensor, counts: list[int]) -> Tensor:
    """Returns outputs^T @ inputs for the tokens of each expert, concatenated: (experts * rows, columns)."""
    stack = outputs.new_empty(len(counts), outputs.shape[1], inputs.shape[1])
    for left, right, out in zip(outputs.split(counts), inputs.split(counts), stack, strict=True):
        torch.mm(left.t(), right, out=out)
    return stack.flatten(0, 1)


class _Product(torch.autograd.Function):
    """Computes `multiply`. autograd saves the parameters. Views of experts would keep the gathered weight alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(x, *stored)
        ctx.routing = routing
        rows, width = stored[0].shape
        width *= routing.stored_as.per_element
        if not routing.transposed:
            width = rows // len(routing.counts)
        return _multiply_into(x.new_empty(len(x), width), x, routing, stored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *stored = ctx.saved_tensors
        routing: Routing = ctx.routing
        x_gradient = stack_gradient = None
        if ctx.needs_input_grad[0]:
            back = routing._replace(transposed=not routing.transposed)
            x_gradient = _multiply_into(torch.empty_like(x), gradient, back, stored)
        if ctx.needs_input_grad[2]:
            outputs, inputs = (x, gradient) if routing.transposed else (gradient, x)
            stack_gradient = products(outputs, inputs, routing.counts)
        without_gradient = [None] * (len(stored) - 1)
        return x_gradient, None, stack_gradient, *without_gradient


def _multiply_into(out: Tensor, x: Tensor, routing: Routing, stored: Sequence[Tensor]) -> Tensor:
    """Maps the tokens of each expert by its matrix, (inputs, outputs) if transposed, otherwise (outputs, inputs)."""
    counts, transposed, stored_as = routing
    matrices = (tensor.unflatten(0, (len(counts), -1)) for tensor in stored)
    for tokens, result, *matrix in zip(x.split(counts), out.split(counts), *matrices, strict=True):
        if len(tokens):
            weight = stored_as.join(matrix)
            if not transposed:
                weight = weight.t()
            torch.mm(tokens, weight, out=result)
    return out


def as_in_peft(
    lora: Mapping[str, Tensor], linears: Iterable[TensorSpec], *, back: bool = False
) -> dict[str, Tensor]:
    """Renames and reorders the LoRA of a decoder layer ("{linear}.lora_A") for PEFT's `target_parameters`.

    A stack's A is the same there, (experts * r, in_features). B is (out_features, r * experts), with the columns of the
    experts interleaved. PEFT's A always has the inputs, so the factors of a transposed stack are swapped.

    Args:
        back: turns PEFT's names and order into ours.
    """
    tensors: dict[str, Tensor] = {}
    for linear in linears:
        ours = linear.linear
        theirs = _name_in_peft(linear)
        source, target = (theirs, ours) if back else (ours, theirs)
        a = lora[f"{source}.lora_A"]
        b = lora[f"{source}.lora_B"]
        if linear.stack:
            a, b = _reorder(a, b, linear.matrices, linear.stack.transposed, back)
        tensors[f"{target}.lora_A"] = a.contiguous()
        tensors[f"{target}.lora_B"] = b.contiguous()
    return tensors


def _name_in_peft(linear: TensorSpec) -> str:
    """PEFT wraps down_proj around gate_up_proj, which is then its `base_layer`."""
    if not linear.stack:
        return linear.linear
    experts, _, name = linear.linear.rpartition(".")
    return experts if name == "down" else f"{experts}.base_layer"


def _reorder(
    a: Tensor, b: Tensor, experts: int, transposed: bool, back: bool
) -> tuple[Tensor, Tensor]:
    a = a.unflatten(0, (experts, -1))
    if back:
        b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    else:
        b = b.unflatten(0, (experts, -1))
    if transposed:
        a, b = b.mT, a.mT
    # Now A is (experts, r, inputs) and B is (experts, outputs, r).
    if back:
        return a.flatten(0, 1), b.flatten(0, 1)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
