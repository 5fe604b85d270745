"""The config.json of a pruned model. It is stock if a stock class can hold the shape. transformers 4 and 5 read it."""

import copy
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from loraprune_ds.model.classes import causal_lm_class, config_class
from loraprune_ds.model.family import PRUNED, family_name
from loraprune_ds.model.folder_files import AUTO_MAP
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape

# Keys about the source's files and its own pruning. They say nothing about this model.
DROPPED = {"_name_or_path", AUTO_MAP, "per_layer_config", "pretraining_tp", "quantization_config"}
MODELLING_FILE = "modeling_pruned.py"
OUR_CLASSES = {
    "AutoConfig": "PrunedConfig",
    "AutoModel": "PrunedModel",  # vLLM builds the model through this one
    "AutoModelForCausalLM": "PrunedForCausalLM",
}
# What transformers assumes where config.json is silent. The Llama and Mistral classes differ in these.
DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072}
DEFAULT_SLIDING_WINDOW = 4096  # of MistralConfig
DEFAULT_ROPE_THETA = 10000.0
OLD_ROPE = {"rope_theta", "rope_scaling"}  # names of transformers 4


@dataclass(frozen=True)
class ExportedConfig:
    """Describes a pruned model on disk.

    Attributes:
        config: the contents of config.json.
        modelling_file: file of loraprune_ds/model that has to lie beside the weights. None for a stock model.
        renamed: the model type is not the source's.
    """

    config: dict[str, Any]
    modelling_file: str | None
    renamed: bool

    @property
    def trust_remote_code(self) -> bool:
        """True if transformers must be told to run the file in the folder."""
        return self.modelling_file is not None

    @property
    def loader(self) -> str:
        """The line of Python that loads the model from `folder`."""
        trust = ", trust_remote_code=True" if self.trust_remote_code else ""
        return f'AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})'


def export_config(source: dict[str, Any], shape: ModelShape, dtype: str) -> ExportedConfig:
    """Describes a model of the source's family with the sizes of `shape`. Weights are stored as `dtype` ("bfloat16").

    It keeps the source's fields and changes only the counts. Uniform layers stay a stock model. Some stock configs of
    transformers 5 refuse a head count that does not divide hidden_size. A Llama without biases then becomes a Mistral,
    whose class has the same mathematics and no such check. For the others the shipped modelling file remains.

    Args:
        source: config.json of the model that was pruned. It may itself be the config of a pruned export.
    """
    family = family_name(shape.model_type)
    stock = [family] if shape.is_uniform else []
    if stock and family == "llama" and not shape.biases:
        stock.append("mistral")
    for model_type in stock:
        config = _config_of(source, shape, dtype, model_type)
        if not _is_refused(config):
            return ExportedConfig(config, None, model_type != shape.model_type)
    config = name_our_code(_config_of(source, shape, dtype, PRUNED + family))
    return ExportedConfig(config, MODELLING_FILE, PRUNED + family != shape.model_type)


def name_our_code(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json that names no code but our modelling file, and that only where it needs it."""
    if not str(config["model_type"]).startswith(PRUNED):
        return {key: value for key, value in config.items() if key != AUTO_MAP}
    return config | {
        "architectures": [causal_lm_class(config["model_type"]).__name__],
        AUTO_MAP: {auto: f"{MODELLING_FILE.removesuffix('.py')}.{name}" for auto, name in OUR_CLASSES.items()},
    }


def _is_refused(config: dict[str, Any]) -> bool:
    """Tells if the stock class does not take these counts.

    Some want a head count that divides hidden_size. Phi-3 computes the length of its long rotary factors from it.
    """
    try:
        config_class(config["model_type"]).from_dict(copy.deepcopy(config))  # which changes what it is given
    except StrictDataclassError:
        return True
    return False


def _config_of(source: dict[str, Any], shape: ModelShape, dtype: str, model_type: str) -> dict[str, Any]:
    mixture = shape.family.mixture
    dropped = DROPPED | ({mixture.new_count} if mixture else set())
    config = {key: value for key, value in source.items() if key not in dropped}
    config |= _sizes(shape) | _rope(source, family_name(shape.model_type)) | _family_options(source, shape, model_type)
    config |= {
        "architectures": [causal_lm_class(model_type).__name__],
        "model_type": model_type,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": dtype,  # the name up to transformers 4.55
        "dtype": dtype,
        # Without a version AutoTokenizer suspects every mistral model of an old tokenizer bug, and warns.
        "transformers_version": version("transformers"),
    }
    if model_type == "mistral" and model_type != shape.model_type:  # what a Mistral never has
        config.pop("attention_bias", None)
        config.pop("mlp_bias", None)
    return config


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """Returns the global sizes and each layer's own.

    The global ones are those of the widest layer. A reader of only these never reserves too little.
    """
    widest = LayerShape((kind, max(layer[kind] for layer in shape.layers)) for kind in shape.kinds)
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": len(shape.layers),
        "head_dim": shape.head_dim,
        **_layer_sizes(widest, shape),
    }
    if mixture := shape.family.mixture:
        sizes |= mixture.dense([i for i, layer in enumerate(shape.layers) if not layer["experts"]])
    if not shape.is_uniform:
        sizes["per_layer_config"] = {str(i): _layer_sizes(layer, shape) for i, layer in enumerate(shape.layers)}
    return sizes


def _layer_sizes(layer: LayerShape, shape: ModelShape) -> dict[str, int]:
    counts = {shape.family.count_field(kind): count for kind, count in layer.items() if count}
    return {"num_attention_heads": shape.query_heads(layer), **counts}


def _rope(source: dict[str, Any], family: str) -> dict[str, Any]:
    """Returns the rotary settings under the names of transformers 4 and of transformers 5.

    4 reads rope_theta and rope_scaling, and silently ignores rope_parameters. 5 prefers a rope_scaling that is not
    null, and completes it with rope_theta. Else it reads rope_parameters. There Gemma 3 and Olmo 3 have settings for
    each kind of layer. 4 can scale those of full attention alone.
    """
    given = source.get("rope_scaling") or source.get("rope_parameters") or {}
    full = dict(given.get("full_attention", given))
    if family not in DEFAULT_POSITIONS and (OLD_ROPE & source.keys() or "rope_theta" not in full):
        return {}  # both versions read what the source says. Where it says nothing, families differ in their defaults
    theta = full.pop("rope_theta", None) or source.get("rope_theta") or DEFAULT_ROPE_THETA
    legacy_type = full.pop("type", None)
    rope_type = full.pop("rope_type", None) or legacy_type or "default"
    scaling = {"rope_type": rope_type, **full}
    names = {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}
    if "partial_rotary_factor" in full:
        names["partial_rotary_factor"] = full["partial_rotary_factor"]
    if "sliding_attention" in given:
        names["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    if family in DEFAULT_POSITIONS:
        names["rope_parameters"] = scaling | {"rope_theta": theta}
    return names


def _family_options(source: dict[str, Any], shape: ModelShape, model_type: str) -> dict[str, Any]:
    """Returns fields of Llama and Mistral, which may stand for each other and differ in their defaults."""
    family = family_name(shape.model_type)
    if family not in DEFAULT_POSITIONS:
        return {}
    options: dict[str, Any] = {
        "max_position_embeddings": source.get("max_position_embeddings", DEFAULT_POSITIONS[family])
    }
    if family == "mistral":
        options["sliding_window"] = source.get("sliding_window", DEFAULT_SLIDING_WINDOW)
    elif model_type == "mistral":
        options["sliding_window"] = None
    else:
        options |= {"attention_bias": "self_attn.o_proj" in shape.biases, "mlp_bias": "mlp.down_proj" in shape.biases}
    return options
