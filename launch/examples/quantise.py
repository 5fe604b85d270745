"""Quantises a pruned model to 4 bits per weight, for vLLM: llm-compressor's GPTQ, in an environment of its own.

python launch/examples/quantise.py runs/mine/model text.txt mine-w4a16 --group-size 64
"""

import argparse
import math
import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.nn import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a stock model")
parser.add_argument("text", type=Path, help="text to calibrate on, like that of the tuning")
parser.add_argument("out", help="folder of the result")
parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale; must divide all widths")
parser.add_argument("--samples", type=int, default=256, help="windows to calibrate on")
parser.add_argument("--window", type=int, default=512, help="tokens of a window")
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
for width in sorted({module.in_features for module in model.model.layers.modules() if isinstance(module, Linear)}):
    if width % arguments.group_size:
        best = math.gcd(width, arguments.group_size)
        sys.exit(f"error: --group-size {arguments.group_size} does not divide a width of {width}; try {best}")
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokens = tokenizer(arguments.text.read_text()).input_ids[: arguments.samples * arguments.window]
windows = [tokens[i : i + arguments.window] for i in range(0, len(tokens) - arguments.window + 1, arguments.window)]
data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})

weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=arguments.group_size)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
gptq = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe=gptq, num_calibration_samples=len(windows), max_seq_length=arguments.window)
model.save_pretrained(arguments.out, save_compressed=True)
tokenizer.save_pretrained(arguments.out)
