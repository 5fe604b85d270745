"""Builds the modules of a pretrained model, without any weights."""

import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.model.modeling_pruned_llama import PrunedLlamaForCausalLM
from loraprune_ds.model.modeling_pruned_mistral import PrunedMistralForCausalLM
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.token_loss import with_token_losses

# The classes by `model_type`. shapes.ARCHITECTURES has their names.
CAUSAL_LMS: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "pruned_llama": PrunedLlamaForCausalLM,
    "pruned_mistral": PrunedMistralForCausalLM,
}


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Returns the class of the config.json of such a model."""
    found = CAUSAL_LMS[model_type].config_class
    assert found is not None
    return found


def build_on_meta(
    pretrained: PretrainedModel, attn_implementation: str, loss_chunk_tokens: int | None = None
) -> PreTrainedModel:
    """Builds the modules with every parameter on the meta device: shapes only, no memory.

    Buffers that no weight file holds (rotary frequencies) are real. Told the labels, the model gives token losses,
    `loss_chunk_tokens` at a time (token_loss.py).
    """
    model_class = CAUSAL_LMS[pretrained.shape.model_type]
    config = config_class(pretrained.shape.model_type).from_dict(dict(pretrained.config))  # may differ from the file's
    config.use_cache = False
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = model_class(config)
    decoder = model.get_submodule("model")
    rotary = decoder.get_submodule("rotary_emb")
    decoder.rotary_emb = type(rotary)(config=config)
    return with_token_losses(model, loss_chunk_tokens)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers of a causal LM, wrapped by PEFT or not."""
    for path in ("base_model.model.model.layers", "model.layers"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(layers, nn.ModuleList)
        return layers
    raise AssertionError(f"{type(model).__name__} has no decoder layers")


def check_buildable(pretrained: PretrainedModel, attn_implementation: str) -> None:
    """Checks that transformers can build the pretrained model here. It needs no weights for that.

    Raises:
        UserError: it refuses something in config.json, or this attention implementation.
    """
    try:
        build_on_meta(pretrained, attn_implementation)
    except Exception as error:  # config.json may hold anything, and transformers raises what comes of it
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{pretrained.folder}: transformers cannot build this model (config.json, or model.attn_implementation "
            f"{attn_implementation}): {reason}"
        ) from error
