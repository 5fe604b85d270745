"""What the examples are started with."""

import json
from pathlib import Path

DS_CONFIG = "ds_configs/zero3.json"
OPTIONS = f"""--ratio 0.3 --prune_every 2 --max_steps 5 --deepspeed {DS_CONFIG} --use_cpu true --bf16 false
--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3
--report_to tensorboard --logging_steps 1 --save_strategy no --disable_tqdm true"""
ALONE = OPTIONS.replace(f"--deepspeed {DS_CONFIG} ", "")
WORDS = "the cat sat on a mat while it rained and the dog ran home".split()


def write_rows(path: Path, fields: tuple[str, ...]) -> Path:
    def sentence(i: int) -> str:
        return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))

    rows = ({field: sentence(3 * i + j) for j, field in enumerate(fields)} for i in range(16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
