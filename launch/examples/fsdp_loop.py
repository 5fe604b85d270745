"""Prunes in a plain torch loop under FSDP2, as torchtitan's: loraprune_ds/hf/README.md.

torchrun --nproc_per_node 2 launch/examples/fsdp_loop.py path/to/llama rows.jsonl runs/loop
"""

import os
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds import PruneConfig, Pruning

name, data, out = sys.argv[1:]
kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))  # joins the process group
torch.manual_seed(0)  # of LoRA
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
# gradients are averaged in fp32, also of a bf16 model
policy = MixedPrecisionPolicy(param_dtype=base.dtype, reduce_dtype=torch.float32)
for layer in base.model.layers:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = AdamW(trained, lr=1e-3)
rows = load_dataset("json", data_files=data, split="train")
steps = len(rows) // mesh.size()
pruning = Pruning(model, optimizer, PruneConfig(ratio=0.3, prune_every=2), steps)
model.train()
for step in range(steps):
    text = rows[step * mesh.size() + mesh.get_rank()]["text"][:64]
    ids = tokenizer(text, return_tensors="pt").input_ids.to(kind)
    pruning.begin_step()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    pruning.end_step(float(loss))
pruning.save_model(f"{out}/model", tokenizer)
pruning.save_base(f"{out}/base", tokenizer=tokenizer)
pruning.write_results(out)
