"""Refits the linears that lose inputs in a cut, from forward passes that are repeated right before it.

Nothing is measured between cuts. Once the groups to keep are known, the last passes run again (passes.py), in
evaluation mode and layer by layer: all passes go through a layer before one enters the next. So only the second moments
of `world_size` layers exist at a time, one layer's on each rank. Hidden states go on with the weights of before the
refit. Therefore layers do not depend on each other, and the ranks solve theirs side by side.

A pass is a greenlet that stops before every layer. Its frame holds whatever the model hands from layer to layer.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from loraprune_ds.errors import RunError
from loraprune_ds.model.groups import LayerKeep, TensorSpec
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning.compensate import (
    add_half_of_product,
    empty_half,
    from_half,
    measured_linears,
    refit,
)
from loraprune_ds.pruning.passes import Call, Pass, layer_lists, layer_stacks
from loraprune_ds.pruning.prunable_model import CollectedLinear, PrunableModel, hook_inputs
from loraprune_ds.ranks.device import to_device

Halves = dict[LinearId, Tensor]  # half of each second moment, flat (compensate.py)


@torch.no_grad()
def refit_by_replay(
    model: PrunableModel, keep: list[LayerKeep], passes: Sequence[Pass], step: int
) -> None:
    """Refits the weights that lose inputs in the cut to `keep`, right before it. Collective.

    Args:
        passes: of this rank, at least one.

    Raises:
        RunError: the moments of a linear cannot be inverted. The line names the step and the linear.
    """
    shrinking: dict[LinearId, TensorSpec] = {}
    for i, linear in measured_linears(model.shape):
        if linear.shrinks(keep[i]):
            shrinking[LinearId(i, linear.linear)] = linear
    if not shrinking:
        return

    def compute(halves: Halves, key: LinearId, linear: CollectedLinear) -> Tensor:
        spec = shrinking[key]
        moment = from_half(halves.pop(key), spec.inputs)
        try:
            return refit(linear, moment, spec.kept_indices(keep[key.layer]))
        except RunError as error:
            raise RunError(f"step {step}: layer {key.layer} {key.name}: {error}") from None

    with evaluating(model.module), model.repeating_passes():
        for linear_ids, halves in _measure(model, shrinking, passes):
            model.replace_weights(linear_ids, partial(compute, halves))


def _measure(
    model: PrunableModel, shrinking: dict[LinearId, TensorSpec], passes: Sequence[Pass]
) -> Iterator[tuple[list[LinearId], Halves]]:
    """Yields the linears of at most `world_size` layers, and half of their moments, each on its layer's owner."""
    linear_ids: list[LinearId] = []
    halves: Halves = {}
    for layer, lanes in _enter_layers(model, passes, max(key.layer for key in shrinking)):
        if linear_ids and linear_ids[0].layer // model.world_size < layer // model.world_size:
            yield linear_ids, halves
            linear_ids, halves = [], {}
        linears = {key: spec for key, spec in shrinking.items() if key.layer == layer}
        halves |= _measure_layer(model, layer, linears, lanes)
        linear_ids += linears
    if linear_ids:
        yield linear_ids, halves


def _measure_layer(
    model: PrunableModel, layer: int, linears: dict[LinearId, TensorSpec], lanes: Sequence["Lane"]
) -> Halves:
    """Sends all passes through a layer. Returns half of the moments of its linears, on its owner alone."""
    parts = {key: empty_half(spec.inputs, model.device) for key, spec in linears.items()}
    inputs = [(layer, spec) for spec in linears.values()]
    # autocast forgets the casts of weights where the outermost block ends
    outermost = torch.autocast(model.device.type, enabled=False)
    with model.gathered(model.layers[layer]), outermost:
        for lane in lanes:
            with lane.seeing_inputs(model, inputs, parts):
                lane.advance()
    halves: Halves = {}
    for key, part in parts.items():
        total = model.comm.reduce_to(model.owner(layer), part)
        if total is not None:
            halves[key] = total
    return halves


def _enter_layers(
    model: PrunableModel, passes: Sequence[Pass], last: int
) -> Iterator[tuple[int, list["Lane"]]]:
    """Yields each layer up to the `last`, with all passes right before it. They must be advanced behind it."""
    encoded: list[Tensor | None] = [None] * len(passes)
    stacks = zip(layer_stacks(model), layer_lists(model), model.shape.layer_lists, strict=True)
    for number, (stack, layer_list, layers) in enumerate(stacks):
        if layers.start > last:
            return
        with _stops([*layer_list.children()]):
            pairs = zip(passes, encoded, strict=False)
            # an encoder may have run alone
            own = [(kept[number], states) for kept, states in pairs if number in kept]
            # All ranks enter each layer equally often.
            most = max(model.comm.gather_objects(len(own)))
            own += [(call.without_tokens(), states) for call, states in own[-1:]] * (
                most - len(own)
            )
            tokens = _real_tokens([call for call, _ in own], model.device)
            lanes = [
                Lane(stack, *inputs, real, model.device.type)
                for inputs, real in zip(own, tokens, strict=True)
            ]
            # embeddings and norms
            outside = [child for child in stack.children() if child is not layer_list]
            with model.gathered(*outside):
                for lane in lanes:
                    lane.advance()  # computes its embeddings
            for layer in layers[: last + 1 - layers.start]:
                yield layer, lanes
            if last < layers.stop:
                for lane in lanes:
                    lane.close()
                return
            with model.gathered(*outside):
                encoded = [lane.finish() for lane in lanes]


def _real_tokens(calls: list[Call], device: torch.device) -> list[Tensor | None]:
    """Returns the flat positions without padding of each call. None without a mask. Waits for the device once."""
    masks = [to_device(call.mask.flatten(), device) for call in calls if call.mask is not None]
    if not masks:
        return [None] * len(calls)
    on_host = iter(torch.split(torch.cat(masks).cpu(), list(map(len, masks))))
    return [
        None if call.mask is None else to_device(next(on_host).nonzero().flatten(), device)
        for call in calls
    ]


class Lane:
    """A pass through one list of layers, which stops before each layer and behind the last."""

    def __init__(
        self,
        stack: nn.Module,
        call: Call,
        encoded: Tensor | None,
        real: Tensor | None,
        device_type: str,
    ) -> None:
        inputs = call.inputs | {"use_cache": False}
        if encoded is not None:
            inputs["encoder_hidden_states"] = encoded
        self._autocast = call.autocast
        self._real = real
        self._device_type = device_type
        self._pass = greenlet(partial(stack, **inputs))

    def advance(self) -> Any:
        """Runs to the next stop."""
        dtype = self._autocast
        with torch.autocast(self._device_type, dtype=dtype, enabled=dtype is not None):
            return self._pass.switch()

    def finish(self) -> Tensor:
        """Runs from behind the last layer to the end. Returns the last hidden states."""
        return self.advance().last_hidden_state

    def close(self) -> None:
        """Ends the pass where it has stopped."""
        self._pass.throw()

    @contextmanager
    def seeing_inputs(
        self, model: PrunableModel, linears: list[tuple[int, TensorSpec]], halves: Halves
    ) -> Generator[None]:
        """Adds the inputs of these linears, without padding, to half of their second moments."""

        def see(key: LinearId, inputs: Tensor) -> None:
            tokens = inputs.flatten(0, 1)
            if self._real is not None:
                tokens = tokens.index_select(0, self._real)
            add_half_of_product(halves[key], tokens)

        remove = hook_inputs(model, linears, see)
        try:
            yield
        finally:
            remove()


@contextmanager
def _stops(layers: Sequence[nn.Module]) -> Generator[None]:
    """Makes every pass in a greenlet stop before each of these layers, and behind the last."""

    def stop(*_: Any) -> None:
        cast(greenlet, getcurrent().parent).switch()

    with ExitStack() as hooks:
        for layer in layers:
            # an engine's own hooks gather the layer, so they must come after
            hooks.enter_context(layer.register_forward_pre_hook(stop, prepend=True))
        hooks.enter_context(layers[-1].register_forward_hook(stop))
        yield


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Turns off dropout, then restores the mode of each module."""
    training = [part for part in module.modules() if part.training]
    # `eval` would let transformers replace the kernels, by some that have no gradient
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
