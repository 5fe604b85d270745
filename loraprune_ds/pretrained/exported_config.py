"""The config.json of a pruned model, for transformers 4 and 5. It names a stock class if one can hold the shape."""

import copy
from dataclasses import dataclass
from importlib.metadata import version

from huggingface_hub.errors import StrictDataclassError

from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import causal_lm_class, config_object, sliding_window
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.families.moe import NEW_COUNT
from loraprune_ds.model.family import family_name
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.weight_files import AUTO_MAP

# Keys about the source's files and earlier pruning. They do not describe the pruned model.
DROPPED = {"_name_or_path", AUTO_MAP, "pretraining_tp", "quantization_config", QUERY_HEADS_LEAVE}
# Number of layers that predict further tokens. They are left out, and llama.cpp reads the number.
NEXT_TOKENS = "mtp_num_hidden_layers"
MODELLING_FILE = "modeling_pruned.py"
EXPLICIT = ("llama", "mistral")  # a Llama may be written as a Mistral, whose defaults differ
OLD_ROPE = {"rope_theta", "rope_scaling"}  # names of transformers 4


@dataclass(frozen=True)
class ExportedConfig:
    """Describes a pruned model on disk."""

    config: JsonObject
    # a file of loraprune_ds/model, to be copied next to the weights. None for a stock model
    modelling_file: str | None
    renamed: bool  # the model type differs from the source's
    multimodal: bool = False  # with the tower of the source

    @property
    def trust(self) -> str:
        """The last argument of `from_pretrained`. It allows the modelling file."""
        return ", trust_remote_code=True" if self.modelling_file else ""

    @property
    def auto_class(self) -> str:
        return "AutoModelForImageTextToText" if self.multimodal else auto_class(self.config)

    @property
    def loader(self) -> str:
        """The line of Python that loads the model from `folder`."""
        return f'{self.auto_class}.from_pretrained(folder, dtype="auto"{self.trust})'


def auto_class(config: JsonObject) -> str:
    """Returns the class of transformers that loads the language model of a config.json with its head."""
    return "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"


def export_config(
    source: JsonObject, shape: ModelShape, dtype: str, multimodal: JsonObject | None = None
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
        config = multimodal_config(multimodal, shape, dtype)
        return ExportedConfig(config, None, renamed=False, multimodal=True)
    family = shape.family
    source_type = family_name(shape.model_type)
    *stock, pruned = family.export_types(source_type, source, shape.config, shape.layers)
    if shape.is_uniform:
        for model_type in stock:
            config = _config_of(source, shape, dtype, model_type)
            if _is_accepted(config):
                return ExportedConfig(config, None, model_type != shape.model_type)
    config = name_our_code(_config_of(source, shape, dtype, pruned))
    return ExportedConfig(config, MODELLING_FILE, pruned != shape.model_type)


def _is_accepted(config: JsonObject) -> bool:
    """Some classes refuse a head count. Phi-3 computes the length of its long rotary factors from it."""
    try:
        config_object(config)
    except StrictDataclassError:
        return False
    return True


def multimodal_config(source: JsonObject, shape: ModelShape, dtype: str) -> JsonObject:
    """Returns config.json of a multimodal model with a text part of `shape`, whose layers are equal."""
    config = copy.deepcopy(source)
    # the first Qwen2.5-VL have these fields at the top level
    text = config.get("text_config", config)
    text |= shape.family.explicit(text)
    settings = {
        "dtype": dtype,
        "torch_dtype": dtype,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    for part in (config, text):
        for key in _dropped(shape):
            part.pop(key, None)
        part |= settings
    text |= _sizes(text, shape)
    return config | {"transformers_version": version("transformers")}


def name_our_code(config: JsonObject) -> JsonObject:
    """Removes foreign code from a config.json, and adds our modelling file if needed."""
    if not str(config["model_type"]).startswith(PRUNED):
        return {key: value for key, value in config.items() if key != AUTO_MAP}
    module = MODELLING_FILE.removesuffix(".py")
    with_head = auto_class(config)
    name = with_head.replace("AutoModel", "Pruned")
    auto_map = {
        "AutoConfig": f"{module}.PrunedConfig",
        "AutoModel": f"{module}.PrunedModel",  # vLLM builds the model through AutoModel
        with_head: f"{module}.{name}",
    }
    return config | {"architectures": [name], AUTO_MAP: auto_map}


def _config_of(source: JsonObject, shape: ModelShape, dtype: str, model_type: str) -> JsonObject:
    dropped = _dropped(shape)
    if model_type == "mistral" and model_type != shape.model_type:
        dropped |= {"attention_bias", "mlp_bias"}  # a Mistral never has these
    explicit = shape.family.explicit(source)
    config = {key: value for key, value in explicit.items() if key not in dropped}
    config |= _sizes(source, shape)
    config |= _rope(source, shape)
    config |= _explicit_options(shape, model_type)
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
    dropped = DROPPED | {shape.family.per_layer}
    if shape.family.has_experts:
        dropped.add(NEW_COUNT)
    return dropped


def _sizes(source: JsonObject, shape: ModelShape) -> JsonObject:
    """Returns the sizes of each layer, and the largest as global sizes, for readers that know only these."""
    family = shape.family
    counted = family.counted(shape.config, shape.layers)
    kinds = ("heads", *shape.kinds)
    widest = LayerCounts((kind, max(layer.get(kind, 0) for layer in counted)) for kind in kinds)
    sizes: JsonObject = {"vocab_size": shape.vocab_size}
    sizes |= family.model_fields(shape.config, counted)
    for layer_list, layers in zip(family.layer_lists, shape.layer_lists, strict=True):
        sizes[layer_list.count] = len(layers)
    sizes |= _layer_fields(shape, widest)
    if not shape.is_uniform:
        of_layers = [_layer_fields(shape, counts) for counts in counted]
        sizes[family.per_layer] = {str(i): fields for i, fields in enumerate(of_layers)}
    if source.get(NEXT_TOKENS):
        sizes[NEXT_TOKENS] = 0
    return sizes


def _layer_fields(shape: ModelShape, counts: LayerCounts) -> dict[str, int]:
    fields = shape.family.layer_fields(shape.config, counts)
    return {field: count for field, count in fields.items() if count}


def _rope(source: JsonObject, shape: ModelShape) -> JsonObject:
    """Returns the rotary settings under the names of transformers 4 and 5."""
    # Version 4 reads rope_theta and rope_scaling, and silently ignores rope_parameters. Version 5 prefers rope_scaling
    # with rope_theta, unless it is null. Otherwise it reads rope_parameters, where Gemma 3 and Olmo 3 have settings for
    # each kind of layer. Version 4 can scale only full attention.
    settings: JsonObject = getattr(shape.config, "rope_parameters", None) or {}
    full = dict(settings.get("full_attention", settings))
    if full.get("rope_type") == "proportional":  # transformers 4 does not know it
        return {}
    is_explicit = family_name(shape.model_type) in EXPLICIT
    has_old_names = OLD_ROPE & source.keys()
    if not is_explicit and (has_old_names or not source.get("rope_parameters")):
        return {}  # both versions read the source's settings, and each family has its own defaults
    theta = full.pop("rope_theta")
    rope_type = full.pop("rope_type")
    full.pop("type", None)  # an older name that transformers keeps
    scaling = {"rope_type": rope_type, **full}
    rope = {"rope_theta": theta, "rope_scaling": scaling}
    if rope_type == "default":
        rope["rope_scaling"] = None
    if "partial_rotary_factor" in full:
        rope["partial_rotary_factor"] = full["partial_rotary_factor"]
    if "sliding_attention" in settings:
        rope["rope_local_base_freq"] = settings["sliding_attention"]["rope_theta"]
    if is_explicit:
        rope["rope_parameters"] = scaling | {"rope_theta": theta}
    return rope


def _explicit_options(shape: ModelShape, model_type: str) -> JsonObject:
    """Returns the fields of a Llama or Mistral whose defaults differ."""
    if family_name(shape.model_type) not in EXPLICIT:
        return {}
    options: JsonObject = {"max_position_embeddings": shape.config.max_position_embeddings}
    if family_name(model_type) == "mistral":
        options["sliding_window"] = sliding_window(shape.config)
    else:
        options["attention_bias"] = "self_attn.o_proj" in shape.biases
        options["mlp_bias"] = "mlp.down_proj" in shape.biases
    return options
