"""Writes README.md of an exported model: its cut, its perplexity, and how to load it."""

import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from loraprune_ds.config import ModelConfig, RunConfig
from loraprune_ds.model.exported_config import ExportedConfig
from loraprune_ds.model.hub import EMBEDDED
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.units import format_percent, format_perplexity

CARD_FILE = "README.md"
TITLES = {
    "heads": "key-value heads",
    "delta": "key heads of delta nets",
    "cross_heads": "heads of cross-attention",
    "channels": "MLP channels",
    "experts": "experts",
}
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
LOAD_HEADING = "## Load it"
SHOWN = 5  # answers
TEMPLATE = """---
library_name: transformers
pipeline_tag: {task}
tags:
- pruned
- loraprune
---

# {card.base_model}, pruned

A structurally pruned, smaller model: attention heads and {others} were removed while LoRA was tuned. Made
with loraprune_ds. The licence of {card.base_model} applies.

| | dense | pruned | removed |
|---|---|---|---|
| parameters (all, each once) | {total} |
| of these in the decoder layers' linears | {linear} |
| perplexity | {perplexity_dense} | {perplexity_pruned} | |

- Perplexity on: {card.perplexity_data}
- Tuned on: {card.data}, {card.steps:,} optimizer steps
- Asked to remove: {asked} of the decoder layers' linears
- Chosen by: criterion `{card.criterion}`, ranking `{card.ranking}`
- Head size: {card.pruned.head_dim}
- In llama.cpp: {llama_cpp}

{layers}

## Load it

The weights are {dtype}, with LoRA merged.

```python
from transformers import {exported.auto_class}, {tokenizer}

folder = "path/to/this/folder"
model = {exported.loader}
{variable} = {tokenizer}.from_pretrained(folder{trust})
```
{remark}"""

REMARK = """
The layers differ in size, or have a size no stock class takes: `{file}` in this folder describes them
to transformers (4.57 or newer), and `trust_remote_code=True` allows it to run. It imports only torch and transformers.
"""

IMAGES = """
**Images were not tuned.** The vision tower is a copy, and only text was used. Measure the model on images first.
"""


@dataclass(frozen=True)
class ModelCard:
    """The facts of the README. Names contain no path of this machine. A perplexity that was not measured is None."""

    base_model: str
    dense: ModelShape
    pruned: ModelShape
    criterion: str
    ranking: str | None
    asked: float  # fraction of the decoder layers' linears that was to leave
    data: str  # the training data
    steps: int
    perplexity_data: str
    llama_cpp: str | None  # name of the architecture that it supports the model as, if any
    perplexity_dense: float | None = None
    perplexity_pruned: float | None = None


def card_of_run(
    config: RunConfig,
    dense: ModelShape,
    pruned: ModelShape,
    *,
    asked: float,
    llama_cpp: str | None,
    steps: int,
    windows: int | None = None,
    **perplexities: float | None,
) -> ModelCard:
    """Collects the facts of a run. `windows` is the measured number of windows, if known."""
    paths = [source.path for source in config.data.sources]
    names = ("Python's help topics (pydoc_data)" if path == EMBEDDED else Path(path).name for path in paths)
    data = " + ".join(names)
    held_out = Path(config.data.held_out).name if config.data.held_out else f"a held-out part of {data}"
    count = "" if windows is None else f"{windows} "
    return ModelCard(
        base_model=model_name(config.model),
        dense=dense,
        pruned=pruned,
        criterion=config.prune.criterion,
        ranking=config.prune.ranking,
        asked=asked,
        data=data,
        steps=steps,
        perplexity_data=f"{held_out}, {count}windows of {config.evaluate.window} tokens",
        llama_cpp=llama_cpp,
        **perplexities,
    )


def model_name(config: ModelConfig) -> str:
    """Names the dense model, without folders of this machine."""
    return "SmolLM2-135M-Instruct" if config.path == EMBEDDED else Path(config.path).name


def write_model_card(folder: Path, card: ModelCard, exported: ExportedConfig) -> None:
    """Writes README.md of the exported model in `folder`."""
    dense, pruned, trust = card.dense, card.pruned, exported.trust_remote_code
    llama_cpp = "not supported"
    if card.llama_cpp:
        llama_cpp = f"as architecture `{card.llama_cpp}`, by an export to GGUF"
    text = TEMPLATE.format(
        card=card,
        exported=exported,
        dtype=exported.config["dtype"],
        asked=format_percent(card.asked),
        total=_removed(dense.total_numel(), pruned.total_numel()),
        linear=_removed(dense.linear_numel(), pruned.linear_numel()),
        perplexity_dense=_perplexity(card.perplexity_dense),
        perplexity_pruned=_perplexity(card.perplexity_pruned),
        others=TITLES[pruned.kinds[-1]],
        llama_cpp=llama_cpp,
        layers="\n".join(_layer_rows(pruned)),
        trust=", trust_remote_code=True" if trust else "",
        task=TASKS[exported.auto_class],
        variable="processor" if exported.multimodal else "tokenizer",
        tokenizer="AutoProcessor" if exported.multimodal else "AutoTokenizer",
        remark=REMARK.format(file=exported.modelling_file) if trust else IMAGES * exported.multimodal,
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def copy_model_card(source: Path, folder: Path, how_to_load: str) -> None:
    """Copies the model card of `source`, if any, with another section on loading."""
    path = source / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    facts = text.partition(LOAD_HEADING)[0].rstrip()
    (folder / CARD_FILE).write_text(f"{facts}\n\n{LOAD_HEADING}\n\n{how_to_load}".lstrip(), encoding="utf-8")


def answers_section(result: dict[str, Any]) -> str:
    """Makes a section with a few greedy answers from an evaluation, over all kinds of prompts."""
    prompts = result["answers_plan"]["prompts"]
    lines = ["## Answers", "", f"Greedy, at most {result['answers_plan']['max_new_tokens']} tokens.", ""]
    for i in sorted({i * len(prompts) // SHOWN for i in range(SHOWN)}):
        texts = [("Prompt", "\n\n".join(message["content"] for message in prompts[i]["messages"]))]
        for name, model in (("Dense", result["dense"]), ("Pruned", result)):
            texts += [(name, model["answers"]["greedy"]["texts"][i]["text"])] if model else []
        for name, text in texts:
            wrapped = (textwrap.wrap(line, 100, drop_whitespace=False) or [""] for line in text.splitlines() or [""])
            # Four spaces keep a line from ending the block, and from being read as Markdown or HTML.
            lines += [f"{name}:", "", *(f"    {part}" for parts in wrapped for part in parts), ""]
    return "\n".join(lines)


def _removed(dense: int, pruned: int) -> str:
    return f"{dense:,} | {pruned:,} | {1 - pruned / dense:.2%}"


def _perplexity(value: float | None) -> str:
    return "not measured" if value is None else format_perplexity(value)


def _layer_rows(shape: ModelShape) -> list[str]:
    """Makes a table with a row per sequence of equal layers."""
    titles = ["layers", "query heads", *(TITLES[kind] for kind in shape.kinds)]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for layer, run in groupby(range(len(shape.layers)), key=lambda i: shape.layers[i]):
        first, *rest = run
        span = f"{first}–{rest[-1]}" if rest else f"{first}"
        rows.append(f"| {' | '.join(map(str, (span, shape.query_heads(layer), *layer.values())))} |")
    return rows
