"""Prunes while TRL's DPOTrainer tunes: loraprune_ds/hf/README.md."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from loraprune_ds.config import PruneConfig
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.hf.live import linear_names

model, data, *options = sys.argv[1:]
(args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(options)
pruning = LoraPruneCallback(PruneConfig(ratio=0.3, prune_every=max(1, args.max_steps // 20)))
trainer = DPOTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, target_modules=linear_names(model), task_type="CAUSAL_LM"),
    callbacks=[pruning],
)
trainer.train(resume_from_checkpoint=pruning.resume(trainer.model, args.output_dir))
pruning.save_model(f"{args.output_dir}/model")  # LoRA merged in
trainer.save_model(f"{args.output_dir}/adapter")
pruning.save_base(f"{args.output_dir}/base", f"{args.output_dir}/adapter")  # which now names this base
