"""Checks the READMEs against the repository. They name links, paths, commands, functions and settings."""

import ast
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loraprune_ds
from loraprune_ds.config import RunConfig
from loraprune_ds.export.gguf_architecture import ARCHITECTURES
from loraprune_ds.files import read_json
from tests.integration.heavy.families import VLLM
from tests.integration.heavy.results import FILE
from tests.support import family_table
from tests.support.gguf_cases import PHI3
from tests.support.launching import ROOT

PACKAGE = ROOT / "loraprune_ds"
FOLDERS = [ROOT / name for name in ("ds_configs", "launch", PACKAGE.name, "slurm", "tests")]
FIRST = ROOT / "README.md"
READMES = [FIRST, *sorted(path for folder in FOLDERS for path in folder.rglob("*.md"))]
MOST_LINES, MOST_WORDS = 150, 1200  # of the first README
MOST_WORDS_OF_ALL = 14_000  # somebody reads them who wants to start
MOST_FILES, MOST_CODE = 8, 1600  # files and lines of its tour
CODE_FILES = (".py", ".sh", ".sbatch")
MADE_BY_RUNS = {"runs"}  # not in the repository, though it may lie in a checkout

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
PATH = re.compile(r"\.?\w[\w.-]*(/[\w.-]+)*/?")
# 1. [`file.py`](link): `names` in it
WALK = re.compile(r"^\d+\. \[`[^`]+`\]\(([^)]+\.py)\): (.+)$", re.MULTILINE)
ROW = re.compile(r"^\| `([\w.]+)` \| `?([^|`]*?)`? \| .+ \|$", re.MULTILINE)


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def spans(text: str) -> list[str]:
    """Finds inline code, outside of code blocks."""
    return SPAN.findall(FENCE.sub("", text))


def shell_lines(text: str) -> list[str]:
    """Finds the commands of shell blocks, and all inline code."""
    blocks = [
        body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language == "bash"
    ]
    return [
        re.sub(r"(^|\s)#.*", "", line) for block in blocks for line in block.splitlines()
    ] + spans(text)


def anchors(text: str) -> set[str]:
    """Builds the names that GitHub gives to headings."""
    found: list[str] = []
    for heading in HEADING.findall(FENCE.sub("", text)):
        name = re.sub(r"[^\w -]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def broken_links(readme: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        file, _, anchor = target.partition("#")
        path = readme.parent / file if file else readme
        if "://" in target:
            continue
        if not path.exists():
            yield f"no file {target}"
        elif anchor and anchor not in anchors(text if path == readme else path.read_text()):
            yield f"no heading {target}"


def wrong_paths(readme: Path, text: str) -> Iterator[str]:
    """Finds paths that lead nowhere, from the checkout, the package or the README."""
    bases = (ROOT, PACKAGE, readme.parent)
    names = {
        path.name for folder in FOLDERS for path in folder.rglob("*") if path.suffix in CODE_FILES
    }
    for word in (word.strip("\"',;:()") for line in shell_lines(text) for word in line.split()):
        first = word.split("/")[0]
        if not PATH.fullmatch(word) or first in MADE_BY_RUNS:
            continue
        is_ours = word.endswith(CODE_FILES) or any((base / first).exists() for base in bases)
        if "/" in word and is_ours and not any((base / word).exists() for base in bases):
            yield f"no path {word}"
        if "/" not in word and word.endswith(CODE_FILES) and word not in names:
            yield f"no file is called {word}"


def wrong_commands(readme: Path, text: str) -> Iterator[str]:
    """Finds modules of `python -m` that do not exist. wrong_paths finds scripts."""
    for line in shell_lines(text):
        yield from (
            f"no module {name}"
            for name in re.findall(r"\bpython3? -m ([\w.]+)", line)
            if not is_module(name)
        )


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def wrong_imports(readme: Path, text: str) -> Iterator[str]:
    """Finds names that pages import and users should not, or cannot."""
    for module, names in re.findall(r"\bfrom (loraprune_ds[\w.]*) import ([\w, ]+)", text):
        public = loraprune_ds.__all__ if module == PACKAGE.name else ()
        yield from (
            f"no public name {name} in {module}"
            for name in names.split(", ")
            if name.strip() not in public
        )


def defined_names(path: Path) -> set[str]:
    """Lists classes and functions of a file. Methods count with and without their class."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            names |= {node.name, *methods, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def wrong_names(readme: Path, text: str) -> Iterator[str]:
    """Finds names that a walk through the code puts into the wrong file."""
    for link, rest in WALK.findall(text):
        path = readme.parent / link
        known = defined_names(path) if path.is_file() else set()
        yield from (f"no {name} in {link}" for name in SPAN.findall(rest) if name not in known)


def defaults(config: Any = RunConfig, prefix: str = "") -> dict[str, str]:
    """Finds the default of every setting, as YAML has it."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            found |= defaults(field.type, f"{field.name}.")
        elif field.default is dataclasses.MISSING:
            found[prefix + field.name] = "required"
        else:
            found[prefix + field.name] = json.dumps(field.default).strip('"')
    return found


def unknown_settings(readme: Path, text: str) -> Iterator[str]:
    sections = "|".join({key.split(".")[0] for key in defaults() if "." in key})
    for line in shell_lines(text):
        for key, suffix in re.findall(rf"(?<![\w./])((?:{sections})\.(\w+))(?=$|[=:\s])", line):
            if key not in defaults() and suffix not in ("py", "sbatch", "json", "yaml"):
                yield f"no setting {key}"


CHECKS = (broken_links, wrong_paths, wrong_commands, wrong_imports, wrong_names, unknown_settings)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("readme", READMES, ids=label)
def test_a_readme_names_what_exists(
    readme: Path, check: Callable[[Path, str], Iterator[str]]
) -> None:
    assert list(check(readme, readme.read_text())) == []


def test_the_first_readme_is_short_and_shows_settings_and_files() -> None:
    text = FIRST.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS
    files = {ROOT / link for link, _ in WALK.findall(text)}
    assert 0 < len(files) <= MOST_FILES
    assert sum(len(path.read_text().splitlines()) for path in files) <= MOST_CODE
    rows = dict(ROW.findall(text))
    assert rows
    assert rows.items() <= defaults().items()


def test_all_pages_can_be_read() -> None:
    assert sum(len(page.read_text().split()) for page in READMES) <= MOST_WORDS_OF_ALL


def test_llama_cpp_and_vllm_were_asked_about_every_family_that_the_table_says_they_serve() -> None:
    said = read_json(FILE)
    llama_cpp, vllm = (
        {row["case"] for row in said[tool]["rows"]} for tool in ("llama.cpp", "vllm")
    )
    assert {PHI3 if family == "phi3" else family for family in ARCHITECTURES} <= llama_cpp
    # vLLM served these in a run whose rows were not kept.
    assert VLLM.keys() - {"cwm", "hyperclovax", "vaultgemma"} <= vllm


def test_the_table_of_families_is_generated() -> None:
    text = family_table.PAGE.read_text()
    assert family_table.with_table(text) == text, f"run python -m {family_table.__name__}"
