"""Prunes a trained T5 of 12 M parameters, which sorts lists of numbers upwards or downwards.

    python -m tests.benchmarks.t5 [--minutes 12] [--steps 60] [--seeds 0 1 2]

No T5 comes from the package index, so one is trained for minutes of CPU time. Each run removes half: by the default
recipe, by `lora` and at random, once without training and then while it is tuned. Exact matches of 200 unseen lists
go to results/t5.json. A second start makes only the missing runs.
"""

# torch and transformers do not type all that is used here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from loraprune_ds.evaluate.models import Writer, open_result
from loraprune_ds.files import read_json, write_json, write_text
from loraprune_ds.model.perplexity import label_answers
from loraprune_ds.model.token_loss import split_rows
from loraprune_ds.model.tokenizer import tokenize_pairs
from tests.benchmarks.running import RESULTS, ROOT, make_parser, origin, run_base, train_for

RESULT = RESULTS / "t5.json"
ROWS, UNSEEN, BATCH, LEARNING_RATE = 20_000, 200, 64, 1e-3
SIZES: dict[str, Any] = {"d_model": 384, "d_ff": 1024, "d_kv": 32, "num_heads": 12, "num_layers": 3}
SIZES |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "relative_attention_num_buckets": 16}
CHOICES: dict[str, list[str]] = {"default": [], "lora": ["prune.criterion=lora"], "random": ["prune.criterion=random"]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="of CPU time to train the dense model")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "t5", help="default: runs/t5")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    if not (work / "model" / "config.json").is_file():
        train_dense(work, 60 * arguments.minutes)
    found: dict[str, Any] = read_json(arguments.result) if arguments.result.exists() else {"runs": {}}
    found["dense"] = exact_match(work / "model", work)
    # One cut and no training, or the recipe's cuts while it trains.
    ways = {"once": ["train.steps=4", "prune.prune_every=99", "train.learning_rate=1e-12"]}
    ways["tuned"] = [f"train.steps={arguments.steps}", "prune.prune_every=4", "train.learning_rate=4e-3"]
    for name, seed, way in ((name, seed, way) for seed in arguments.seeds for name in CHOICES for way in ways):
        key = f"{name}, seed {seed}, {way}"
        if key not in found["runs"]:
            print(f"{key} ...", file=sys.stderr, flush=True)
            out = work / "runs" / key.replace(", ", "-").replace(" ", "")
            run(work, out, [*ways[way], *CHOICES[name], f"seed={seed}"])
            report = read_json(out / "report.json")
            row = {
                "exact_match": exact_match(out, work),
                "perplexity": report["perplexity"],
                "params": report["params"],
            }
            found["runs"][key] = row
            write_json(arguments.result, found | {"minutes": arguments.minutes, "steps": arguments.steps} | origin())


def run(work: Path, out: Path, changes: list[str]) -> None:
    settings = [f"output_dir={out}", f"model.path={work / 'model'}", "model.dtype=float32", "data.format=seq2seq"]
    settings += [f"data.path={work / 'train.jsonl'}", f"data.held_out={work / 'held_out.jsonl'}", "data.window=32"]
    settings += ["data.held_out_fraction=null", "evaluate.window=32", "lora.lora_dropout=0", "checkpoint.every=null"]
    settings += [f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "logging.report_to=[]"]
    settings += ["prune.ratio=0.5", "prune.channel_multiple=1", *changes]
    run_base(1, settings, "--resume", "auto", stdout=sys.stderr)


def exact_match(folder: Path, work: Path) -> float:
    """Returns the share of unseen lists that a model sorts without a mistake."""
    result = open_result(folder)
    model, tokenizer = result.load_model().eval(), result.load_tokenizer()
    rows = [json.loads(line) for line in (work / "held_out.jsonl").read_text().splitlines()]
    prompts: Any = tokenizer([row["source"] for row in rows])["input_ids"]
    written = Writer(model, tokenizer).write(prompts, max_new_tokens=12, do_sample=False)
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in written)
    return sum(text == row["target"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def make_row(draw: random.Random) -> dict[str, str]:
    numbers, way = [draw.randrange(100) for _ in range(draw.randint(4, 8))], draw.choice(("up", "down"))
    words = map(str, sorted(numbers, reverse=way == "down"))
    return {"source": f"{way} {' '.join(map(str, numbers))}", "target": " ".join(words)}


def train_dense(work: Path, seconds: float) -> None:
    """Writes rows, tokenizer and model into the work folder."""
    draw = random.Random(0)
    rows = [make_row(draw) for _ in range(UNSEEN + ROWS)]
    for name, part in (("held_out", rows[:UNSEEN]), ("train", rows[UNSEEN:])):
        write_text(work / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in part))
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **SIZES))

    def loss_of_step() -> Tensor:
        pairs = [tuple(make_row(draw).values()) for _ in range(BATCH)]
        ids, labels = label_answers(list(tokenize_pairs(pairs, tokenizer, 0)))  # type: ignore[arg-type]
        split = split_rows(ids, labels)
        wanted = torch.full_like(split.target, -100).masked_scatter(split.target_mask, labels[labels != -100])
        return model(input_ids=split.source, attention_mask=split.source_mask, labels=wanted).loss

    train_for(seconds, model, loss_of_step, LEARNING_RATE, 0.01)
    tokenizer.save_pretrained(work / "model")
    model.save_pretrained(work / "model")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a token of each number and of each way, and ends a text with EOS, as T5's does."""
    words = ["<pad>", "</s>", "<unk>", "up", "down", *map(str, range(100))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    main()
