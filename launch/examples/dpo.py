"""Prunes while TRL's DPOTrainer tunes: loraprune_ds/hf/README.md."""

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from loraprune_ds import LoraPruneCallback, PruneConfig

parser = HfArgumentParser((PruneConfig, DPOConfig))
prune, args, (model, data) = parser.parse_args_into_dataclasses(return_remaining_strings=True)
rows = load_dataset("json", data_files=data, split="train")
lora = LoraConfig(target_modules="all-linear")
pruning = LoraPruneCallback(prune)
trainer = DPOTrainer(model, args=args, train_dataset=rows, peft_config=lora, callbacks=[pruning])
trainer.train(resume_from_checkpoint=pruning.resume(trainer.model))
if trainer.is_fsdp_enabled:  # of a SHARDED_STATE_DICT the Trainer would save no adapter
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model()  # the adapter
pruning.save_base(f"{args.output_dir}/base", args.output_dir)  # the adapter now names this base
pruning.save_model(f"{args.output_dir}/model")  # with LoRA merged
