"""The tokenizer of a checkpoint, written into a GGUF file: it reads there what transformers reads from the folder."""

from pathlib import Path

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_vocabulary import FORMATS_LEFT, Vocabulary, read_vocabulary
from loraprune_ds.model.tokenizer import load_tokenizer

PROBE = "a"
SPACE = "▁"  # sentencepiece's
ADDED_SCORE = -1000.0  # never merged into


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Writes tokens, special tokens and chat template of the tokenizer in `folder`.

    Args:
        vocab_size: rows of the embedding; ids that no text gives are filled up.

    Raises:
        UserError: there is no tokenizer, or it does something that llama.cpp cannot be told.
    """
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder)
    _put_added_tokens(vocabulary, tokenizer)
    _fill(vocabulary, folder, vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    _add_special_tokens(writer, tokenizer)
    _add_habits(writer, tokenizer, folder)


def _put_added_tokens(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens that are found in a text before anything else is done with it."""
    for index, added in sorted(tokenizer.added_tokens_decoder.items()):
        while len(vocabulary.tokens) <= index:
            _append_unused(vocabulary)
        if vocabulary.types[index] == TokenType.UNKNOWN:
            continue
        # llama.cpp compares with the text as it is, where sentencepiece has put its own kind of space.
        content = added.content if added.special else added.content.replace(SPACE, " ")
        vocabulary.tokens[index] = content
        vocabulary.types[index] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        if vocabulary.scores:
            vocabulary.scores[index] = ADDED_SCORE


def _fill(vocabulary: Vocabulary, folder: Path, vocab_size: int) -> None:
    if len(vocabulary.tokens) > vocab_size:
        raise UserError(f"{folder}: its tokenizer has {len(vocabulary.tokens)} tokens, its model only {vocab_size}")
    while len(vocabulary.tokens) < vocab_size:
        _append_unused(vocabulary)


def _append_unused(vocabulary: Vocabulary) -> None:
    vocabulary.tokens.append(f"[PAD{len(vocabulary.tokens)}]")
    vocabulary.types.append(int(TokenType.UNUSED))
    if vocabulary.model == "llama":
        vocabulary.scores.append(ADDED_SCORE)


def _add_special_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if isinstance(index, int):
            add(index)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_habits(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What the tokenizer puts around every text, seen by what it does: its settings say it in too many ways."""
    plain = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE).input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise UserError(f"{folder}: its tokenizer puts more than one BOS and EOS around a text; {FORMATS_LEFT}")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    writer.add_add_space_prefix(str(tokenizer.convert_ids_to_tokens(plain)[0]).startswith(SPACE))
