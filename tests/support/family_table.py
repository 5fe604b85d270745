"""The table of families in loraprune_ds/model/README.md: what leaves and stays, how it is stored, who serves it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraprune_ds.export.gguf_architecture import ARCHITECTURES
from loraprune_ds.model.families.base import Family
from loraprune_ds.model.family import FAMILIES
from tests.integration.heavy.families import VLLM, VLLM_ANY_LAYERS
from tests.support.families import (
    heads_divide_hidden,
    kinds,
    marks,
    norms_are_wide,
    tiny_config,
    tiny_model,
)
from tests.support.multimodal import TOWERS

PAGE = Path(__file__).parents[2] / "loraprune_ds" / "model" / "README.md"
HEADER = ("families", "leaves", "stays", "stored as", "GGUF", "vLLM", "text of", "note")
STAYS = {"q_proj": "attention", "mlp.gate_proj": "dense MLPs", "shared": "shared experts"}
STAYS |= {
    "_a_proj": "latent projections",
    "_latent_proj": "latent projections",
    "conv.": "convolutions",
}
STAYS |= {
    "mamba.": "Mamba",
    "mixer.in_proj": "Mamba",
    "indexer.": "indexers",
    "feed_forward.w1": "dense MLPs",
}
IN_VLLM = {"auto": "equal", "transformers": "equal, by transformers"}


def with_table(page: str) -> str:
    """Replaces the table of families."""
    begin = page.index(f"|{HEADER[0]}|")
    lines = [HEADER, ("---",) * len(HEADER), *family_rows()]
    table = "".join(f"|{'|'.join(line)}|\n" for line in lines)
    return page[:begin] + table + page[page.index("|\n\n", begin) + 2 :]


def family_rows() -> list[tuple[str, ...]]:
    """Describes every family. Families with equal cells share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        rows.setdefault(describe(name, family), []).append(name)
    return [(", ".join(names), *cells) for cells, names in rows.items()]


def describe(name: str, family: Family) -> tuple[str, ...]:
    there = weights(name)
    whole = [x.linear for x in marks(name) if not x.spans and x.linear in there]
    stays = [
        *family.fixed,
        *(words for part, words in STAYS.items() if any(part in x for x in whole)),
    ]
    stored = "stock †" if heads_divide_hidden(name) else "stock"
    found = ARCHITECTURES.get(name)
    gguf = "" if found is None else "equal" if found.unequal is None else "any"
    vllm = "any" if name in VLLM_ANY_LAYERS else IN_VLLM[VLLM[name]] if name in VLLM else ""
    towers = ", ".join(outer for outer, (text, *_) in TOWERS.items() if text == name)
    leaves = [kind for kind in kinds(name) if kind not in family.fixed]
    stored = (
        "stock with its tower"
        if family.lm_class()
        else "stock alone"
        if family.equal_layers
        else stored
    )
    cells = (", ".join(leaves), ", ".join(stays), stored, gguf, vllm, towers)
    return *cells, "; ".join(notes(name, family))


def weights(name: str) -> str:
    """Names the weights of a model, which has a dense layer if its config can ask for one."""
    asked: dict[str, Any] = {"mlp_only_layers": [0]}
    dense = asked if getattr(tiny_config(name), "mlp_only_layers", None) is not None else {}
    return " ".join(tiny_model(name, **dense).state_dict())


def notes(name: str, family: Family) -> Iterator[str]:
    if name == "llama":
        yield "else mistral, or with biases the modelling file"
    if norms_are_wide(name):
        yield "norms over all heads: a cut is not quite a mask"
    if family.eager_only:
        yield f"eager: sdpa lacks {family.eager_only}"
    if not family.packs:
        yield "no packing"
    if family.windows_begin_with_bos:
        yield "windows begin with BOS"
    if family.shared_bias:
        yield "else umt5, or with layers that differ the modelling file"
    if name == "phi3":
        yield "long rotary factors need the modelling file once heads leave"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
