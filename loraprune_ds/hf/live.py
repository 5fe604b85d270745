"""Reads and checks a trainer's live PEFT model, and watches its forward passes. A refusal is one line before step 1."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.adapters import ADAPTER, base_parameter, last_names, lora_weights
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.families.base import Family
from loraprune_ds.model.family import find_family
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import LayerCounts, LayerSpec
from loraprune_ds.model.read_shape import read_model, shape_from_config
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import full_shape, is_sharded
from loraprune_ds.pruning.step import Pruner


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
    sharded = any(map(is_sharded, model.parameters()))
    require(
        not sharded, "unshare_bias: the model is sharded; load it before you make TrainingArguments"
    )
    shape, made = read_model(model.config.to_dict() | _tied(model), type(model).__name__)
    tensors = model.state_dict()
    made.load_state_dict(
        tensors | {copy: tensors[name] for copy, name in shape.shared_tensors.items()}, assign=True
    )
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def find_peft_model(model: nn.Module) -> PeftModel:
    """Finds the PEFT model inside an engine. Raises UserError if there is none, or a part is compiled."""
    check_not_compiled(model)
    inner: Any = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module
    require(
        isinstance(inner, PeftModel),
        f"pruning needs a PEFT model with LoRA; this is a {type(inner).__name__}",
    )
    return inner


def base_config(model: PeftModel) -> dict[str, Any]:
    """Returns config.json of the dense model, as `save_pretrained` would write it."""
    config = json.loads(cast(Any, model.get_base_model()).config.to_json_string())
    config.pop("use_cache", None)  # trainers switch it off
    return config | _tied(model.get_base_model())


def _tied(base: Any) -> dict[str, bool]:
    """Returns the setting for a head tied to the embedding. The config may claim it although the files have both."""
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    head, embedding = (base_parameter(module, "weight") for module in ends)
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
        sizes = (
            (x, full_shape(base_parameter(layer, x.name))[x.axis]) for x in spec.linears if x.runs
        )
        return LayerCounts((x.runs[0].kind, size // x.group_width) for x, size in sizes)

    return shape.resized(
        [counts(*pair) for pair in zip(decoder_layers(model), shape.layers, strict=True)]
    )


def base_dtype(model: PeftModel, shape: ModelShape) -> Dtype:
    """Returns the dtype of the frozen weights. Raises UserError if no export can have that dtype."""
    name = shape.layers[0].linears[0].name
    dtype = base_parameter(decoder_layers(model)[0], name).dtype
    known = next((key for key, value in DTYPES.items() if value == dtype), None)
    require(
        known is not None,
        f"layer 0 {name} is {dtype}; only a base in {', '.join(DTYPES)} can be pruned",
    )
    overflows = known == "float16" and shape.family.has_encoder
    require(
        not overflows,
        f"hidden states of a {shape.model_type} overflow float16; load it in bfloat16",
    )
    return cast(Dtype, known)


log = logging.getLogger(__name__)

Refused = Callable[[Any], bool]
COMPILED = "compiled code keeps the sizes from before a cut"
KEEPS_HEADS = "such a cache keeps the dense number of heads"
# others have the dense sizes of a config
GROWING_CACHES = (None, "dynamic", "offloaded", "quantized")
# (argument of a Trainer or a part of one, whether its value is refused, reason). A Trainer may lack an argument.
ARGUMENTS: tuple[tuple[str, Refused, str], ...] = (
    (
        "load_best_model_at_end",
        bool,
        "the best checkpoint may be from before a cut, and then does not fit the model",
    ),
    ("auto_find_batch_size", bool, "a second attempt would begin with a pruned model"),
    ("fsdp", bool, "FSDP's flat shards cannot be cut; use DDP, or DeepSpeed ZeRO-3"),
    (
        "n_gpu",
        lambda count: (count or 0) > 1,
        "DataParallel copies the model in each pass; start a process per GPU",
    ),
    ("torch_compile", bool, COMPILED),
    (
        "use_vllm",
        bool,
        "vLLM holds the dense model and cannot load smaller weights; generate with transformers",
    ),
    ("use_transformers_continuous_batching", bool, "its cache has the dense number of heads"),
    ("cache_implementation", lambda value: value not in GROWING_CACHES, KEEPS_HEADS),
    (
        "generation_kwargs",
        lambda value: (value or {}).get("cache_implementation") not in GROWING_CACHES,
        KEEPS_HEADS,
    ),
    (
        "parallelism_config.sp_size",
        lambda size: (size or 1) > 1,
        "Ulysses fixes the head counts when it starts",
    ),
    (
        "parallelism_config.cp_size",
        lambda size: (size or 1) > 1,
        "context parallelism splits samples over ranks",
    ),
    (
        "precompute_ref_log_probs",
        bool,
        "they come from the dense model, but the reference is the pruned base",
    ),
)
# (whether PEFT's module for a linear is refused, reason). A row relies on the rows before it.
LINEARS: tuple[tuple[Refused, str], ...] = (
    (lambda x: x is None, "does not exist"),
    (
        lambda x: not hasattr(x, "base_layer"),
        "has no LoRA, which the criterion needs on every linear: {needed}",
    ),
    (
        lambda x: (type(x), type(x.base_layer)) != (LoraLinear, nn.Linear),
        "is a {kind}, not plain LoRA over a linear",
    ),
    (lambda x: ADAPTER not in x.lora_A, f"has no LoRA of the adapter {ADAPTER!r}: {{needed}}"),
    (
        lambda x: any(map(x.lora_variant.get, x.lora_A)),
        "has a variant of LoRA, such as DoRA; use plain LoRA",
    ),
    (lambda x: any(map(x.lora_bias.get, x.lora_A)), "has lora_bias, which is not supported"),
    (
        lambda x: not all(weight.requires_grad for weight in lora_weights(x)),
        f"has frozen LoRA of {ADAPTER!r}",
    ),
)


def check_arguments(args: Any, model: nn.Module) -> None:
    """Raises UserError for an argument of a Trainer or a cache of the model that does not allow cuts."""
    for name, refused, reason in ARGUMENTS:
        value = reduce(lambda found, key: getattr(found, key, None), name.split("."), args)
        require(not refused(value), f"{name}={value}: {reason}")
    cache = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    require(
        cache in GROWING_CACHES, f"generation_config.cache_implementation={cache}: {KEEPS_HEADS}"
    )


def refuse_mixture(family: Family, where: str) -> None:
    """Refuses families with experts, because only a run builds stacks of experts with LoRA."""
    line = f"{where}: the callback cannot prune families with experts, not even dense models; use launch/run.py"
    require(not family.has_experts, line)


def check_one_dtype(model: nn.Module) -> None:
    """Checks that a model that is built sharded has trained weights of one dtype. DeepSpeed only asserts it.

    PEFT makes LoRA fp32 by default, but not `modules_to_save`.
    """
    dtypes = sorted(
        {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    )
    several = (
        f"trained weights are in {' and '.join(dtypes)}, but ZeRO-3 needs one dtype for its buffer"
    )
    fits = len(dtypes) < 2 or not any(map(is_sharded, model.parameters()))
    require(fits, f"{several}; call get_peft_model with autocast_adapter_dtype=False")


def check_accelerate() -> None:
    """Raises UserError if accelerate compiles every model that it prepares, by its settings or environment."""
    plugin = AcceleratorState().dynamo_plugin if is_initialized() else None
    backend = DynamoBackend.NO if plugin is None else plugin.backend
    require(
        backend == DynamoBackend.NO,
        f"accelerate compiles the model by its dynamo backend {backend.value}, and {COMPILED}; "
        "leave it out of ACCELERATE_DYNAMO_BACKEND, accelerate's config and Accelerator",
    )


def check_not_compiled(model: nn.Module) -> None:
    """Raises UserError if torch.compile has compiled a module in place, or wraps it."""
    names = (
        name or type(module).__name__
        for name, module in model.named_modules()
        if _is_compiled(module)
    )
    name = next(names, None)
    require(
        name is None,
        f"{name} is compiled by torch.compile, and {COMPILED}; train without torch.compile",
    )


def _is_compiled(module: nn.Module) -> bool:
    optimized: Any = torch._dynamo.OptimizedModule
    return isinstance(module, optimized) or module._compiled_call_impl is not None


@torch.compiler.disable  # torch takes an error in compiled code for code that it cannot compile
def _refuse_compiled() -> None:
    raise UserError(
        f"the forward pass is compiled by torch.compile, and {COMPILED}; train without torch.compile"
    )


def check_model(model: PeftModel) -> None:
    """Checks that a live model has the LoRA that the criterion needs, and that the rest allows a cut.

    UserError names the layer and linear, or PEFT's setting.
    """
    shape = base_shape(model)
    family = shape.family
    refuse_mixture(family, shape.model_type)
    shared = f"the layers of a {shape.model_type} share one bias, so their heads cannot differ"
    require(family.shared_bias is None, f"{shared}; pass unshare_bias(model) to get_peft_model")
    base = cast(Any, model.get_base_model())
    for name, value in family.changed_in_memory(base.config).items():
        log.warning(
            "%s=%s of the model makes scores random, and dependent on the ranks; set it to 0",
            name,
            value,
        )
    quantised = getattr(base.config, "quantization_config", None) or getattr(
        base, "is_quantized", False
    )
    unquantised = "load it in bfloat16, float16 or float32. Only launch/run.py holds int8 weights (model.frozen)"
    require(not quantised, f"a quantised base has no flat shards to cut; {unquantised}")
    require(
        ADAPTER in model.peft_config,
        f"the trained adapter must be called {ADAPTER!r}, which is PEFT's default",
    )
    for name, peft_config in model.peft_config.items():
        bias = getattr(peft_config, "bias", "none")
        require(bias == "none", f"adapter {name}: bias={bias!r}: trained biases are not supported")
    needed = f"target_modules={last_names(linear.linear for _, linear in shape.linears())}"
    for index, layer in enumerate(decoder_layers(model)):
        modules: dict[str, Any] = dict(layer.named_modules())
        for linear in shape.layers[index].linears:
            module = modules.get(linear.linear)
            over = type(getattr(module, "base_layer", None)).__name__
            kind = f"{type(module).__module__}.{type(module).__name__} over a {over}"
            for refused, reason in LINEARS:
                where = f"layer {index} {linear.linear}"
                require(not refused(module), f"{where} {reason.format(needed=needed, kind=kind)}")
    _check_others(model, shape)


def _check_others(model: PeftModel, shape: ModelShape) -> None:
    """Checks other trained modules. An export must hold them, and a cut must not change them."""
    layers = decoder_layers(model)
    pruned = {id(layers[i].get_submodule(linear.linear)) for i, linear in shape.linears()}
    others = {tensor.name for layer in shape.layers for tensor in layer.others if tensor.runs}
    cut_along = tuple(f".{name.rpartition('.')[0]}" for name in others)
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        exported = not isinstance(module, BaseTunerLayer) or id(module) in pruned
        where = f"{name} has LoRA, which an export would lose: only linears of the decoder layers may have it"
        advice = "Use target_modules=linear_names(model), and modules_to_save for other modules"
        require(exported, f"{where}. {advice}")
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        require(
            isinstance(module, ModulesToSaveWrapper),
            f"{name}: trainable_token_indices are not supported",
        )
        require(
            not name.endswith(cut_along),
            f"modules_to_save: a cut makes {name} smaller, so it cannot train",
        )
        lost = "modules_to_save with tied embeddings: the exported model would lose one of the two"
        require(not shape.tie_word_embeddings, lost)


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
        self._recording, self._hooks = ExitStack(), ExitStack()
        self._layer_lists = pruner.model.shape.family.layer_lists
        base = cast(PeftModel, pruner.model.module).get_base_model()
        for layers in self._layer_lists:
            module = base.get_submodule(layers.path.rpartition(".")[0])
            self._hooks.enter_context(
                module.register_forward_pre_hook(self._begin, with_kwargs=True)
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
            _refuse_compiled()  # pyright: ignore[reportCallIssue]
        inputs = next(
            x
            for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            if x is not None
        )
        mask, size = kwargs.get("attention_mask"), inputs.shape[:2]
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
