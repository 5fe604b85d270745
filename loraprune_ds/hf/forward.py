"""Watches the forward passes of a model in an external training."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.hf.live import PrunedTraining
from loraprune_ds.model.classes import decoder_layers


class ForwardWatch:
    """Records the forward passes that have a backward pass, and counts their tokens.

    A reference, a generation and an evaluation have none. The hooks are on the decoder, because a trainer with a fused
    loss calls it without the model around it.

    Attributes:
        active: an optimizer step is open.
    """

    def __init__(self, training: PrunedTraining) -> None:
        self.active = False
        self._model, self._pruner = training.model, training.pruner
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._model.device)
        self._trained = True  # in the last forward pass
        self._recording = ExitStack()
        layers = decoder_layers(training.peft_model)
        decoder = next(m for m in training.peft_model.modules() if any(child is layers for child in m.children()))
        self._hooks = [
            training.peft_model.register_forward_pre_hook(self._note_mode, prepend=True),  # before DeepSpeed's own
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]

    def take_tokens(self) -> int:
        """Returns this rank's tokens since the last call, without padding."""
        tokens = int(self._tokens)
        self._tokens.zero_()
        return tokens

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note_mode(self, module: nn.Module, args: Any) -> None:
        """Forgets the order of modules between training and evaluation (`TrainingEngine.infer`)."""
        if module.training != self._trained:
            self._model.forget_trace()
            self._trained = module.training

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.active and decoder.training and torch.is_grad_enabled()):
            return
        samples, window, mask = padding_mask(args, kwargs)
        self._tokens += samples * window if mask is None else mask.sum()
        self._recording.enter_context(self._pruner.record_forward(mask))

    def _end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._recording.close()


def padding_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, Tensor | None]:
    """Reads the call of a decoder. Returns samples, window and a mask (samples, window) that is False at padding.

    The mask is None where the call has no such mask, as with packed samples.
    """
    inputs = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    mask, size = kwargs.get("attention_mask"), tuple(inputs.shape[:2])
    is_padding = isinstance(mask, Tensor) and tuple(mask.shape) == size
    return size[0], size[1], cast(Tensor, mask).bool() if is_padding else None
