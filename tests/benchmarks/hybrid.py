"""Prunes a trained hybrid: a Qwen3.5 of 14 M parameters, of which three layers in four are gated delta nets.

    python -m tests.benchmarks.hybrid --text wiki.valid.txt [--minutes 30] [--steps 80] [--seeds 0 1 2] [--ranks 2]

None comes from the package index, so one is trained for some minutes on a text and Python's help topics, of which the
last tenth is held out. Each run removes 40 %: by the default recipe, by `lora`, at random, and with none or half of the
usual part of the heads, which are those of attention and of delta nets. Results go to results/hybrid.json. A second
start makes only the missing runs.
"""

# torch and transformers do not type all that is used here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from loraprune_ds.files import read_json, write_text
from loraprune_ds.model.sources import embedded_text
from tests.benchmarks.running import RESULTS, ROOT, make_parser, origin, run_base, train_for

RESULT = RESULTS / "hybrid.json"
VOCABULARY, WINDOW, BATCH, LEARNING_RATE = 4096, 128, 16, 1.5e-3
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 320, "intermediate_size": 896, "head_dim": 64}
SIZES |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
SIZES |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 4}
SIZES |= {"linear_num_value_heads": 8, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
CHOICES: dict[str, list[str]] = {"default": [], "lora": ["prune.criterion=lora"], "random": ["prune.criterion=random"]}
ONCE: dict[str, list[str]] = {"no heads": ["prune.head_ratio=0"], "half of the heads": ["prune.head_ratio=0.2"]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="of CPU time to train the dense model")
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "hybrid", help="default: runs/hybrid")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    if not (work / "model" / "config.json").is_file():
        train_dense(arguments.text, work, 60 * arguments.minutes)
    rows: dict[str, Any] = read_json(arguments.result)["runs"] if arguments.result.exists() else {}
    runs = [(name, seed) for seed in arguments.seeds for name in CHOICES]
    for name, seed in runs + [(name, arguments.seeds[0]) for name in ONCE]:
        key = f"{name}, seed {seed}"
        if key not in rows:
            print(f"{key} ...", file=sys.stderr, flush=True)
            rows[key] = run(work, (CHOICES | ONCE)[name], seed, arguments)
            settings = {"minutes": arguments.minutes, "steps": arguments.steps, "ranks": arguments.ranks}
            content = {"runs": rows, **settings, **origin()}
            arguments.result.write_text(json.dumps(content, indent=1) + "\n")


def run(work: Path, changes: list[str], seed: int, arguments: Any) -> dict[str, Any]:
    out = work / "runs" / f"{'-'.join(changes) or 'default'}-{seed}"
    settings = [f"output_dir={out}", f"model.path={work / 'model'}", f"data.path={work / 'train.txt'}", f"seed={seed}"]
    settings += [f"data.held_out={work / 'held_out.txt'}", "data.held_out_fraction=null", f"data.window={WINDOW}"]
    settings += ["prune.ratio=0.4", "prune.channel_multiple=1", f"train.steps={arguments.steps}"]
    settings += ["logging.report_to=[]", "train.learning_rate=4e-3", "lora.lora_dropout=0", "checkpoint.every=null"]
    settings += changes
    run_base(arguments.ranks, settings, "--resume", "auto", stdout=sys.stderr)
    report = read_json(out / "report.json")
    layers = read_json(out / "kept_groups.json")["layers"]
    kept = [{kind: len(groups) for kind, groups in layer.items() if isinstance(groups, list)} for layer in layers]
    return {"perplexity": report["perplexity"], "params": report["params"], "kept": kept}


def train_dense(text: Path, work: Path, seconds: float) -> None:
    """Writes texts, tokenizer and model into the work folder. Prints the loss."""
    parts = [text.read_text(encoding="utf-8"), "\n\n".join(embedded_text())]
    ends = [len(part) * 9 // 10 for part in parts]
    held_out = "\n\n".join(part[end:] for part, end in zip(parts, ends, strict=True))
    training = "\n\n".join(part[:end] for part, end in zip(parts, ends, strict=True))
    for name, content in (("train", training), ("held_out", held_out)):
        write_text(work / f"{name}.txt", content)
    tokenizer = train_tokenizer(training)
    ids, unseen = (torch.tensor(tokenizer(content, verbose=False)["input_ids"]) for content in (training, held_out))
    torch.manual_seed(0)
    model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES))

    def loss_of_step() -> Tensor:
        starts = torch.randint(len(ids) - WINDOW, (BATCH, 1))
        return loss_of(model, ids[starts + torch.arange(WINDOW)])

    train_for(seconds, model, loss_of_step, LEARNING_RATE, 0.1)
    with torch.no_grad():
        windows = unseen[: len(unseen) // WINDOW * WINDOW].view(-1, WINDOW)[:64]
        print(f"held-out loss {loss_of(model, windows).item():.3f}", file=sys.stderr, flush=True)
    tokenizer.save_pretrained(work / "model")
    model.save_pretrained(work / "model")


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>")


if __name__ == "__main__":
    main()
