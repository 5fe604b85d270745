"""The names of all files that a copy of a model's folder may contain."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from loraprune_ds.files import read_json, write_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
DOCUMENTS = ("README.md", *(f"{name}{end}" for name in LEGAL for end in ("", ".md", ".txt")))
AUTO_MAP = "auto_map"  # the key by which a JSON file names classes in the folder's code


def named_files(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yields the files with these names, links included: the hub's cache has only links."""
    for pattern in patterns:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def copy_named(source: Path, out: Path, patterns: Sequence[str]) -> None:
    for path in named_files(source, patterns):
        shutil.copyfile(path, out / path.name)


def drop_auto_maps(folder: Path) -> None:
    """Removes `auto_map` from the settings of tokenizer and processors, because their code is not copied."""
    for path in named_files(folder, (TOKENIZER_CONFIG, *PROCESSOR_FILES)):
        settings = read_json(path)
        if settings.pop(AUTO_MAP, None) is not None:
            write_json(path, settings)
