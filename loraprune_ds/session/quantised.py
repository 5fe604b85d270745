"""Takes over the linears of a base that bitsandbytes holds in 4 or 8 bits (QLoRA), so that a cut makes them smaller.

pretrained/quantised.py says what each becomes. No cut quantises anything again. Only a refit does.
"""

import logging
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.config_types import Bits
from loraprune_ds.engines import is_sharded
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.codecs import BLOCK, INT8, NF4
from loraprune_ds.model.frozen import WEIGHT, Blocks, QuantisedLinear, stored_tensors
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.quantised import blocks_of_4_bits, tensors_of_4_bits, tensors_of_8_bits
from loraprune_ds.pretrained.sources import folder_on_disk
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.session.live import base_shape

log = logging.getLogger(__name__)
PEFT_CLASSES = "peft.tuners.lora.bnb"  # the module of PEFT's LoRA over bitsandbytes' linears
SAME_CODES = 0.99  # of all codes: a GPU may round a number between two codes to the other one


class AdoptedLora(LoraLinear):
    """PEFT's LoRA over an adopted linear."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "LoRA cannot be merged into quantised weights; "
            "save_model of the callback, or of Pruning, writes a merged model"
        )


def quantisation(model: nn.Module) -> str | None:
    """Names the method by which transformers has quantised a model, also of an adopted one. None if it has not."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None and not getattr(base, "is_quantized", False):
        return None
    method = getattr(config, "quant_method", "an unknown method")
    return getattr(method, "value", method)  # transformers has an enum


def bits_of(config: Any) -> Bits:
    """Tells how bitsandbytes has quantised a model, by transformers' config of it."""
    settings = config.quantization_config
    if settings.load_in_8bit:
        return "int8"
    return "nf4_double" if settings.bnb_4bit_use_double_quant else "nf4"


def prepare_quantised(model: nn.Module, *, sharded: bool) -> None:
    """Makes LoRA over a quantised base fp32 again, before a Trainer makes an optimizer.

    TRL casts it to bf16, in which small updates are lost. Raises UserError if the weights will be sharded.
    """
    if quantisation(model) is None:
        return
    _check_whole(not sharded)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.requires_grad:
            parameter.data = parameter.data.float()


def adopt_quantised(model: PeftModel, *, refits: bool) -> None:
    """Replaces bitsandbytes' linears under LoRA in the decoder layers, in place. Does nothing the second time.

    LoRA's parameters stay the same objects, so an optimizer and DDP may hold them.

    Args:
        refits: cuts refit the linears that lose columns.

    Raises:
        UserError: the base is sharded, in FP4, or in blocks of another size.
    """
    if quantisation(model) is None:
        return
    base: Any = model.get_base_model()
    shape = base_shape(model)
    source = _Source(base.config)
    for i, layer in enumerate(decoder_layers(model)):
        modules: dict[str, Any] = dict(layer.named_modules())
        for spec in shape.layers[i].linears:
            module = modules.get(spec.linear)
            linear = getattr(module, "base_layer", None)
            if isinstance(linear, QuantisedLinear):
                _check_whole(not is_sharded(cast(nn.Parameter, linear.weight)))
                _prepare_refit(linear, spec, refits)
            elif type(module).__module__ == PEFT_CLASSES:
                name = f"{shape.prefix(i)}{spec.name}"
                _adopt(module, spec, name, source, refits)


def _adopt(module: Any, spec: TensorSpec, name: str, source: "_Source", refits: bool) -> None:
    """Replaces the linear in a module of PEFT. `name` is its weight's name in files."""
    linear = module.base_layer
    weight = linear.weight
    _check_whole(type(weight).__name__ in ("Params4bit", "Int8Params") and not is_sharded(weight))
    if hasattr(weight, "quant_state"):
        module.base_layer = _from_4_bits(linear, spec, name, source, refits)
    else:
        module.base_layer = _from_8_bits(linear, spec, name, source.dtype)
    module.__class__ = AdoptedLora
    module.is_target_conv_1d_layer = False  # an attribute that only LoraLinear has
    # Otherwise the list of all parameters in DDP keeps the old tensors alive.
    weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
    vars(weight).clear()


def _from_4_bits(
    linear: Any, spec: TensorSpec, name: str, source: "_Source", refits: bool
) -> QuantisedLinear:
    state = linear.weight.quant_state
    require(
        (state.quant_type, state.blocksize) == ("nf4", BLOCK),
        f"{name} is in {state.quant_type} with blocks of {state.blocksize}; "
        f"load the base with bnb_4bit_quant_type='nf4', in blocks of {BLOCK}",
    )
    refitted = refits and spec.loses_inputs
    stored_as = Blocks(INT8 if refitted else NF4, state.dtype, spec.loses_inputs)
    _, hidden = stored_as.matrix(spec.matrix)
    require(
        hidden % BLOCK == 0,
        f"{name}: a hidden size of {hidden} is no multiple of {BLOCK}, so 4-bit blocks span rows; "
        "load the base in 8 or 16 bits",
    )
    weight = source.read(name, linear.weight) if spec.loses_inputs else None
    return QuantisedLinear(
        linear, stored_as, tensors_of_4_bits(linear.weight, spec, stored_as, weight)
    )


def _from_8_bits(linear: Any, spec: TensorSpec, name: str, dtype: torch.dtype) -> QuantisedLinear:
    values = linear.weight.data.as_subclass(Tensor)
    require(values.dtype == torch.int8, f"{name}: llm_int8_has_fp16_weight=True is not supported")
    scale = linear.weight.SCB if linear.state.SCB is None else linear.state.SCB
    stored_as = Blocks(INT8, dtype, spec.loses_inputs)
    return QuantisedLinear(linear, stored_as, tensors_of_8_bits(values, scale, stored_as))


def _prepare_refit(linear: QuantisedLinear, spec: TensorSpec, refits: bool) -> None:
    """Turns NF4 of an earlier training, which had no refit, into int8."""
    before = cast(Blocks, linear.stored_as)
    if refits and spec.loses_inputs and before.codec == NF4:
        stored_as = replace(before, codec=INT8)
        linear.store_as(stored_as, stored_as.split(before.join(stored_tensors(linear))))


def _check_whole(whole: bool) -> None:
    require(
        whole,
        "a base quantised by bitsandbytes cannot be cut on ZeRO-3 or FSDP; train in one process, on DDP, "
        "or by launch/run.py with model.frozen: nf4",
    )


class _Source:
    """The files that a base was quantised from, if they are on this machine."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._warned = False
        self.dtype: torch.dtype = config.dtype

    def read(self, name: str, in_4_bits: Any) -> Tensor | None:
        """Reads the weight that bitsandbytes has quantised, onto the same device. None if files lack it."""
        codes = blocks_of_4_bits(in_4_bits)[WEIGHT]
        weight = self._matching(name, codes, in_4_bits.quant_state.dtype)
        if weight is None and not self._warned:
            self._warned = True
            log.warning(
                "%s and others that lose columns are rounded a second time: the files that %r was "
                "quantised from are not on this machine",
                name,
                self._config._name_or_path,
            )
        return weight

    def _matching(self, name: str, codes: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self._weights is None or name not in self._weights.files:
            return None
        weight = self._weights.read_full(name, dtype).to(codes.device)
        if weight.numel() != 2 * codes.numel():
            return None
        quantised = Blocks(NF4, dtype).split(weight.view(-1, BLOCK))[WEIGHT]
        same = (quantised == codes).float().mean()
        return weight if same > SAME_CODES else None

    @cached_property
    def _weights(self) -> ModelWeights | None:
        config = self._config
        folder = folder_on_disk(str(config._name_or_path), getattr(config, "_commit_hash", None))
        if folder is None:
            return None
        try:
            return open_pretrained(folder).weights
        except UserError:  # the files are quantised themselves
            return None
