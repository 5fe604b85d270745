"""The tables of settings in launch/configs/README.md. A field's meaning is the comment behind it, or above it.

python -m tests.support.settings_table
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from loraprune_ds.config import RunConfig

PAGE = Path(__file__).parents[2] / "launch" / "configs" / "README.md"
# Rarely worth a change: their rows come last, below a row that says so.
ADVANCED = {
    *(
        f"prune.{key}"
        for key in (
            "normalize",
            "moving_average",
            "warmup_fraction",
            "cooldown_fraction",
            "head_ratio",
            "protected_first",
            "protected_last",
        )
    ),
    *(
        f"train.{key}"
        for key in ("adam_epsilon", "max_grad_norm", "distill_temperature", "deterministic")
    ),
    "evaluate.batch_size",
}
DIVIDER = "| *advanced* | | |\n"
HEADER = "| key | default | meaning |\n|---|---|---|\n"


class Setting(NamedTuple):
    """A row. `key` as in `--set`, `default` as in YAML."""

    key: str
    default: str
    meaning: str


def settings() -> dict[str, list[Setting]]:
    """Describes every setting, below the heading of its section."""
    fields = dataclasses.fields(RunConfig)
    sections: dict[str, Any] = {
        field.name: field.type for field in fields if dataclasses.is_dataclass(field.type)
    }
    top = [row for row in describe(RunConfig) if row.key not in sections]
    return {"The run": top} | {
        name: describe(section, f"{name}.") for name, section in sections.items()
    }


def describe(section: Any, prefix: str = "") -> list[Setting]:
    comments: dict[str, str] = {}
    for cls in section.__mro__[-2::-1]:  # from the first base class after `object`
        comments |= comments_of_fields(inspect.getsource(cls))
    return [
        Setting(
            prefix + field.name,
            default_of(field),
            meaning(comments[field.name], choices(field.type)),
        )
        for field in dataclasses.fields(section)
    ]


def comments_of_fields(source: str) -> dict[str, str]:
    """Finds the comment lines right above each field of a class, and the comment behind it."""
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    comments: dict[str, str] = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            first = field.lineno - 1
            behind = lines[(field.end_lineno or field.lineno) - 1][field.end_col_offset :]
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            parts = [*lines[first : field.lineno - 1], behind]
            comments[field.target.id] = " ".join(
                part.strip().removeprefix("# ") for part in parts
            ).strip()
    return comments


def choices(hint: Any) -> list[str]:
    """Lists the words that a type allows."""
    if get_origin(hint) is Literal:
        return [f"`{word}`" for word in get_args(hint)]
    return [word for part in get_args(hint) for word in choices(part)]


def meaning(comment: str, words: list[str]) -> str:
    """Makes sentences of a comment, in the words of YAML. The words that are allowed come first."""
    allowed = " or ".join([*filter(None, [", ".join(words[:-1])]), *words[-1:]])
    sentences = [
        text[:1].upper() + text[1:].removesuffix(".") + "." for text in (allowed, comment) if text
    ]
    return re.sub(r"`?\bNone\b`?", "`null`", " ".join(sentences))


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return in_words(field.default)
    return (
        "required"
        if field.default_factory is dataclasses.MISSING
        else in_words(field.default_factory())
    )


def in_words(default: Any) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def with_tables(page: str) -> str:
    """Replaces the first table below the heading of each section."""
    for name, rows in settings().items():
        lines = {row.key: f"| `{row.key}` | `{row.default}` | {row.meaning} |\n" for row in rows}
        plain, advanced = (
            [lines[key] for key in lines if (key in ADVANCED) == last] for last in (False, True)
        )
        table = "".join([HEADER, *plain, *([DIVIDER, *advanced] if advanced else [])])
        old = re.search(rf"^### {name}\n[^|#]*^((?:\|.*\n)+)", page, re.MULTILINE)
        assert old, f"no table below {name}"
        page = page[: old.start(1)] + table.replace("`required`", "required") + page[old.end(1) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
