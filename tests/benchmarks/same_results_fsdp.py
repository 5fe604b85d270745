"""Prunes in a plain loop under FSDP2: `SCRIPT --config FILE`. Both checkouts of same_results.py run it."""

import sys
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from loraprune_ds import PruneConfig, Pruning

config = yaml.safe_load(Path(sys.argv[2]).read_text())
out = Path(config["output_dir"])
source = config["model"]["path"]
train = config["train"]
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
set_seed(1)
tokenizer = AutoTokenizer.from_pretrained(source)
base = AutoModelForCausalLM.from_pretrained(source)
lora = LoraConfig(r=config["lora"]["r"], lora_dropout=0.05, target_modules="all-linear")
model = get_peft_model(base, lora).train()
for layer in base.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = AdamW(trained, lr=train["learning_rate"])
tokens = torch.tensor(tokenizer(Path(config["data"]["path"]).read_text())["input_ids"])
window = config["data"]["window"]
rows = tokens[: len(tokens) // window * window].view(-1, 1, window)
pruning = Pruning(model, optimizer, PruneConfig(**config["prune"]), train["steps"])
micro_batches = train["global_batch_size"] // mesh.size()
row = mesh.get_rank()
for step in range(1, train["steps"] + 1):
    pruning.begin_step()
    total = 0.0
    for i in range(micro_batches):
        model.set_requires_gradient_sync(i == micro_batches - 1)
        loss = model(input_ids=rows[row], labels=rows[row]).loss / micro_batches
        loss.backward()
        total += float(loss)
        row += mesh.size()
    clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    pruning.end_step(total)
    if step % config["checkpoint"]["every"] == 0:
        pruning.save(out / f"checkpoint-{step}")
pruning.save_base(out / "model-base", tokenizer=tokenizer)
pruning.save_model(out / "model", tokenizer)
pruning.write_results(out)
