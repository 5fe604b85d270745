"""What the examples are started with."""

DS_CONFIG = "ds_configs/zero3.json"
OPTIONS = f"""--ratio 0.3 --prune_every 2 --max_steps 5 --deepspeed {DS_CONFIG} --use_cpu true --bf16 false
--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3
--report_to tensorboard --logging_steps 1 --save_strategy no --disable_tqdm true"""
ALONE = OPTIONS.replace(f"--deepspeed {DS_CONFIG} ", "")
WORDS = "the cat sat on a mat while it rained and the dog ran home".split()
