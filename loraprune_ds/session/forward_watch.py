"""Watches the forward passes of a trainer."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.pruning.passes import layer_stacks
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.session.compiled import refuse_compiled


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
        self._tokens = torch.zeros((), dtype=torch.int64, device=pruner.model.device)
        self._recording = ExitStack()
        self._hooks = ExitStack()
        self._layer_lists = pruner.model.shape.family.layer_lists
        for module in layer_stacks(pruner.model):
            self._hooks.enter_context(
                module.register_forward_pre_hook(
                    self._begin,
                    with_kwargs=True,
                    prepend=True,  # before the hook that keeps the inputs
                )
            )
            self._hooks.enter_context(module.register_forward_hook(self._end, always_call=True))

    def take_tokens(self) -> Tensor:
        """Returns this rank's tokens since the last call, without padding: one fp64 number on the device."""
        tokens = self._tokens.double()
        self._tokens.zero_()
        return tokens

    def close(self) -> None:
        self._hooks.close()

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.active and decoder.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():  # no module shows that code around the model is compiled
            refuse_compiled()  # pyright: ignore[reportCallIssue]
        candidates = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next(x for x in candidates if x is not None)
        size = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        # a target, whose last token predicts nothing
        if mask is None and "encoder_hidden_states" in kwargs:
            mask = ~torch.isin(inputs, inputs.new_tensor(_padding_and_ends(decoder.config)))
            mask[:, 0] = True  # the start token has the id of padding
        if isinstance(mask, Tensor) and mask.shape == size:  # (samples, window), False at padding
            mask = mask.bool()
            self._tokens += mask.sum()
        else:  # no padding, or packed samples
            mask = None
            self._tokens += size.numel()
        self._recording.enter_context(self._pruner.record_forward(*[mask] * len(self._layer_lists)))

    def _end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._recording.close()


def _padding_and_ends(config: Any) -> list[int]:
    """Lists the ids of padding and of a text's ends. A config may lack them, or name several ends."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [index for index in (config.pad_token_id, *ends) if index is not None]
