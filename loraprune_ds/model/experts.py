"""The experts of a decoder layer as two stacks of linears, with LoRA for each expert.

transformers holds the experts of a layer in two tensors of three dimensions. Here they are matrices: the weights of
expert 0, below them those of expert 1, and so on.

    gate_up  (experts · 2 · expert_size, hidden_size)   A (experts · r, hidden_size)   B (experts · 2 · expert_size, r)
    down     (experts · hidden_size, expert_size)       A (experts · r, expert_size)   B (experts · hidden_size, r)

GPT-OSS stores each expert's matrices transposed. Then a block has the rows (inputs) and columns (outputs) of the file.
LoRA's A and B are factors of that block all the same, so only the products know of it.

So an expert is a block of rows in each of them, and a cut of experts is a cut along axis 0 like any other. That holds
for int8 weights and their scales, too (frozen.py). A product makes the weight of one expert at a time of them. PEFT's
own LoRA on such tensors (`target_parameters`) has a B whose columns belong to experts in turn.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraprune_ds.model.frozen import DENSE, Form, HeldLinear, held_tensors, join


class ExpertStack(HeldLinear):
    """Holds one linear of every expert: `weight` (experts * rows, columns)."""

    def __init__(self, stacked: Tensor, transposed: bool) -> None:
        """Takes what transformers has: (experts, rows, columns).

        Args:
            transposed: rows belong to inputs, and columns to outputs.
        """
        nn.Module.__init__(self)
        self.transposed = transposed
        experts, self.rows, self.in_features = stacked.shape
        self.out_features = experts * self.rows
        self.weight = nn.Parameter(stacked.detach().flatten(0, 1), requires_grad=False)
        self.register_parameter("bias", None)

    @property
    def experts(self) -> int:
        return self.out_features // self.rows

    def forward(self, input: Tensor, counts: list[int]) -> Tensor:
        """Maps tokens in the order of their experts. `counts`: how many each expert has."""
        return multiply(input, counts, self.transposed, self.form, *held_tensors(self))


class ExpertLora(LoraLinear):
    """PEFT's LoRA on a stack. Each expert has factors of its own."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        experts = cast(ExpertStack, self.get_base_layer()).experts
        self.lora_A[adapter_name] = nn.Linear(cast(int, self.in_features), experts * r, bias=False)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:  # type: ignore[override]
        result = self.base_layer(x, counts)
        if self.disable_adapters:
            return result
        transposed = cast(ExpertStack, self.base_layer).transposed
        for name in self.active_adapters:
            a, b = (cast(Tensor, factors[name].weight) for factors in (self.lora_A, self.lora_B))
            first, second = (b, a) if transposed else (a, b)
            inside = multiply(self.lora_dropout[name](x), counts, transposed, DENSE, first)
            result = result + multiply(inside, counts, transposed, DENSE, second) * self.scaling[name]
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns what merging adds to the stack."""
        a, b = (cast(Tensor, factors[adapter].weight) for factors in (self.lora_A, self.lora_B))
        blocks = (factor.unflatten(0, (len(a) // b.shape[1], -1)) for factor in (b, a))
        return torch.bmm(*blocks).flatten(0, 1) * self.scaling[adapter]


CORRECTION = "e_score_correction_bias"
BIASES = ("gate_up_proj_bias", "down_proj_bias")  # (experts, outputs), where the stock class has them


class Experts(nn.Module):
    """Stands in for the experts of a decoder layer, as transformers calls them."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gate_up, self.down = (ExpertStack(x, stock.is_transposed) for x in (stock.gate_up_proj, stock.down_proj))
        for name in BIASES:
            bias = getattr(stock, name, None)
            self.register_parameter(name, None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._apply_gate: Callable[[Tensor], Tensor] = stock._apply_gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes each token's chosen experts.

        Args:
            hidden_states: (tokens, hidden_size).
            top_k_index: (tokens, k) the chosen experts.
            top_k_weights: (tokens, k) their weights.
        """
        chosen = top_k_index.flatten()  # (tokens · k,)
        order = chosen.argsort(stable=True)
        counts = tokens_per_expert(chosen, self.experts)
        of_choice = chosen[order]
        gate_up = self._add(0, self.gate_up(hidden_states[order // top_k_index.shape[1]], counts), of_choice)
        by_expert = self._add(1, self.down(self._apply_gate(gate_up), counts), of_choice)  # (tokens · k, hidden_size)
        by_token = by_expert[order.argsort()].unflatten(0, top_k_index.shape)
        return (by_token * top_k_weights.unsqueeze(-1)).to(hidden_states.dtype).sum(1)

    def _add(self, which: int, outputs: Tensor, experts: Tensor) -> Tensor:
        """Adds the bias of each row's expert, if there are any."""
        bias = cast(Tensor | None, getattr(self, BIASES[which]))
        return outputs if bias is None else outputs + bias[experts]

    @property
    def experts(self) -> int:
        stack: Any = self.gate_up
        return getattr(stack, "base_layer", stack).experts


def stack_experts(model: nn.Module) -> None:
    """Replaces the experts of all decoder layers. A router's correction becomes a parameter, as a cut makes it smaller.

    transformers has it as a buffer, because DeepSeek trains it by another rule.
    """
    for module in list(model.modules()):
        if (correction := module._buffers.pop(CORRECTION, None)) is not None:
            module.register_parameter(CORRECTION, nn.Parameter(correction, requires_grad=False))
        for name, child in list(module.named_children()):
            weight = getattr(child, "gate_up_proj", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 3:
                setattr(module, name, Experts(child))


def find_experts(layer: nn.Module) -> list[Experts]:
    """Returns the experts of a decoder layer. Empty if it has none."""
    return [module for module in layer.modules() if isinstance(module, Experts)]


class RouterLoad:
    """Counts how often each expert of every layer is chosen in the first passes while it is open."""

    def __init__(self, layers: Iterable[nn.Module], passes: int) -> None:
        self._experts = [find_experts(layer) for layer in layers]
        self._passes = passes
        self._found: list[list[Tensor]] = [[] for _ in self._experts]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for i, of_layer in enumerate(self._experts):
            self._hooks += [experts.register_forward_pre_hook(partial(self._see, i)) for experts in of_layer]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, i: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, chosen, _ = inputs
        if len(self._found[i]) < self._passes:
            self._found[i].append(torch.bincount(chosen.flatten(), minlength=cast(Experts, module).experts))

    def sums(self, add_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> list[list[int]]:
        """Returns the counts of all ranks, by layer and expert. Empty without experts. Collective."""
        if not any(self._experts):
            return []
        sizes = [sum(experts.experts for experts in of_layer) for of_layer in self._experts]
        counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        for part, found in zip(counts.split(sizes), self._found, strict=True):
            for of_pass in found:
                part += of_pass
        return [cast(list[int], part.tolist()) for part in torch.split(add_over_ranks(counts), sizes)]


def tokens_per_expert(chosen: Tensor, experts: int) -> list[int]:
    """Counts how often each expert was chosen. It waits for the device.

    On the meta device nobody chooses. There all get alike, as the planner assumes.
    """
    if chosen.is_meta:
        return [len(chosen) * (i + 1) // experts - len(chosen) * i // experts for i in range(experts)]
    return cast(list[int], torch.bincount(chosen, minlength=experts).tolist())


def multiply(x: Tensor, counts: list[int], transposed: bool, form: Form, *held: Tensor) -> Tensor:
    """Maps the tokens of each expert by its own block of rows.

    Args:
        x: (tokens, inputs), in the order of the experts.
        counts: tokens of each expert.
        transposed: the stack is (experts * inputs, outputs), not (experts * outputs, inputs).
        form: of the stack.
        held: the tensors of `form`. A dense one may be trained.

    Returns:
        (tokens, outputs).
    """
    return _Product.apply(x, counts, transposed, form, *held)  # type: ignore[return-value]


def products(outputs: Tensor, inputs: Tensor, counts: list[int]) -> Tensor:
    """Returns the sum over an expert's tokens of the products of two rows, one expert below the other.

    Args:
        outputs, inputs: (tokens, rows) and (tokens, columns), in the order of the experts.

    Returns:
        (experts * rows, columns).
    """
    found = outputs.new_empty(len(counts), outputs.shape[1], inputs.shape[1])
    for left, right, out in zip(outputs.split(counts), inputs.split(counts), found, strict=True):
        torch.mm(left.t(), right, out=out)
    return found.flatten(0, 1)


class _Product(torch.autograd.Function):
    """Maps each block of tokens by a block of rows. autograd keeps the parameters, which ZeRO-3 frees and gathers.

    It would keep a view of every block otherwise, and with it the gathered weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], transposed: bool, form: Form, *held: Tensor) -> Tensor:
        ctx.save_for_backward(x, *held)
        ctx.counts, ctx.transposed, ctx.form = counts, transposed, form
        y = x.new_empty(len(x), held[0].shape[1] if transposed else len(held[0]) // len(counts))
        for tokens, out, *block in zip(x.split(counts), y.split(counts), *_by_expert(held, counts), strict=True):
            if len(tokens):
                torch.mm(tokens, _from_inputs(join(form, block), transposed), out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *held = ctx.saved_tensors
        counts, transposed, form = ctx.counts, ctx.transposed, ctx.form
        of_x = of_stack = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            rows = of_x.split(counts)
            for out, tokens, *block in zip(gradient.split(counts), rows, *_by_expert(held, counts), strict=True):
                if len(tokens):
                    torch.mm(out, _from_inputs(join(form, block), transposed).t(), out=tokens)
        if ctx.needs_input_grad[4]:
            of_stack = products(x, gradient, counts) if transposed else products(gradient, x, counts)
        return of_x, None, None, None, of_stack, *[None] * (len(held) - 1)


def _by_expert(held: Sequence[Tensor], counts: list[int]) -> list[Tensor]:
    """Returns (experts, rows, columns) of each tensor that holds a stack."""
    return [tensor.unflatten(0, (len(counts), -1)) for tensor in held]


def _from_inputs(block: Tensor, transposed: bool) -> Tensor:
    """Returns an expert's weight as (inputs, outputs)."""
    return block if transposed else block.t()
