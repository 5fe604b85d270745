"""Which file imports which: the graph of the package, its scripts and its tests."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.launching import ROOT


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the file, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_between(files: Iterable[Path]) -> dict[str, set[str]]:
    """Returns the modules among these files that each of them imports."""
    modules = {module_of(path): path for path in files}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set(imported_modules(ast.parse(path.read_text())))
        named = {name if name in modules else name.rpartition(".")[0] for name in targets}
        found[module] = named & modules.keys() - {module}
    return found
