"""Checks the table of families in loraprune_ds/model/README.md. This prints it:

python -m tests.unit.test_family_table
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf import write_gguf
from loraprune_ds.export.gguf_architecture import ARCHITECTURES
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.family_row import Family
from loraprune_ds.model.pretrained import ModelWeights, PretrainedModel
from loraprune_ds.model.read_shape import read_model
from tests.families import heads_divide_hidden, norms_are_wide, tiny_config
from tests.integration.heavy.families import VLLM, VLLM_ANY_LAYERS

README = Path(__file__).parents[2] / "loraprune_ds" / "model" / "README.md"
HEADER = ("families", "equal layers are stored as", "GGUF", "vLLM", "note")
LLAMA_STAND_IN = "llama if its heads divide hidden_size, otherwise mistral, or with biases the modelling file"
IN_VLLM = {"auto": "equal layers", "transformers": 'equal layers, with `model_impl="transformers"`'}


def table() -> str:
    """Describes every family in Markdown. Families with equal cells share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        rows.setdefault(describe(name, family), []).append(name)
    lines = [HEADER, ("---",) * len(HEADER), *((", ".join(names), *cells) for cells, names in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


WHOLE = {"mlp.gate_proj": "dense MLPs", "shared": "shared experts", "_a_proj": "latent projections"}


def describe(name: str, family: Family) -> tuple[str, ...]:
    if name == "llama":
        stored = LLAMA_STAND_IN
    elif heads_divide_hidden(name):
        stored = "a stock model if its heads divide hidden_size, otherwise with the modelling file"
    else:
        stored = "a stock model"
    found = ARCHITECTURES.get(name)
    gguf = "no" if found is None else "equal layers" if found.unequal is None else "any layers"
    vllm = "any layers" if name in VLLM_ANY_LAYERS else IN_VLLM[VLLM[name]] if name in VLLM else "no"
    return stored, gguf, vllm, "; ".join(notes(name, family))


def notes(name: str, family: Family) -> Iterator[str]:
    if family.mixture:
        yield "[experts](experts.md) leave"
    elif norms_are_wide(family):
        yield "its norms run over all heads, so a cut is not quite equal to a mask"
    if whole := [words for part, words in WHOLE.items() if any(part in x.name for x in family.linears if not x.parts)]:
        yield f"{' and '.join(whole)} are not pruned"
    if family.fixed:
        yield f"its {' and '.join(family.fixed)} stay, because its class has no field for fewer"
    if family.eager_only:
        yield f"eager attention, because sdpa lacks {family.eager_only}"
    if not family.packs:
        yield "no packing"
    if family.windows_begin_with_bos:
        yield "perplexity windows begin with BOS"
    if name == "phi3":
        yield "with long rotary factors it needs the modelling file as soon as heads leave"


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ARCHITECTURES.keys()))
def test_no_gguf_of_other_families(family: str, tmp_path: Path) -> None:
    config = tiny_config(family).to_dict()
    shape, modules = read_model(config, family)
    pretrained = PretrainedModel(tmp_path, config, modules, ModelWeights(shape, {}, {}, {}))
    with pytest.raises(UserError, match=f"not for {family}"):
        write_gguf(pretrained, tmp_path / "model.gguf", "f16", family)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
