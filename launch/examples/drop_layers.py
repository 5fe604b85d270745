"""Drops the layers that change a model's hidden states least, one after another: launch/configs/README.md.

python launch/examples/drop_layers.py path/to/llama text.txt path/to/smaller 3
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds import drop_layers

WINDOW, WINDOWS = 512, 64  # tokens of a window, and how many are read

name, text, out, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = (
    AutoModelForCausalLM.from_pretrained(name)
    .to("cuda" if torch.cuda.is_available() else "cpu")
    .eval()
)
tokens = (
    tokenizer(Path(text).read_text(), return_tensors="pt")
    .input_ids[:, : WINDOW * WINDOWS]
    .to(model.device)
)
# of the layers that are left, in the whole model
numbers = list(range(model.config.num_hidden_layers))
for _ in range(int(count)):
    # the last state is normalised, so the last layer stays
    influence = torch.zeros(len(numbers) - 1)
    for window in tokens.split(WINDOW, dim=1):
        with torch.no_grad():
            states = model(window, output_hidden_states=True, use_cache=False).hidden_states
        changes = [
            1 - cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairwise(states[:-1])
        ]
        influence += torch.stack([change.sum() for change in changes]).cpu()
    least = 1 + int(influence[1:].argmin())  # the first layer stays, too
    drop_layers(model, [least])
    print(f"drops layer {numbers.pop(least)}")
model.save_pretrained(out)
tokenizer.save_pretrained(out)
