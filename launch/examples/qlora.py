"""Prunes while TRL's SFTTrainer tunes by QLoRA, on a base in 4 bits: loraprune_ds/hf/README.md."""

from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from loraprune_ds import LoraPruneCallback, PruneConfig, linear_names

parser = HfArgumentParser((PruneConfig, SFTConfig))
prune, args, (model, data) = parser.parse_args_into_dataclasses(return_remaining_strings=True)
args.model_init_kwargs = {"dtype": "bfloat16"}
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="bfloat16",
)
pruning = LoraPruneCallback(prune)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(target_modules=linear_names(model)),
    quantization_config=four_bits,
    callbacks=[pruning],
)
trainer.train(resume_from_checkpoint=pruning.resume(trainer.model))
pruning.save_model(f"{args.output_dir}/model")  # in bfloat16, with LoRA merged
