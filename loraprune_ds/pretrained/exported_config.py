"""The config.json of a pruned model, for transformers 4 and 5. It names a stock class if one can hold the shape."""

import copy
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from loraprune_ds.model.classes import causal_lm_class, config_object, sliding_window
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.families.moe import NEW_COUNT
from loraprune_ds.model.family import family_name
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.weight_files import AUTO_MAP

# Keys about the source's files and earlier pruning, not about this model.
DROPPED = {"_name_or_path", AUTO_MAP, "pretraining_tp", "quantization_config", QUERY_HEADS_LEAVE}
# of layers that predict further tokens, which are left out. llama.cpp reads it
NEXT_TOKENS = "mtp_num_hidden_layers"
MODELLING_FILE = "modeling_pruned.py"
EXPLICIT = ("llama", "mistral")  # a Llama may be written as a Mistral, whose defaults differ
OLD_ROPE = {"rope_theta", "rope_scaling"}  # names of transformers 4


@dataclass(frozen=True)
class ExportedConfig:
    """Describes a pruned model on disk."""

    config: dict[str, Any]
    # in loraprune_ds/model. Belongs next to the weights. None for a stock model
    modelling_file: str | None
    renamed: bool  # the model type differs from the source's
    multimodal: bool = False  # with the tower of the source

    @property
    def trust(self) -> str:
        """The last argument of `from_pretrained`, which allows the modelling file, if any."""
        return ", trust_remote_code=True" if self.modelling_file else ""

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageTextToText" if self.multimodal else auto_class(self.config)

    @property
    def loader(self) -> str:
        """The line of Python that loads the model from `folder`."""
        return f'{self.auto_class}.from_pretrained(folder, dtype="auto"{self.trust})'


def auto_class(config: dict[str, Any]) -> str:
    """Returns the class of transformers that loads the language model of a config.json with its head."""
    return "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"


def export_config(
    source: dict[str, Any], shape: ModelShape, dtype: str, multimodal: dict[str, Any] | None = None
) -> ExportedConfig:
    """Describes a model of the source's family with the sizes of `shape`, stored as `dtype` ("bfloat16").

    Uniform layers stay a stock model. Some stock configs of transformers 5 refuse a head count that does not divide
    hidden_size. A Llama without biases then becomes a Mistral, whose class computes the same without this check. A T5
    that lost heads becomes a UMT5. Other models get the shipped modelling file.

    Args:
        source: config.json of the model before pruning, possibly a pruned export.
        multimodal: config.json of the multimodal model around it, if the tower stays.
    """
    if multimodal is not None:
        return ExportedConfig(
            multimodal_config(multimodal, shape, dtype), None, renamed=False, multimodal=True
        )
    own = family_name(shape.model_type)
    *stock, with_our_code = shape.family.export_types(own, source, shape.config, shape.layers)
    for model_type in stock if shape.is_uniform else []:
        config = _config_of(source, shape, dtype, model_type)
        try:
            config_object(config)
        # for the head count. Phi-3 computes the length of its long rotary factors from it
        except StrictDataclassError:
            continue
        return ExportedConfig(config, None, model_type != shape.model_type)
    config = name_our_code(_config_of(source, shape, dtype, with_our_code))
    return ExportedConfig(config, MODELLING_FILE, with_our_code != shape.model_type)


def multimodal_config(source: dict[str, Any], shape: ModelShape, dtype: str) -> dict[str, Any]:
    """Returns config.json of a multimodal model with a text part of `shape`, whose layers are equal."""
    config = copy.deepcopy(source)
    # the first Qwen2.5-VL have these fields at the top level
    text = config.get("text_config", config)
    text |= shape.family.explicit(text)
    for part in (config, text):
        for key in _dropped(shape):
            part.pop(key, None)
        part |= {
            "dtype": dtype,
            "torch_dtype": dtype,
            "tie_word_embeddings": shape.tie_word_embeddings,
        }
    text |= _sizes(text, shape)
    return config | {"transformers_version": version("transformers")}


def name_our_code(config: dict[str, Any]) -> dict[str, Any]:
    """Removes foreign code from a config.json, and adds our modelling file if needed."""
    if not str(config["model_type"]).startswith(PRUNED):
        return {key: value for key, value in config.items() if key != AUTO_MAP}
    module, with_head = MODELLING_FILE.removesuffix(".py"), auto_class(config)
    name = with_head.replace("AutoModel", "Pruned")
    # vLLM builds the model through AutoModel.
    ours = {"AutoConfig": "PrunedConfig", "AutoModel": "PrunedModel", with_head: name}
    return config | {
        "architectures": [name],
        AUTO_MAP: {auto: f"{module}.{x}" for auto, x in ours.items()},
    }


def _config_of(
    source: dict[str, Any], shape: ModelShape, dtype: str, model_type: str
) -> dict[str, Any]:
    dropped = _dropped(shape)
    if model_type == "mistral" and model_type != shape.model_type:
        dropped |= {"attention_bias", "mlp_bias"}  # a Mistral never has these
    config = {
        key: value for key, value in shape.family.explicit(source).items() if key not in dropped
    }
    config |= _sizes(source, shape) | _rope(source, shape) | _explicit_options(shape, model_type)
    return config | {
        "architectures": [causal_lm_class(model_type).__name__],
        "model_type": model_type,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": dtype,  # the name up to transformers 4.55
        "dtype": dtype,
        # Without a version AutoTokenizer warns of an old tokenizer bug for every mistral model.
        "transformers_version": version("transformers"),
    }


def _dropped(shape: ModelShape) -> set[str]:
    return DROPPED | {shape.family.per_layer} | ({NEW_COUNT} if shape.family.has_experts else set())


def _sizes(source: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Returns the sizes of each layer, and the largest as global sizes, which suffice for readers of only these."""
    family, made = shape.family, shape.config
    counted = family.counted(made, shape.layers)

    def fields(counts: LayerCounts) -> dict[str, int]:
        return {field: count for field, count in family.layer_fields(made, counts).items() if count}

    widest = LayerCounts(
        (kind, max(layer.get(kind, 0) for layer in counted)) for kind in ("heads", *shape.kinds)
    )
    depths = {
        layers.count: len(x)
        for layers, x in zip(family.layer_lists, shape.layer_lists, strict=True)
    }
    sizes = {
        "vocab_size": shape.vocab_size,
        **family.model_fields(made, counted),
        **depths,
        **fields(widest),
    }
    if not shape.is_uniform:
        sizes[family.per_layer] = {str(i): fields(layer) for i, layer in enumerate(counted)}
    return sizes | ({NEXT_TOKENS: 0} if source.get(NEXT_TOKENS) else {})


def _rope(source: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Returns the rotary settings under the names of transformers 4 and 5."""
    # Version 4 reads rope_theta and rope_scaling, and silently ignores rope_parameters. Version 5 prefers rope_scaling
    # with rope_theta, unless it is null. Otherwise it reads rope_parameters, where Gemma 3 and Olmo 3 have settings for
    # each kind of layer. Version 4 can scale only full attention.
    settings: dict[str, Any] = getattr(shape.config, "rope_parameters", None) or {}
    full, is_explicit = (
        dict(settings.get("full_attention", settings)),
        family_name(shape.model_type) in EXPLICIT,
    )
    unknown = full.get("rope_type") == "proportional"  # in transformers 4
    if unknown or (
        not is_explicit and (OLD_ROPE & source.keys() or not source.get("rope_parameters"))
    ):
        return {}  # both versions read the source's settings, and each family has its own defaults
    theta, rope_type = full.pop("rope_theta"), full.pop("rope_type")
    full.pop("type", None)  # an older name that transformers keeps
    scaling = {"rope_type": rope_type, **full}
    names = {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}
    if "partial_rotary_factor" in full:
        names["partial_rotary_factor"] = full["partial_rotary_factor"]
    if "sliding_attention" in settings:
        names["rope_local_base_freq"] = settings["sliding_attention"]["rope_theta"]
    return names | ({"rope_parameters": scaling | {"rope_theta": theta}} if is_explicit else {})


def _explicit_options(shape: ModelShape, model_type: str) -> dict[str, Any]:
    """Returns the fields of a Llama or Mistral whose defaults differ."""
    if family_name(shape.model_type) not in EXPLICIT:
        return {}
    biases = {
        "attention_bias": "self_attn.o_proj" in shape.biases,
        "mlp_bias": "mlp.down_proj" in shape.biases,
    }
    own = (
        {"sliding_window": sliding_window(shape.config)}
        if family_name(model_type) == "mistral"
        else biases
    )
    return {"max_position_embeddings": shape.config.max_position_embeddings} | own
