"""Watches the forward passes of a trainer."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.errors import UserError, require
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning.passes import after_backward, inputs_by_name, layer_stacks, tokens_of
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.session.compiled import refuse_compiled

# whose kernels go around linears, by a part of the module's name: what turns them off
KERNELS = {
    "axolotl": "set lora_qkv_kernel, lora_o_kernel and lora_mlp_kernel to false",
    "unsloth": "load the model by transformers",
}


class ForwardWatch:
    """Records the forward passes that have a backward pass, and counts their tokens.

    References, generations and evaluations have none. The hooks are on encoder and decoder, because a trainer with a
    fused loss calls the decoder directly.

    Attributes:
        active: an optimizer step is open.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.active = False
        self._pruner = pruner
        self._tokens = torch.zeros((), dtype=torch.float64, device=pruner.model.device)
        self._recording = ExitStack()
        self._hooks = ExitStack()
        self._layer_lists = pruner.model.shape.family.layer_lists
        self._known: Sequence[Tensor | None] | None = None  # masks that the loop has told
        for number, module in enumerate(layer_stacks(pruner.model)):
            self._hooks.enter_context(
                module.register_forward_pre_hook(
                    partial(self._begin, number),
                    with_kwargs=True,
                    prepend=True,  # before the hook that keeps the inputs
                )
            )
            self._hooks.enter_context(module.register_forward_hook(self._end, always_call=True))
        self._count: Callable[[], object] | None = None  # counts the pass that runs
        self._calls = self._hooks.enter_context(ExitStack())  # hooks until the first check
        linears = pruner.model.shape.linears()
        self._uncalled = {LinearId(i, linear.linear) for i, linear in linears if linear.spans}
        for where in self._uncalled:
            module = pruner.model.layers[where.layer].get_submodule(where.name)
            hook = partial(self._note_call, where)
            self._calls.enter_context(module.register_forward_pre_hook(hook))
        self._checked = False

    def begin(self, step: int) -> None:
        """Begins a step. Raises UserError if one is open."""
        require(
            not self.active, f"begin_step was called twice in step {step}, without end_step between"
        )
        self.active = True

    @contextmanager
    def know(self, masks: Sequence[Tensor | None]) -> Generator[None]:
        """Takes these masks for a pass, in place of its own. An encoder's is first."""
        self._known = masks
        try:
            yield
        finally:
            self._known = None

    def take_tokens(self) -> Tensor:
        """Returns this rank's tokens since the last call, without padding: one fp64 number on the device."""
        tokens = self._tokens.clone()
        self._tokens.zero_()
        return tokens

    def check(self, tokens: int, step: int) -> None:
        """Checks that the passes of some rank had tokens, and once that they called each scored linear. Collective."""
        require(
            tokens > 0,
            f"step {step}: no forward pass was in training mode, so none was recorded; "
            "call model.train() before",
        )
        if self._checked:
            return
        self._checked = True
        self._calls.close()
        model = self._pruner.model
        uncalled = set.intersection(*model.comm.gather_objects(self._uncalled))
        if uncalled:
            raise UserError(_describe(model.layers, min(uncalled)))

    def close(self) -> None:
        self._hooks.close()

    def _note_call(self, where: LinearId, *_: Any) -> None:
        if self._count is not None:
            self._uncalled.discard(where)

    def _begin(
        self, number: int, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not (self.active and decoder.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():  # no module shows that code around the model is compiled
            refuse_compiled()  # pyright: ignore[reportCallIssue]
        named = inputs_by_name(decoder, args, kwargs)
        inputs = tokens_of(named)
        size = inputs.shape[:2]
        mask = named.get("attention_mask")
        if self._known is not None:
            mask = self._known[number]
        # a target, whose last token predicts nothing
        elif mask is None and "encoder_hidden_states" in named:
            mask = ~torch.isin(inputs, inputs.new_tensor(_padding_and_ends(decoder.config)))
            mask[:, 0] = True  # the start token has the id of padding
        if isinstance(mask, Tensor) and mask.shape == size:  # (samples, window), False at padding
            mask = mask.bool()
            tokens = mask.sum()
        else:  # no padding, or packed samples
            mask = None
            tokens = size.numel()
        self._count = partial(self._tokens.add_, tokens)
        self._recording.enter_context(self._pruner.record_forward(*[mask] * len(self._layer_lists)))

    def _end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self._count is not None and output is not None:  # the forward pass did not fail
            after_backward(output, self._count)
        self._count = None
        self._recording.close()


def _describe(layers: nn.ModuleList, where: LinearId) -> str:
    """Says who went around a linear, by the forward of the module around it."""
    around: Any = layers[where.layer].get_submodule(where.name.rpartition(".")[0])
    maker = around.forward.__module__
    advice = next((KERNELS[k] for k in KERNELS if k in maker), "leave this replacement out")
    return (
        f"layer {where.layer} {where.name} was called by no forward pass, so it has no score: "
        f"{type(around).__name__} goes around it, by its forward of {maker}; {advice}"
    )


def _padding_and_ends(config: Any) -> list[int]:
    """Lists the ids of padding and of a text's ends. A config may lack them, or name several ends."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [index for index in (config.pad_token_id, *ends) if index is not None]
