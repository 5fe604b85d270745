"""Prints what the dense and the pruned model of launch/quickstart.sh answer, side by side.

python launch/quickstart_answers.py runs/quickstart
"""

import os
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

PROMPTS = (
    "Give three tips for falling asleep faster.",
    "What is the capital of France? Answer in one sentence.",
    "Write a Python function that returns the square of a number.",
)
TOKENS, WIDTH = 64, 48  # of an answer, of a column


def greedy_answer(model: Any, tokenizer: Any, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True).strip() + " ..." * (len(made) == TOKENS)


def side_by_side(*texts: str) -> str:
    columns = [[part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH) or [""]] for text in texts]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(f"{cell:<{WIDTH}}" for cell in row).rstrip() for row in rows)


def main() -> None:
    # These take seconds to import, which `side_by_side` does not need.
    import torch
    from transformers.utils import logging

    from loraprune_ds import open_result
    from loraprune_ds.evaluate.models import find_model, load_model
    from loraprune_ds.ranks.device import fast_half_products

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = Path(sys.argv[1])
    result: Any = open_result(folder)
    config, tokenizer = result.report["config"]["model"], result.load_tokenizer()
    if not tokenizer.chat_template:
        return
    named = (config["path"], str(folder))
    models: list[Any] = [load_model(find_model(name), config["dtype"], torch.device("cpu")) for name in named]
    print("\n" + side_by_side("dense", "pruned"))
    for prompt in PROMPTS:
        with fast_half_products(config["dtype"]):
            texts = [greedy_answer(model, tokenizer, prompt) for model in models]
        print(f"\n> {prompt}\n{side_by_side(*texts)}", flush=True)
    print(f"\nAll answers: python launch/evaluate.py {folder} --dense {config['path']} --answers --page answers.html")


if __name__ == "__main__":
    main()
