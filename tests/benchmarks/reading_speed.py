"""Times a prompt and greedy tokens at batch size 1. Models take turns, so other work slows all of them equally."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROUND = {"prompt": 2048, "generated": 16, "rounds": 10}


def measure_speed(models: Sequence[PreTrainedModel]) -> list[dict[str, Any]]:
    """Returns tokens per second for each model, medians over the rounds after a warm-up."""
    vocabulary = min(int(model.config.vocab_size) for model in models)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, ROUND["prompt"]), generator=generator)
    rounds = [[_round(model, prompt) for model in models] for _ in range(ROUND["rounds"] + 1)]
    speeds = []
    for of_model in zip(*rounds[1:], strict=True):
        prefill, decode = (statistics.median(seconds) for seconds in zip(*of_model, strict=True))
        speeds.append(
            {
                "prefill_tokens_per_second": ROUND["prompt"] / prefill,
                "decode_tokens_per_second": ROUND["generated"] / decode,
            }
        )
    return speeds


@torch.no_grad()
def _round(model: Any, prompt: Tensor) -> tuple[float, float]:
    """Reads `prompt` (1, tokens), then writes. Returns the seconds of both."""
    begin = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(ROUND["generated"]):
        token_ids = output.logits.argmax(-1)  # (1, 1)
        output = model(input_ids=token_ids, past_key_values=output.past_key_values)
    return middle - begin, time.perf_counter() - middle
