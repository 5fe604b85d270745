"""Makes what PAPER.md shows beside the runs of quality.py: shared masks, merged LoRA's speed, the criteria's memory.

python -m tests.benchmarks.paper masks --work FOLDER     after quality.py has run the group `once` there
python -m tests.benchmarks.paper speed --pruned RUN20 RUN50
python -m tests.benchmarks.paper memory
"""

import argparse
import copy
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraprune_ds.files import read_json
from loraprune_ds.model.codecs import INT8
from loraprune_ds.model.frozen import Blocks, QuantisedLinear, storage_format, stored_tensors
from loraprune_ds.model.lora_product import FusedLoraLinear
from loraprune_ds.pretrained.sources import embedded_model_dir
from loraprune_ds.pruning.criterion import gradient_estimate
from loraprune_ds.pruning.prunable_model import LoraFactors
from loraprune_ds.ranks.device import resident_bytes
from loraprune_ds.report.pictures import BLUE, GREEN, ORANGE, TEXT, picture, scale_perplexity
from tests.benchmarks.memory import Peak
from tests.benchmarks.quality import digest
from tests.benchmarks.quality_settings import PERCENTS
from tests.benchmarks.reading_speed import ROUND, measure_speed
from tests.benchmarks.running import RESULTS, record
from tests.support.families import LLAMA_LINEARS

# beside the gradient of W
OTHERS = {"lora": (BLUE, "o"), "fisher": (GREEN, "^"), "magnitude": (ORANGE, "s")}
WIDTHS = {"heads": 9, "channels": 1536}  # of a layer of the expanded SmolLM2
Groups = set[tuple[int, int]]  # (layer, group)
LORA = LoraConfig(
    r=8, lora_alpha=16, target_modules=[linear.name.rpartition(".")[2] for linear in LLAMA_LINEARS]
)
# TinyLlama's sizes, with a head of keys and values for each query head
LLAMA_1B: Any = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
}


# Figure 4: groups that two criteria remove alike


def measure_masks(work: Path) -> None:
    rows = list[dict[str, Any]]()
    for percent in PERCENTS:
        files = {
            name: work / "results" / f"once-{percent}-{name}-s0.json"
            for name in ("gradient", *OTHERS)
        }
        if not all(file.exists() for file in files.values()):
            continue
        results = {name: read_json(file) for name, file in files.items()}
        removed = {name: _removed(work / "runs", result) for name, result in results.items()}
        row: dict[str, Any] = {"percent": percent}
        for kind, width in WIDTHS.items():
            true = removed["gradient"][kind]
            row[kind] = {name: len(removed[name][kind] & true) / len(true) for name in OTHERS}
            row[kind]["chance"] = len(true) / (width * len({layer for layer, _ in true}))
        row["perplexity"] = {name: result["perplexity"]["test"] for name, result in results.items()}
        rows.append(row)
    record("paper_masks", {"rows": rows})
    _draw_masks(RESULTS / "paper_masks.png", rows)


def _removed(runs: Path, result: dict[str, Any]) -> dict[str, Groups]:
    folder = runs / f"{result['setting']}-s0-{digest(result['basis'])}"
    layers = read_json(folder / "kept_groups.json")["layers"]
    return {
        kind: {(i, j) for i, kept in enumerate(layers) for j in set(range(width)) - set(kept[kind])}
        for kind, width in WIDTHS.items()
    }


def _draw_masks(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the shared part of the removed groups, and the perplexity of each mask."""
    percents, styles = (
        [row["percent"] for row in rows],
        {**OTHERS, "chance": (TEXT, ""), "gradient": (TEXT, "x")},
    )
    with picture(path, (10, 3.6)) as figure:
        panels = figure.subplots(1, 3)
        for axes, kind in zip(panels, ("heads", "channels", "perplexity"), strict=True):
            for name in rows[0][kind]:
                values = [row[kind][name] * (100 if kind in WIDTHS else 1) for row in rows]
                axes.plot(
                    percents, values, color=styles[name][0], marker=styles[name][1], label=name
                )
            axes.set(
                title=f"removed {kind} that\nthe gradient of W removes", ylabel="%", ylim=(0, 100)
            )
            axes.set(xlabel="removed, % of the linears", xticks=percents)
        panels[2].set(title="perplexity of the cut model,\nWikiText-2 test", ylabel="")
        panels[2].autoscale()
        scale_perplexity(panels[2], [x for row in rows for x in row["perplexity"].values()])
        named = {
            text: line
            for axes in panels
            for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5)


# Table 3: time of merged and unmerged models


def measure_merged(pruned: list[Path]) -> None:
    folders = {"dense": embedded_model_dir(), **dict(zip(("20 %", "50 %"), pruned, strict=True))}
    models = dict[str, Any]()
    for name, folder in folders.items():
        for form in ("merged", "unmerged"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, trust_remote_code=True
            )
            # new factors take the time that tuned ones do
            models[f"{name}, {form}"] = (
                get_peft_model(loaded, LORA) if form == "unmerged" else loaded
            ).eval()
    speeds = dict(zip(models, measure_speed(list(models.values())), strict=True))
    dense = speeds["dense, merged"]
    times = {
        name: {key: dense[key] / of[key] for key in of if of[key]} for name, of in speeds.items()
    }
    record("paper_speed", {"settings": ROUND, "speeds": speeds, "time_of_dense_merged": times})


# Table 4: memory of the criteria in one process, unsharded


def measure_memory() -> None:
    processes, rows = multiprocessing.get_context("spawn"), dict[str, Any]()
    for name in ("vanilla", "lora", "lora, int8"):
        with processes.Pool(1) as pool:
            rows[name] = pool.apply(_memory, (name,))
        print(name, rows[name], flush=True)
    less = {name: 1 - row["peak"] / rows["vanilla"]["peak"] for name, row in rows.items()}
    record(
        "paper_memory", {"model": LLAMA_1B, "tokens": 128, "bytes": rows, "less_than_vanilla": less}
    )


def _memory(name: str) -> dict[str, int]:
    """Returns the bytes above the imports: of the model, and at most in a step that scores every linear."""
    torch.manual_seed(0)
    imports = resident_bytes()
    torch.set_default_dtype(torch.bfloat16)
    stock: Any = LlamaForCausalLM(
        LlamaConfig(**LLAMA_1B, vocab_size=32000, max_position_embeddings=2048)
    )
    torch.set_default_dtype(torch.float32)
    if name.endswith("int8"):
        _store_in_int8(stock)
    peft_config: Any = copy.deepcopy(LORA)
    if name != "vanilla":
        peft_config._register_custom_module({nn.Linear: FusedLoraLinear})  # as the trainer's
    model: Any = get_peft_model(stock, peft_config, autocast_adapter_dtype=False).to(torch.bfloat16)
    linears = [module for module in model.modules() if hasattr(module, "lora_A")]
    if name == "vanilla":
        for linear in linears:
            linear.base_layer.weight.requires_grad_(True)
    token_ids = torch.randint(32000, (1, 128))
    with Peak() as peak:
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        scores = [_score(linear, vanilla=name == "vanilla") for linear in linears]
    assert all(score.isfinite().all() and score.any() for score in scores)
    return {"model": peak.before - imports, "peak": peak.peak - imports}


def _store_in_int8(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and name in (LORA.target_modules or ()):
                stored_as = Blocks(INT8, linear.weight.dtype)
                tensors = stored_as.split(linear.weight)
                setattr(parent, name, QuantisedLinear(linear, stored_as, tensors))


@torch.no_grad()
def _score(linear: Any, *, vanilla: bool) -> Tensor:
    """Scores the rows of a linear by the true gradient, or by the estimate from LoRA's."""
    A, B = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    base = linear.base_layer
    weight = storage_format(base).join(stored_tensors(base))
    gradient = (
        base.weight.grad
        if vanilla
        else gradient_estimate(LoraFactors(A, B, A.grad, B.grad, scaling=2.0))
    )
    return (gradient * weight).abs().sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["masks", "speed", "memory"])
    parser.add_argument("--work", type=Path, help="the folder of quality.py")
    parser.add_argument("--pruned", type=Path, nargs=2, help="models with 20 and 50 % removed")
    arguments = parser.parse_args()
    if arguments.what == "masks":
        measure_masks(arguments.work)
    elif arguments.what == "speed":
        measure_merged(arguments.pruned)
    else:
        measure_memory()


if __name__ == "__main__":
    main()
