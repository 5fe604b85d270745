"""Writes a tokenizer into a GGUF file, so that llama.cpp reads the same tokens as transformers.

llama.cpp has two kinds for our families: byte-level BPE with merges, and sentencepiece's BPE with scores.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_architecture import NotInGguf
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.pretrained.tokenizer import SENTENCEPIECE_FILE, load_tokenizer

# A name in llama-vocab.cpp -> the steps that split text into words before byte-level merges, as `_describe` names them.
# Such models have these regular expressions in their tokenizer.json.
PRE_TOKENIZERS = Path(__file__).with_name("gguf_pre_tokenizers.json")
# llama.cpp's own converter omits this step, too, for Qwen2 and similar models.
NOT_COMPOSED = (
    "llama.cpp does not compose letters and accents (Unicode NFC) before it tokenises a text"
)
SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType.BPE
SPACE = "▁"  # sentencepiece's
ADDED_SCORE = -1000.0  # never merged into
PROBE = "a"


@dataclass
class Vocabulary:
    """Tokens by id, at first without added ones."""

    model: str  # llama.cpp's name of the algorithm
    pre: str  # its name of the splitting into words
    tokens: list[str]
    types: list[int]
    # sentencepiece: pairs with higher scores merge first
    scores: list[float] = field(default_factory=list)
    # byte-level BPE: `left right`, in order of merging
    merges: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def fill(self, size: int) -> None:
        """Appends unused tokens up to `size`."""
        for index in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{index}]")
            self.types.append(TokenType.UNUSED)
            if self.scores:
                self.scores.append(ADDED_SCORE)


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> list[str]:
    """Writes tokens, special tokens and chat template of the tokenizer in `folder`. Returns remarks for the user.

    Args:
        vocab_size: rows of the embedding. Ids without a token get an unused one.
    """
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder)
    _put_added_tokens(vocabulary, tokenizer)
    if len(vocabulary.tokens) > vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(vocabulary.tokens)} tokens, but its model only {vocab_size}"
        )
    vocabulary.fill(vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    for key in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        index = getattr(tokenizer, key)
        if isinstance(index, int):
            getattr(writer, f"add_{key}")(index)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    _add_text_ends(writer, tokenizer, folder)
    return vocabulary.remarks


def read_vocabulary(folder: Path) -> Vocabulary:
    """Reads `tokenizer.json` or `tokenizer.model`. Raises UserError if llama.cpp cannot do the same."""
    path = folder / "tokenizer.json"
    fast = read_json(path, missing_ok=True)
    pre_tokenizer = _steps(fast.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in pre_tokenizer):
        return _byte_level(fast, pre_tokenizer, path)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return _sentencepiece(folder / SENTENCEPIECE_FILE)
    if fast.get("model", {}).get("byte_fallback"):
        return _sentencepiece_from_merges(fast, path)
    raise NotInGguf(folder, "its tokenizer is neither byte-level BPE nor sentencepiece")


def _put_added_tokens(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the added tokens. Both libraries first search a text for them."""
    for index, added in sorted(tokenizer.added_tokens_decoder.items()):
        vocabulary.fill(index + 1)
        if vocabulary.types[index] == TokenType.UNKNOWN:
            continue
        if added.special:
            vocabulary.tokens[index] = added.content
            vocabulary.types[index] = TokenType.CONTROL
        else:
            # llama.cpp compares with raw text, without sentencepiece spaces.
            vocabulary.tokens[index] = added.content.replace(SPACE, " ")
            vocabulary.types[index] = TokenType.USER_DEFINED
        if vocabulary.scores:
            vocabulary.scores[index] = ADDED_SCORE


def _add_text_ends(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes whether BOS and EOS surround every text. A probe shows that, because the settings have many forms."""
    plain = tokenizer(PROBE, add_special_tokens=False).input_ids
    complete = tokenizer(PROBE).input_ids
    size = len(plain)
    start = next((i for i in range(len(complete)) if complete[i : i + size] == plain), None)
    if start is None:
        raise NotInGguf(folder, "special tokens change how its tokenizer reads a text")
    before = complete[:start]
    after = complete[start + size :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise NotInGguf(folder, "its tokenizer puts more than one BOS and EOS around a text")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    first_token = str(tokenizer.convert_ids_to_tokens(plain)[0])
    writer.add_add_space_prefix(first_token.startswith(SPACE))


def _steps(part: JsonObject | None, of_sequence: str) -> list[JsonObject]:
    """Returns the steps of a pipeline of tokenizer.json, which may be one step, a `Sequence` or missing."""
    if part is None:
        return []
    return part[of_sequence] if part["type"] == "Sequence" else [part]


def _name_of(pre_tokenizer: list[JsonObject]) -> str | None:
    """Returns llama.cpp's name of a pre-tokenizer, if it has one."""
    steps = list(map(_describe, pre_tokenizer))
    for name, steps_of_name in read_json(PRE_TOKENIZERS).items():
        if steps_of_name == steps:
            return name
    return None


def _byte_level(fast: JsonObject, pre_tokenizer: list[JsonObject], path: Path) -> Vocabulary:
    model = fast["model"]
    pre = _name_of(pre_tokenizer)
    normalizer = [step["type"] for step in _steps(fast["normalizer"], "normalizers")]
    if model["type"] != "BPE" or pre is None or normalizer not in ([], ["NFC"]):
        raise NotInGguf(path, "llama.cpp has no name for the way this tokenizer prepares text")
    tokens, pairs = _tokens_and_merges(model)
    types: list[int] = [TokenType.NORMAL] * len(tokens)
    merges = [" ".join(pair) for pair in pairs]
    remarks = [NOT_COMPOSED] if normalizer else []
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, remarks=remarks)


def _describe(step: JsonObject) -> str:
    """Names a step of a pre-tokenizer. A split by a regular expression has the expression as its name."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }:
            return pattern
    return json.dumps(step)


def _tokens_and_merges(model: JsonObject) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the tokens by id, without gaps, and the pairs to merge, in order."""
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = model["merges"]
    if merges and isinstance(merges[0], str):  # an older file
        merges = [merge.split(" ", 1) for merge in merges]
    return tokens, [(left, right) for left, right in merges]


def _sentencepiece(path: Path) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2  # refuses an older protobuf

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise NotInGguf(path, "llama.cpp needs a sentencepiece model of type BPE, as LLaMA has")
    pieces = model.pieces
    # The numbers of sentencepiece's piece types are llama.cpp's token types.
    types = [piece.type for piece in pieces]
    return Vocabulary(
        "llama",
        "default",
        [piece.piece for piece in pieces],
        types,
        [piece.score for piece in pieces],
    )


def _sentencepiece_from_merges(fast: JsonObject, path: Path) -> Vocabulary:
    """Rebuilds a sentencepiece model from transformers' conversion to merges.

    The conversion lists every pair that makes a token, best token first, so a token's score is its place.
    """
    tokens, merges = _tokens_and_merges(fast["model"])
    results = [left + right for left, right in merges]
    places: dict[str, int] = {}  # of the best pair that makes a token
    for place, token in enumerate(results):
        places.setdefault(token, place)
    # The pairs of a token follow each other.
    changes = sum(a != b for a, b in pairwise(results))
    is_grouped = 1 + changes == len(places)
    has_every_pair = _all_pairs(fast, tokens) <= set(merges)
    if not is_grouped or not has_every_pair:
        raise NotInGguf(path, "its merges do not come from a sentencepiece model")
    unknown = fast["model"].get("unk_token")
    types = [_type_of(token, unknown) for token in tokens]
    scores = [float(-places.get(token, len(merges))) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores)


def _all_pairs(fast: JsonObject, tokens: list[str]) -> set[tuple[str, str]]:
    """Returns the pairs of tokens that make a token, apart from added tokens."""
    added = {token["content"] for token in fast["added_tokens"]}
    pieces = set(tokens) - added
    pairs = ((token[:i], token[i:]) for token in pieces for i in range(1, len(token)))
    return {pair for pair in pairs if pieces.issuperset(pair)}


def _type_of(token: str, unknown: str | None) -> int:
    if token == unknown:
        return TokenType.UNKNOWN
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL
