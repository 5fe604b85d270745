"""Quantises a pruned model to 4 bits per weight, for vLLM, by llm-compressor's GPTQ in a separate environment.

python launch/examples/quantise.py runs/mine/model text.txt mine-w4a16 --group-size 64
"""

import argparse
import json
import math
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a stock model")
    parser.add_argument("text", type=Path, help="text to calibrate on, similar to the tuning text")
    parser.add_argument("out", help="folder of the result")
    parser.add_argument(
        "--group-size", type=int, default=128, help="weights per scale; must divide all widths"
    )
    parser.add_argument("--samples", type=int, default=256, help="windows to calibrate on")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    return parser.parse_args()


def check_files(model: Path, text: Path) -> None:
    """Refuses what llm-compressor cannot quantise, before its slow imports."""
    for path in (model / "config.json", text):
        if not path.is_file():
            sys.exit(f"error: {path} does not exist")
    if "auto_map" in json.loads((model / "config.json").read_text()):
        sys.exit(
            f"error: {model} has layers of different widths, or no stock class; prune with prune.ranking=uniform"
        )


def main() -> None:
    arguments = parse_arguments()
    check_files(arguments.model, arguments.text)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.nn import Linear
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", trust_remote_code=False
    )
    size, window = arguments.group_size, arguments.window
    for width in sorted(
        {
            module.in_features
            for module in model.model.layers.modules()
            if isinstance(module, Linear)
        }
    ):
        if width % size:
            sys.exit(
                f"error: --group-size {size} does not divide a width of {width}; try {math.gcd(width, size)}"
            )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    tokens = tokenizer(arguments.text.read_text()).input_ids[: arguments.samples * window]
    windows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]
    if not windows:
        sys.exit(
            f"error: {arguments.text} has {len(tokens)} tokens, less than one --window of {window}"
        )
    data = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * window] * len(windows)}
    )

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    gptq = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=data,
        recipe=gptq,
        num_calibration_samples=len(windows),
        max_seq_length=window,
    )
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
