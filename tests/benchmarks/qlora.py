"""Prunes SmolLM2-135M on a 4-bit base and on a bf16 base, in one process, by `Pruning` in a plain loop.

    python -m tests.benchmarks.qlora --tune valid.txt --test test.raw [--seeds 0 1] [--bases bfloat16 nf4]

The recipe's budget and settings, but no distillation, which is the trainer's affair: 80 steps of 8 windows of 128
tokens, 41.7 % removed. A tenth of the tuning text is held out. The exports are measured by launch/evaluate.py. A run
that is in results/qlora.json already is not made again.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loraprune_ds import PruneConfig, Pruning, linear_names
from loraprune_ds.files import read_json, read_text, write_text
from loraprune_ds.pretrained.sources import embedded_model_dir
from loraprune_ds.ranks.device import fast_half_products
from tests.benchmarks.running import RESULTS, ROOT, add_to, evaluated, make_parser

WINDOW, BATCH, MICRO_BATCH, STEPS, RATE = 128, 8, 4, 80, 4e-3
PRUNE = PruneConfig(ratio=0.417, prune_every=4, channel_multiple=1)
BASES: dict[str, Any] = {
    "bfloat16": None,
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
}


def load(base: str, folder: Path) -> Any:
    settings = BASES[base]
    more = {}
    if settings is not None:
        more = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    names = linear_names(model)
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    )


def split_text(path: Path, work: Path) -> tuple[str, Path]:
    """Returns nine tenths of a text, and a file with the rest."""
    text = read_text(path, "--tune")
    end = len(text) * 9 // 10
    held_out = work / "held_out.txt"
    work.mkdir(parents=True, exist_ok=True)
    write_text(held_out, text[end:])
    return text[:end], held_out


def windows(text: str, tokenizer: Any) -> Tensor:
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def prune(base: str, seed: int, text: str, out: Path) -> dict[str, Any]:
    """Tunes and cuts, and exports to `out`. Returns how it went."""
    folder = embedded_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = windows(text, tokenizer)
    torch.manual_seed(seed)
    model = load(base, folder)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    pruning = Pruning(model, optimizer, PRUNE, STEPS, seed=seed)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    model.train()
    began = time.process_time()
    losses = list[float]()
    with fast_half_products("bfloat16"):
        for indices in order[: STEPS * BATCH].split(BATCH):
            pruning.begin_step()
            loss = 0.0
            for ids in samples[indices].split(MICRO_BATCH):
                part = model(input_ids=ids, labels=ids).loss * len(ids) / BATCH
                part.backward()
                loss += float(part)
            clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            pruning.end_step(loss)
            losses.append(loss)
            print(f"{base} seed {seed} step {pruning.step}: {loss:.3f}", flush=True)
        seconds = time.process_time() - began
        shutil.rmtree(out, ignore_errors=True)
        pruning.save_model(out, tokenizer)
    return {
        "cpu_seconds": seconds,
        "removed": pruning.reached,
        "cuts": len(pruning.cuts),
        "weight_bytes": pruning.weight_bytes[0],
        "losses": losses,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tune", type=Path, required=True, help="a tenth of it is held out")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "qlora")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tuned, held_out = split_text(arguments.tune, arguments.work)
    texts = {"held_out": held_out, "test": arguments.test}
    path = RESULTS / "qlora.json"
    for seed in arguments.seeds:
        for base in arguments.bases:
            name = f"{base}, seed {seed}"
            if path.exists() and name in read_json(path):
                continue
            out = arguments.work / f"{base}-{seed}"
            result = prune(base, seed, tuned, out)
            for text, file in texts.items():
                options = ("--text", str(file), "--window", str(WINDOW), "--max-windows", "160")
                result[text] = evaluated(str(out), *options)["perplexity"]
            add_to(path, name, result)


if __name__ == "__main__":
    main()
