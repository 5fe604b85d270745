"""The vocabulary of a Hugging Face tokenizer as llama.cpp wants it: byte-level BPE with merges, or sentencepiece."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model.tokenizer import SENTENCEPIECE_FILE

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer cuts text into words before it merges -> llama.cpp's name of that (llama-vocab.cpp).
PRE_TOKENIZERS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (LLAMA3_PATTERN, "bytes"): "llama-bpe",
    (TEKKEN_PATTERN, "bytes"): "tekken",
}
SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType.BPE
FORMATS_LEFT = "formats that can: hf, adapter"


@dataclass
class Vocabulary:
    """Tokens by id, before those that were added later.

    Attributes:
        model, pre: llama.cpp's names of the algorithm and of its way to cut text into words.
        scores: sentencepiece only; a pair with a higher score merges first.
        merges: byte-level BPE only, `left right`, first come first.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Reads `tokenizer.json` or `tokenizer.model`.

    Raises:
        UserError: the tokenizer works in a way that llama.cpp cannot be told.
    """
    path = folder / "tokenizer.json"
    fast = read_json(path) if path.is_file() else {}
    pre_tokenizer = _steps(fast.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in pre_tokenizer):
        return _byte_level(fast, pre_tokenizer, path)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return _sentencepiece(folder / SENTENCEPIECE_FILE)
    if fast.get("model", {}).get("byte_fallback"):
        return _sentencepiece_from_merges(fast, path)
    raise UserError(f"{folder}: its tokenizer is neither byte-level BPE nor sentencepiece; {FORMATS_LEFT}")


def _steps(part: dict[str, Any] | None, of_sequence: str) -> list[dict[str, Any]]:
    """The elements of a pipeline, which is one, several in a `Sequence`, or none."""
    if part is None:
        return []
    return part[of_sequence] if part["type"] == "Sequence" else [part]


def _byte_level(fast: dict[str, Any], pre_tokenizer: list[dict[str, Any]], path: Path) -> Vocabulary:
    signature = tuple(_describe(step) for step in pre_tokenizer)
    if fast["model"]["type"] != "BPE" or signature not in PRE_TOKENIZERS or _steps(fast["normalizer"], "normalizers"):
        raise UserError(f"{path}: llama.cpp has no name for the way this tokenizer prepares text; {FORMATS_LEFT}")
    tokens = _by_id(fast["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"]]
    types = [int(TokenType.NORMAL)] * len(tokens)
    return Vocabulary("gpt2", PRE_TOKENIZERS[signature], tokens, types, merges=merges)


def _describe(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer, as PRE_TOKENIZERS spells it."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return json.dumps(step)


def _by_id(vocabulary: dict[str, int]) -> list[str]:
    """Tokens in the order of their ids; the ids of added tokens, which come after, may leave no hole before them."""
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _sentencepiece(path: Path) -> Vocabulary:
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise UserError(f"{path}: only sentencepiece models of type BPE, as LLaMA's, fit llama.cpp; {FORMATS_LEFT}")
    pieces = model.pieces
    # The numbers of sentencepiece's piece types are llama.cpp's token types.
    types = [piece.type for piece in pieces]
    return Vocabulary("llama", "default", [piece.piece for piece in pieces], types, [piece.score for piece in pieces])


def _sentencepiece_from_merges(fast: dict[str, Any], path: Path) -> Vocabulary:
    """A sentencepiece model of which only transformers' conversion to merges is left.

    The conversion lists every pair of tokens that makes a token, best token first, so a token's score is its place.
    """
    tokens, added = _by_id(fast["model"]["vocab"]), {token["content"] for token in fast["added_tokens"]}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in fast["model"]["merges"]]
    made = [left + right for left, right in merges]
    places = {token: float(-place) for place, token in reversed(list(enumerate(made)))}
    in_one_go = 1 + sum(a != b for a, b in pairwise(made)) == len(places)
    if not in_one_go or not _all_pairs(set(tokens) - added) <= set(merges):
        raise UserError(f"{path}: its merges are not those of a sentencepiece model; {FORMATS_LEFT}")
    types = [_type_of(token, fast["model"].get("unk_token")) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, [places.get(token, float(-len(merges))) for token in tokens])


def _all_pairs(tokens: set[str]) -> set[tuple[str, ...]]:
    splits = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    return {(left, right) for left, right in splits if left in tokens and right in tokens}


def _type_of(token: str, unknown: str | None) -> int:
    if token == unknown:
        return int(TokenType.UNKNOWN)
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)
