"""A mutant: a function, a statement of it, and what stands there instead. Found by syntax, so lines may move."""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.launching import ROOT

FOLDER = Path(__file__).parent
BLOCKS = (ast.ClassDef, ast.FunctionDef)


class LostMutant(Exception):
    """Raised for a mutant whose function, statement or killer is gone. Whoever moves the code ports it."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        place: a file of loraprune_ds, a colon, and a function or class in it, with dots. A file alone: all of it.
        before: a statement, or an expression such as a condition, that the place has once.
        after: what stands there instead.
        effect: what a user would suffer.
        killer: the cheapest test that fails.
    """

    name: str
    topic: str
    place: str
    before: str
    after: str
    effect: str
    killer: str

    @property
    def path(self) -> str:
        return "loraprune_ds/" + self.place.partition(":")[0]

    def mutate(self, source: str) -> str:
        """Returns the source of its file with the bug. Raises LostMutant."""
        scope = self._scope(source)
        found = list(_find(scope, self.before))
        if len(found) != 1:
            raise LostMutant(f"{self.name}: {self.place} has {len(found)} times {self.before!r}")
        mutated = _replace(source, found[0], self.after)
        if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
            raise LostMutant(f"{self.name} changes nothing")
        return mutated

    def check(self) -> None:
        """Raises LostMutant if the bug cannot be planted, or if its killer is gone."""
        path = ROOT / self.path
        if not path.is_file():
            raise LostMutant(f"{self.name}: there is no {self.path}")
        self.mutate(path.read_text())
        file, _, test = self.killer.partition("::")
        function = test.partition("[")[0].rpartition("::")[2]
        if not (ROOT / file).is_file() or f"def {function}(" not in (ROOT / file).read_text():
            raise LostMutant(f"{self.name}: its killer {self.killer} is gone")

    def _scope(self, source: str) -> ast.AST:
        scope: ast.AST = ast.parse(source)
        for name in filter(None, self.place.partition(":")[2].split(".")):
            inside = [x for x in ast.walk(scope) if isinstance(x, BLOCKS) and x.name == name]
            if not inside:
                raise LostMutant(f"{self.name}: {self.path} has no {name} of {self.place}")
            scope = inside[0]
        return scope


def all_mutants() -> list[Mutant]:
    """Reads the tables of this folder, a file for each topic."""
    mutants: list[Mutant] = []
    for table in sorted(FOLDER.glob("*.yaml")):
        rows: dict[str, dict[str, str]] = yaml.safe_load(table.read_text())
        mutants += [Mutant(name, table.stem, **row) for name, row in rows.items()]
    return mutants


def _find(scope: ast.AST, before: str) -> Iterator[Any]:
    """Yields the outermost nodes that read like this statement or expression."""
    (wanted,) = ast.parse(before).body
    looked_for = wanted.value if isinstance(wanted, ast.Expr) else wanted
    text = ast.unparse(looked_for)
    for node in ast.walk(scope):
        if type(node) is type(looked_for) and ast.unparse(node) == text:
            yield node


def _replace(source: str, node: Any, after: str) -> str:
    lines = source.encode().splitlines(keepends=True)  # ast counts bytes
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = textwrap.indent(after.strip(), " " * node.col_offset).strip()
    encoded = source.encode()
    return (encoded[:start] + text.encode() + encoded[end:]).decode()
