"""Prunes while TRL's DistillationTrainer corrects the texts of the pruned model: loraprune_ds/hf/README.md."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DistillationConfig, DistillationTrainer

from loraprune_ds import LoraPruneCallback, PruneConfig, linear_names


class Trainer(DistillationTrainer):
    """Until the first cut the model equals its teacher, so only cross-entropy has a gradient to score."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if pruning.cuts or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, mask = (
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1)
            for x in ("ids", "mask")
        )
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : inputs["prompt_ids"].shape[1]] = -100
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes
        return model(
            input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=tokens
        ).loss


parser = HfArgumentParser((PruneConfig, DistillationConfig))
prune, args, (model, data) = parser.parse_args_into_dataclasses(return_remaining_strings=True)
# before the first cut, updates only follow the noise of samples
args.warmup_steps = args.warmup_steps or 0.1
teacher = args.teacher_model_name_or_path or model
rows = load_dataset("json", data_files=data, split="train")
lora = LoraConfig(target_modules=linear_names(model))
pruning = LoraPruneCallback(prune)
trainer = Trainer(model, teacher, args, train_dataset=rows, peft_config=lora, callbacks=[pruning])
trainer.train(resume_from_checkpoint=pruning.resume(trainer.model))
if trainer.is_fsdp_enabled:  # of a SHARDED_STATE_DICT the Trainer would save no adapter
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model()  # the adapter
pruning.save_base(f"{args.output_dir}/base", args.output_dir)  # the adapter now names this base
pruning.save_model(f"{args.output_dir}/model")  # with LoRA merged
