"""The causal LMs that can be pruned, by the `model_type` in config.json: the one place that names their classes."""

from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from loraprune_ds.model.modeling_pruned_llama import PrunedLlamaForCausalLM
from loraprune_ds.model.modeling_pruned_mistral import PrunedMistralForCausalLM

CAUSAL_LMS: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "pruned_llama": PrunedLlamaForCausalLM,
    "pruned_mistral": PrunedMistralForCausalLM,
}


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Of the model's config.json."""
    found = CAUSAL_LMS[model_type].config_class
    assert found is not None
    return found
