"""Sizes of published models, from published.yaml."""

from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]


def sizes_of(
    model_type: str, hidden: int, channels: int, layers: int, heads: int, **others: Any
) -> Config:
    """Returns the fields of config.json that every model has, and others."""
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "num_hidden_layers": layers}
    return {"model_type": model_type, **sizes, "num_attention_heads": heads, **others}


_MODELS = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
# config.json, and parameters in billions; of mixtures all, and the active ones
PUBLISHED: dict[str, tuple[Config, float]] = {
    name: (model["config"], model["billions"]) for name, model in _MODELS["with_run_config"].items()
}
MIXTURES: dict[str, tuple[Config, float, float]] = {
    name: (model["config"], model["billions"], model["active"])
    for name, model in _MODELS["mixtures"].items()
}
T5_11B: Config = _MODELS["others"]["t5-11b"]["config"]
NEMOTRON_3_NANO_4B: tuple[Config, float] = (
    _MODELS["others"]["Nemotron-3-Nano-4B"]["config"],
    _MODELS["others"]["Nemotron-3-Nano-4B"]["billions"],
)
