"""Reads the shape and dtype of a PEFT model in memory, and watches its forward passes."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError, require
from loraprune_ds.hf.checks import refuse_mixture
from loraprune_ds.model.adapters import base_parameter, last_names, plain_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.family import find_family
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.read_shape import read_model, shape_from_config
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.tensors import LayerSpec
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.zero.params import full_shape
from loraprune_ds.zero.sharded import ShardedModel


def linear_names(model: PreTrainedModel | str | Path) -> list[str]:
    """Returns the names of all linears of a decoder layer, for PEFT's `target_modules`.

    Args:
        model: a model, or its folder or hub id. UserError if its type is not supported.
    """
    if isinstance(model, PreTrainedModel):
        config, where = model.config.to_dict(), type(model).__name__
    else:  # AutoConfig would ask on the terminal whether to run code in the folder
        config, where = PreTrainedConfig.get_config_dict(model)[0], str(model)
    refuse_mixture(find_family(config.get("model_type"), where), where)
    return last_names(linear.linear for _, linear in shape_from_config(config, where).linears())


def unshare_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a T5 or mT5 into a UMT5 without dropout, to prune it. Each layer gets a copy of the shared bias.

    Raises:
        UserError: the model is already sharded.
    """
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    require(not sharded, "unshare_bias: the model is sharded; load it before you make TrainingArguments")
    shape, made = read_model(model.config.to_dict() | _tied(model), type(model).__name__)
    tensors = model.state_dict()
    made.load_state_dict(tensors | {copy: tensors[name] for copy, name in shape.shared_tensors.items()}, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def find_peft_model(model: nn.Module) -> PeftModel:
    """Finds the PEFT model inside an engine. Raises UserError if there is none."""
    inner: Any = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module
    if not isinstance(inner, PeftModel):
        raise UserError(f"pruning needs a PEFT model with LoRA; this is a {type(inner).__name__}")
    return inner


def base_config(model: PeftModel) -> dict[str, Any]:
    """Returns config.json of the dense model, as `save_pretrained` would write it."""
    config = json.loads(cast(Any, model.get_base_model()).config.to_json_string())
    config.pop("use_cache", None)  # trainers switch it off
    return config | _tied(model.get_base_model())


def _tied(base: Any) -> dict[str, bool]:
    """Returns the setting for a head tied to the embedding. The config may claim it although the files have both."""
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    head, embedding = (plain_parameter(module, "weight", trained=False) for module in ends)
    return {"tie_word_embeddings": head is embedding}


def model_name(model: PeftModel) -> str:
    """Names the dense model: a hub id or the last part of a folder."""
    base = cast(Any, model.get_base_model())
    return Path(base.config._name_or_path).name or type(base).__name__


def base_shape(model: PeftModel) -> ModelShape:
    """Returns the shape in the model's config, which stays the dense shape."""
    base = cast(Any, model.get_base_model())
    return shape_from_config(base.config.to_dict() | _tied(base), model_name(model))


def live_shape(model: PeftModel) -> ModelShape:
    """Returns the shape of the weights."""
    shape = base_shape(model)

    def counts(layer: nn.Module, spec: LayerSpec) -> LayerCounts:
        sizes = ((x, full_shape(base_parameter(layer, x.name))[x.axis]) for x in spec.linears if x.runs)
        return LayerCounts((x.runs[0].kind, size // x.group_width) for x, size in sizes)

    return shape.resized([counts(*pair) for pair in zip(decoder_layers(model), shape.layers, strict=True)])


def base_dtype(model: PeftModel, shape: ModelShape) -> Dtype:
    """Returns the dtype of the frozen weights. Raises UserError if no export can have that dtype."""
    name = shape.layers[0].linears[0].name
    dtype = base_parameter(decoder_layers(model)[0], name).dtype
    for key, value in DTYPES.items():
        if value == dtype:
            overflows = key == "float16" and shape.family.has_encoder
            require(not overflows, f"hidden states of a {shape.model_type} overflow float16; load it in bfloat16")
            return cast(Dtype, key)
    raise UserError(f"layer 0 {name} is {dtype}; only a base in {', '.join(DTYPES)} can be pruned")


class ForwardWatch:
    """Records the forward passes that have a backward pass, and counts their tokens.

    References, generations and evaluations have none. The hooks are on encoder and decoder, because a trainer with a
    fused loss calls the decoder directly.

    Attributes:
        active: an optimizer step is open.
    """

    def __init__(self, peft_model: PeftModel, model: ShardedModel, pruner: Pruner) -> None:
        self.active = False
        self._model, self._pruner = model, pruner
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._model.device)
        self._trained = True  # in the last forward pass
        self._recording = ExitStack()
        self._layer_lists = model.shape.family.layer_lists
        # The first hook comes before DeepSpeed's.
        self._hooks = [peft_model.register_forward_pre_hook(self._note_mode, prepend=True)]
        for layers in self._layer_lists:
            module = peft_model.get_base_model().get_submodule(layers.path.rpartition(".")[0])
            self._hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))

    def take_tokens(self) -> Tensor:
        """Returns this rank's tokens since the last call, without padding: one fp64 number on the device."""
        tokens = self._tokens.double()
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
        inputs = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        mask, size = kwargs.get("attention_mask"), inputs.shape[:2]
        if mask is None and "encoder_hidden_states" in kwargs:  # a target, whose last token predicts nothing
            own: Any = decoder.config
            mask = ~torch.isin(inputs, torch.tensor([own.pad_token_id, own.eos_token_id], device=inputs.device))
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
