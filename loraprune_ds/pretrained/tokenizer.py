"""Loads the tokenizer of a pretrained model, old or new."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.classes import config_class
from loraprune_ds.model.families.base import PRUNED, Family
from loraprune_ds.pretrained.weight_files import AUTO_MAP, TOKENIZER_CONFIG

RENDERING = 10.0  # seconds that a chat template may take for a conversation
SENTENCEPIECE_FILE = "tokenizer.model"
T5_SENTENCEPIECE_FILE = "spiece.model"
LLAMA_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def has_tokenizer(folder: Path) -> bool:
    return _has_any(folder, "tokenizer.json", SENTENCEPIECE_FILE, "vocab.json")


def has_sentencepiece_alone(folder: Path) -> bool:
    """Tells whether a folder's tokenizer is in the format of sentencepiece alone."""
    has_sentencepiece = _has_any(folder, SENTENCEPIECE_FILE, T5_SENTENCEPIECE_FILE)
    return has_sentencepiece and not _has_any(folder, "tokenizer.json")


def _has_any(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder, possibly from LLaMA's sentencepiece file alone."""
    has_sentencepiece = (folder / SENTENCEPIECE_FILE).is_file()
    has_json = (folder / "tokenizer.json").is_file()
    load = _load_llama if has_sentencepiece and not has_json else _load_auto
    try:
        tokenizer = load(folder)
    except UserError:
        raise
    except Exception as error:  # the Rust library below raises bare Exception
        raise UserError(f"{folder} has no readable tokenizer: {one_line(error)}") from error
    # transformers silently makes an empty tokenizer from some damaged files.
    ids: Any = tokenizer("text", add_special_tokens=False)["input_ids"]
    require(ids, f"{folder}: its tokenizer has no vocabulary")
    return tokenizer


class Starts(NamedTuple):
    """Names ids that a model needs at the start of a text, and that its tokenizer does not add."""

    window: int | None = None  # replaces the first token of each window, which is never predicted
    target: int | None = None  # first token of a decoder after an encoder. None without an encoder


def text_starts(tokenizer: PreTrainedTokenizerBase, family: Family, config: JsonObject) -> Starts:
    bos: Any = tokenizer.bos_token_id if family.windows_begin_with_bos else None
    target = target_start(config) if family.has_encoder else None
    return Starts(bos, target)


def target_start(config: JsonObject) -> int:
    """Returns the first input of a decoder: padding, unless another token is named."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        if config.get(name) is not None:
            return config[name]
    return 0


def tokenize_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, start: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the ids of each prompt and of its answer with EOS. Separate tokenising keeps tokens from spanning both.

    An encoder reads the EOS of its prompt, and the decoder's text begins with `start`, then with the tokenizer's BOS if
    it adds one, as CodeT5 was trained.
    """
    eos = eos_id(tokenizer)
    end = "" if start is None else str(tokenizer.eos_token or "")
    prompts = token_ids([prompt for prompt, _ in pairs], tokenizer, special=True)
    texts = [answer.removesuffix(end) for _, answer in pairs]
    answers = token_ids(texts, tokenizer, special=start is not None)
    for prompt, answer in zip(prompts, answers, strict=True):
        if start is not None:
            prompt = [*prompt, start]
        elif eos is not None and prompt[-1:] == [eos]:  # the tokenizer has added EOS
            prompt = prompt[:-1]
        if eos is not None and answer and answer[-1] != eos:  # a chat template may have added EOS
            answer = [*answer, eos]
        yield prompt, answer


def check_ids(largest: int, vocab_size: int, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raises UserError if the `largest` id of a text has no row in the embedding. A tokenizer may have more ids."""
    source = f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
    require(
        largest < vocab_size,
        f"{text}: the tokenizer{source} gives id {largest}, but the model's vocab_size is {vocab_size}",
    )


def token_ids(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    eos = tokenizer.eos_token_id
    assert eos is None or isinstance(eos, int)
    return eos


def begin_with(windows: Tensor, start: int | None) -> Tensor:
    """Returns windows (count, window) of token ids with `start` as their first, unless it is None."""
    if start is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = start
    return windows


@contextmanager
def rendering(where: str, name: str, messages: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Raises a UserError if the chat template of `name` fails, or takes longer than RENDERING."""
    try:
        with _time_limit(RENDERING):
            yield
    except Exception as error:  # a template can hold any code
        roles = ", ".join(message["role"] for message in messages)
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{where}: the chat template of {name} refuses a conversation of {roles}: {reason}; "
            f"it begins with {messages[0].get('content')!r:.60}"
        ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in Python code that takes longer. Only works in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _load_auto(folder: Path) -> PreTrainedTokenizerBase:
    model_type: str = read_json(folder / "config.json", missing_ok=True).get("model_type") or ""
    if model_type.startswith(PRUNED):  # AutoTokenizer must know it
        AutoConfig.register(model_type, config_class(model_type), exist_ok=True)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
    raise UserError(
        f"{folder}: its tokenizer is code in the folder, which is never run; "
        f"save it as tokenizer.json and remove {AUTO_MAP} from {TOKENIZER_CONFIG}"
    )


def _load_llama(folder: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer from tokenizer.model alone. AutoTokenizer would omit the BOS that LLaMA needs."""
    try:  # transformers would read a damaged file as a tiktoken file
        SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    except RuntimeError as error:
        raise UserError(f"{folder / SENTENCEPIECE_FILE} is damaged: {error}") from None
    stored = read_json(folder / TOKENIZER_CONFIG, missing_ok=True)
    settings: JsonObject = {"add_bos_token": stored.get("add_bos_token") is not False}
    for key, token in LLAMA_SPECIAL_TOKENS.items():
        # Early conversions of LLaMA have empty names, which make transformers recurse without end.
        if stored.get(key) == "":
            settings[key] = token
    return LlamaTokenizer.from_pretrained(folder, **settings)
