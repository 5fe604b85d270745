"""Speed of models at batch size 1: prefill and decode of one sequence, by torch.

The models take turns in every round, so other work on the machine slows all of them equally.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaForCausalLM, PreTrainedModel

from loraprune_ds.evaluate.settings import SpeedSettings
from loraprune_ds.zero.device import accelerator, is_cpu

# transformers renamed this argument within the range that pyproject.toml allows.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
Round = tuple[float, float, int | None]  # seconds of prefill and of decode, and the peak in bytes


@dataclass(frozen=True)
class Speed:
    """Medians of one model over the rounds."""

    prefill_tokens_per_second: float  # of a prompt in one pass, with logits of its last token only
    decode_tokens_per_second: float  # of tokens written one by one after the prompt, with a key-value cache
    peak_bytes: int | None  # largest device memory beyond the weights. None on a CPU


def measure_speed(models: Sequence[PreTrainedModel], settings: SpeedSettings) -> list[Speed]:
    """Returns one result per model."""
    vocabulary = min(int(model.config.vocab_size) for model in models)
    prompt = torch.randint(vocabulary, (1, settings.prompt), generator=torch.Generator().manual_seed(0))
    rounds = [[_run(model, prompt, settings.generated) for model in models] for _ in range(settings.rounds + 1)]
    speeds: list[Speed] = []
    for of_model in zip(*rounds[1:], strict=True):  # the first is a warm-up
        prefill, decode, peaks = zip(*of_model, strict=True)
        rates = settings.prompt / statistics.median(prefill), settings.generated / statistics.median(decode)
        speeds.append(Speed(*rates, max((peak for peak in peaks if peak is not None), default=None)))
    return speeds


@torch.no_grad()
def _run(model: PreTrainedModel, prompt: Tensor, generated: int) -> Round:
    """Runs one round: reads `prompt` (1, tokens) and writes `generated` tokens."""
    token_ids = prompt.to(model.device)
    before = None
    if not is_cpu():
        accelerator().reset_peak_memory_stats()
        before = accelerator().memory_allocated()
    times = [_now()]
    logits, read = _prefill(model, token_ids)
    times.append(_now())
    for _ in range(generated):
        logits = read(logits.argmax(-1))  # (1, 1, vocabulary)
    times.append(_now())
    peak = None if before is None else accelerator().max_memory_allocated() - before
    return times[1] - times[0], times[2] - times[1], peak


def _prefill(model: PreTrainedModel, token_ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Reads the prompt. Returns the last logits, and a function that reads further tokens into the same caches."""
    if not model.config.is_encoder_decoder:
        read = partial(model, use_cache=True, **{CACHE: DynamicCache(config=model.config)})
        return read(input_ids=token_ids, logits_to_keep=1).logits, lambda ids: read(input_ids=ids).logits
    own, of_source = (DynamicCache(config=model.get_decoder().config) for _ in range(2))
    given = {"encoder_outputs": model.get_encoder()(input_ids=token_ids), CACHE: EncoderDecoderCache(own, of_source)}
    read = partial(model, use_cache=True, **given)
    return read(decoder_input_ids=token_ids[:, :1]).logits, lambda ids: read(decoder_input_ids=ids).logits


def _now() -> float:
    """Returns the time once the device is idle, in seconds."""
    accelerator().synchronize()
    return time.perf_counter()
