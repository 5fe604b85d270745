"""Trains, in a moment, tokenizers of the kinds that GGUF files hold."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraprune_ds.files import write_json

TRAINING_TEXT = [
    f"the import statement defines {i} names, isn't it, in one two  three\n\tlines"
    for i in range(400)
]
TEXTS = [
    "The  import statement\n\tdef f(x): return 2024 + x",
    " lead and trail  ",
    "it's 3.14159, names' defined; don't ünïcode 日本 हिन्दी 🙂",
    "a\n\n\n b\t\tc",
    "x",
]
SPECIAL = ("<unk>", "<s>", "</s>")
SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits text into words by a pattern, as published tokenizers do before they merge bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": SMOLLM,
    "llama-bpe": split_by(rf"{ENDINGS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{AFTER}"),
    "qwen2": split_by(rf"{ENDINGS}|{BEFORE}\p{{L}}+|\p{{N}}|{AFTER}"),
    "qwen35": split_by(
        rf"{ENDINGS}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": split_by(
        rf"{BEFORE}{UPPER}*{LOWER}+{ENDINGS}?|{BEFORE}{UPPER}+{LOWER}*{ENDINGS}?|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def byte_level_tokenizer(
    folder: Path, vocab: int, pre: str = "gpt-2", *, bos: bool = False
) -> Path:
    """Makes a byte-level BPE tokenizer of fewer than `vocab` tokens. Some are added, one of them not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 8,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("statement names", normalized=False)])
    unk, begin, end = SPECIAL
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=begin, eos_token=end
    )
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    return folder


# As LLaMA's was trained. Its ids of <unk>, <s> and </s> are sentencepiece's defaults.
SENTENCEPIECE: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "minloglevel": 2,
}
SENTENCEPIECE |= {"remove_extra_whitespaces": False}


def sentencepiece_tokenizer(
    folder: Path, vocab: int, model_type: str = "bpe", **changes: Any
) -> Path:
    """Makes a folder that has LLaMA's kind of tokenizer.model and no tokenizer.json."""
    folder.mkdir()
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(line.replace("\n", " ") for line in TRAINING_TEXT))
    files = {"input": str(text), "model_prefix": str(folder / "tokenizer")}
    settings = (
        SENTENCEPIECE
        | {"vocab_size": vocab, "model_type": model_type, "hard_vocab_limit": False}
        | changes
    )
    sentencepiece.SentencePieceTrainer.train(**files, **settings)
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def unigram_tokenizer(folder: Path, vocab: int) -> Path:
    """Makes a folder with T5's spiece.model alone, as an mT5 has it. Ten more tokens mark gaps in a text."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "byte_fallback": False}
    ids |= {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    sentencepiece_tokenizer(folder, vocab - 10, "unigram", **ids)
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10}
    )
    return folder


def without_sentencepiece(folder: Path, vocab: int) -> Path:
    """Makes such a tokenizer in `spm` beside the folder, and saves it as transformers 5 does, as tokenizer.json."""
    AutoTokenizer.from_pretrained(
        sentencepiece_tokenizer(folder.with_name("spm"), vocab)
    ).save_pretrained(folder)
    return folder


def value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


# llama.cpp wants certain tokens of a model that is named phi3.
PHI3 = "phi_3"
