"""Prunes in transformers' Trainer: `SCRIPT --config FILE`. Both checkouts of same_results.py run it."""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loraprune_ds import LoraPruneCallback, PruneConfig

config = yaml.safe_load(Path(sys.argv[2]).read_text())
out, source, train = Path(config["output_dir"]), config["model"]["path"], config["train"]
bits: dict[str, Any] = {}
if config["model"].get("nf4"):  # on DDP
    config["deepspeed"] = None
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    bits = {"dtype": torch.bfloat16, "quantization_config": four_bits}
deepspeed.init_distributed("gloo")  # before accelerate, which knows no DeepSpeed on CPU ranks
set_seed(1)
args = TrainingArguments(
    output_dir=str(out),
    use_cpu=True,
    deepspeed=config["deepspeed"],
    max_steps=train["steps"],
    per_device_train_batch_size=train["micro_batch_size"],
    gradient_accumulation_steps=train["global_batch_size"] // torch.distributed.get_world_size(),
    learning_rate=train["learning_rate"],
    logging_steps=1,
    save_steps=config["checkpoint"]["every"],
    report_to="none",
    disable_tqdm=True,
)
tokenizer = AutoTokenizer.from_pretrained(source)
tokens, window = (
    tokenizer(Path(config["data"]["path"]).read_text())["input_ids"],
    config["data"]["window"],
)
rows = [tokens[i : i + window] for i in range(0, len(tokens) - window, window)]
lora = LoraConfig(r=config["lora"]["r"], lora_dropout=0.05, target_modules="all-linear")
pruning = LoraPruneCallback(PruneConfig(**config["prune"]))
trainer = Trainer(
    get_peft_model(AutoModelForCausalLM.from_pretrained(source, **bits), lora),
    args,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # pyright: ignore[reportArgumentType]
    callbacks=[pruning],
)
trainer.train()
trainer.save_model(str(out / "model-adapter"))
pruning.save_base(out / "model-base", out / "model-adapter")
pruning.save_model(out / "model")
