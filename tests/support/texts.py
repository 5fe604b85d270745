"""Makes texts, tokenizers and data files for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def numbers(*indices: int) -> Tensor:
    return torch.tensor(indices)


BOS, EOS = 1, 2
WORDS = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": 10 + i for i in range(1, 60)}


def make_tokenizer(*, template: str = "$A", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token per word: w1 is 11, w2 is 12, ..."""
    core = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last + 1))


WINDOW = 4


def write_json(path: Path, rows: list[Any]) -> Path:
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


def documents(count: int) -> list[dict[str, str]]:
    """Document i is the word w(i+1), four times; all are of one length."""
    return [{"text": f"w{i + 1}".ljust(4) * WINDOW} for i in range(count)]


INPUTS = [f"w{i + 20}" if i % 2 == 0 else "" for i in range(10)]
INSTRUCTIONS = [
    {"instruction": f"w{i}", "input": x, "response": "w50"} for i, x in enumerate(INPUTS)
]
