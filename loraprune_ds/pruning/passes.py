"""Keeps the inputs of the last passes, by which a cut can repeat them (replay.py).

A call counts once a backward pass through it has ended. So one that failed and was tried again counts once.

Token ids and masks are tiny beside what a pass computes. A model with its own embeddings of images is called with
hidden states instead of ids, and those are kept.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from types import NoneType
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel

# Fewer lose part of what a refit gains, and more gain nothing (tests/benchmarks/README.md, "Tokens of a refit").
TOKENS_PER_INPUT = 10
MOST_STEPS = 16
# the pass that is repeated makes its own
OF_THE_PASS = ("use_cache", "encoder_hidden_states")
# torch reads them back without running code
PLAIN = (bool, int, float, str, torch.dtype, NoneType)
AUTOGRAD: Any = torch.autograd.Variable._execution_engine  # pyright: ignore


@dataclass(eq=False)
class Call:
    """How a list of layers was called in a forward pass.

    Attributes:
        inputs: by the parameters of the module that holds the layers.
        mask: (batch, window), False at padding. None without padding.
        autocast: its dtype. None if it was off.
    """

    inputs: dict[str, Any]
    mask: Tensor | None
    autocast: torch.dtype | None

    def without_tokens(self) -> "Call":
        """Returns the call with all of its tokens as padding."""
        tokens = tokens_of(self.inputs)
        return replace(self, mask=tokens.new_zeros(tokens.shape[:2], dtype=torch.bool))


# The calls of one forward pass by the number of the list: an encoder has 0 and its decoder 1.
Pass = dict[int, Call]
# reads what a rank has written (`KeptPasses.to_plain`)
ReadPlain = Callable[[], JsonObject]


@dataclass
class StepPasses:
    """The passes of this rank in an optimizer step, and the tokens of all ranks in it, without padding."""

    passes: list[Pass]
    tokens: int = 0


class KeptPasses:
    """Keeps this rank's passes of the last steps: all that a refit needs, and at most `MOST_STEPS`.

    Attributes:
        steps: oldest first. All ranks have the same steps.
        detach: removes the hooks from the model.
    """

    def __init__(self, model: PrunableModel) -> None:
        self.steps: deque[StepPasses] = deque(maxlen=MOST_STEPS)
        self._model = model
        self._masks: tuple[Tensor | None, ...] | None = None  # of the pass that is kept
        self._pass: Pass = {}  # the newest
        self._call: Call | None = None  # whose forward pass runs
        hooks = ExitStack()
        for number, stack in enumerate(layer_stacks(model)):
            begin = partial(self._begin_call, number)
            hooks.enter_context(stack.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.enter_context(stack.register_forward_hook(partial(self._end_call, number)))
        self.detach = hooks.close

    def begin_step(self) -> None:
        self.steps.append(StepPasses([]))
        self._pass = {}

    @contextmanager
    def record_forward(self, *masks: Tensor | None) -> Generator[None]:
        """Keeps the inputs of one micro-batch. Close it before the backward pass.

        A pass begins with the first list of layers, so an encoder and its decoder may come in two calls.

        A mask, (batch, window), is False at padding. An encoder's is first.
        """
        self._masks = masks
        try:
            yield
        finally:
            self._masks = None

    def end_step(self, tokens: int, inputs: int) -> None:
        """Notes the tokens of the global batch, and forgets the steps that linears of so many inputs do not need."""
        self.steps[-1].tokens = tokens
        enough = tokens_needed(self._model.shape, inputs)
        while self.tokens - self.steps[0].tokens >= enough:
            self.steps.popleft()

    def to_plain(self) -> JsonObject:
        """Returns tensors and plain values, for a checkpoint. Every rank writes its own."""
        steps = [
            [{n: vars(call) for n, call in kept.items()} for kept in step.passes]
            for step in self.steps
        ]
        return {"tokens": [step.tokens for step in self.steps], "steps": steps}

    def restore(self, of_ranks: Sequence[ReadPlain]) -> None:
        """Restores what the ranks of a checkpoint have written, on any number of ranks.

        A rank takes whole files, or a part of one that several share, because passes may hold hidden states.
        """
        self.steps.clear()
        if not of_ranks:
            return
        rank = self._model.rank
        turn, first = divmod(rank, len(of_ranks))
        sharing = len(range(first, self._model.world_size, len(of_ranks)))
        own = [read() for read in of_ranks[first :: self._model.world_size]]
        for step, tokens in enumerate(own[0]["tokens"]):
            calls: list[Any] = [of_pass for file in own for of_pass in file["steps"][step]]
            passes = [{n: Call(**call) for n, call in of_pass.items()} for of_pass in calls]
            # each rank enters each layer
            spare = [{n: call.without_tokens() for n, call in kept.items()} for kept in passes[-1:]]
            self.steps.append(StepPasses(passes[turn::sharing] or spare, tokens))

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    def passes(self) -> list[Pass]:
        return [kept for step in self.steps for kept in step.passes]

    def _begin_call(
        self, number: int, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._masks is None:
            return
        require(
            number == 0 or 0 in self._pass,
            "a decoder was called without a pass of its encoder, which the refit of a cut must repeat; "
            "call the whole model, or set compensate: none",
        )
        device_type = self._model.device.type
        autocast = None
        if torch.is_autocast_enabled(device_type):
            autocast = torch.get_autocast_dtype(device_type)
        kept = {
            name: _plain(name, value)
            for name, value in inputs_by_name(stack, args, kwargs).items()
            if not (value is None or name in OF_THE_PASS or _is_empty_cache(value))
        }
        self._call = Call(kept, None, autocast).without_tokens()

    def _end_call(self, number: int, stack: nn.Module, args: Any, output: Any) -> None:
        call = self._call
        if self._masks is None or call is None:
            return
        if number == 0:
            self._pass = {}
        elif number in self._pass:  # another target of the same source
            self._pass = {0: self._pass[0].without_tokens()}
        self._pass[number] = call
        kept = self._pass
        passes = self.steps[-1].passes
        mask = _plain("mask", self._masks[number])

        def count() -> None:
            call.mask = mask
            if kept not in passes:
                passes.append(kept)

        after_backward(output, count)


def after_backward(output: Any, action: Callable[[], object]) -> None:
    """Acts once, when a backward pass through the output of a list of layers has ended."""
    once = cache(action)

    def wait(_: Tensor) -> None:
        AUTOGRAD.queue_callback(once)

    if output[0].requires_grad:
        output[0].register_hook(wait)


def inputs_by_name(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return signature(stack.forward).bind_partial(*args).arguments | kwargs


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Returns the ids, or the embeddings, that a list of layers was called with."""
    names = ("input_ids", "inputs_embeds")
    return next(inputs[name] for name in names if inputs.get(name) is not None)


def tokens_needed(shape: ModelShape, inputs: int) -> int:
    """Counts the tokens of all ranks that a refit of linears with so many inputs needs, in all lists of layers."""
    return TOKENS_PER_INPUT * inputs * len(shape.family.layer_lists)


def layer_lists(model: PrunableModel) -> list[nn.Module]:
    """Lists the lists of layers, an encoder's first. A layer in them may be wrapped, as for checkpointing."""
    base = cast(PeftModel, model.module).get_base_model()
    return [base.get_submodule(layers.path) for layers in model.shape.family.layer_lists]


def layer_stacks(model: PrunableModel) -> list[nn.Module]:
    """Lists the modules whose forward passes go through a list of layers, an encoder's first."""
    base = cast(PeftModel, model.module).get_base_model()
    paths = [layers.path.rpartition(".")[0] for layers in model.shape.family.layer_lists]
    return [base.get_submodule(path) for path in paths]


def _is_empty_cache(value: Any) -> bool:
    return isinstance(value, Cache) and value.get_seq_length() == 0


def _plain(name: str, value: Any) -> Any:
    """Copies tensors without their graph, also inside of lists and dicts. Raises UserError for other objects."""
    if isinstance(value, Tensor):
        return value.detach().clone()  # a trainer may use its batch again
    if isinstance(value, dict):
        parts = cast(dict[str, Any], value)
        return {key: _plain(name, part) for key, part in parts.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, part) for part in cast(list[Any], value)]
    require(
        type(value) in PLAIN,
        f"{name}: the refit of a cut cannot repeat a forward pass with a {type(value).__name__}; "
        "pass tensors and plain values alone, or set compensate: none",
    )
    return value
