"""Prunes in your own training loop, on accelerate: loraprune_ds/hf/README.md."""

import sys

from accelerate import Accelerator, DeepSpeedPlugin
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds import PruneConfig, Pruning

name, data, out, *ds_config = sys.argv[1:]  # without DeepSpeed's JSON: one process or DDP
accelerator = Accelerator(
    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config[0]) if ds_config else None
)
tokenizer = AutoTokenizer.from_pretrained(name)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(name), LoraConfig(target_modules="all-linear")
)
optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows = load_dataset("json", data_files=data, split="train").map(
    lambda row: tokenizer(row["text"][:64])
)
loader = DataLoader(rows.with_format("torch", ["input_ids"]), batch_size=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
pruning = Pruning(model, optimizer, PruneConfig(ratio=0.3, prune_every=2), steps=len(loader))
model.train()
for batch in loader:
    pruning.begin_step()
    accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
    optimizer.step()
    optimizer.zero_grad()
    pruning.end_step()
pruning.save_model(f"{out}/model", tokenizer)
pruning.save_base(f"{out}/base", tokenizer=tokenizer)
pruning.write_results(out)
