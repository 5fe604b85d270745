"""Lists the names of other libraries that our sources use, and which of them the oldest set lacks: tests/oldest.sh.

python -m tests.support.oldest_names llamafactory      in that set; writes tests/oldest_names.txt

Further lines, of each set, have the families that its transformers lacks.

A line is `transformers.Trainer` for an import, `transformers.Trainer.train` for an attribute of one, and
`transformers.Trainer(args)` for a parameter.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loraprune_ds.model.family import FAMILIES
from tests.support.launching import ROOT

LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "trl")
FILE = ROOT / "tests" / "oldest_names.txt"
LACKS = "lacks "
LACKS_FAMILY = " lacks family "


def is_theirs(module: str | None) -> bool:
    return (module or "").split(".")[0] in LIBRARIES


def used_names() -> dict[str, bool]:
    """Returns each name, and whether a module's top uses it."""
    names: dict[str, bool] = {}
    for path in sorted((ROOT / "loraprune_ds").rglob("*.py")):
        for name, at_top in _names_in(ast.parse(path.read_text())):
            names[name] = names.get(name, False) or at_top
    return names


def _names_in(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yields names with whether the file uses them when it is imported. TYPE_CHECKING blocks never run."""
    unrun = {id(x) for node in tree.body if _only_checked(node) for x in ast.walk(node)}
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    inside = {
        id(x) for node in ast.walk(tree) if isinstance(node, functions) for x in ast.walk(node)
    }
    nodes = [node for node in ast.walk(tree) if id(node) not in unrun]
    known: dict[str, str] = {}
    for node in nodes:
        known |= _imported(node)
    for node in nodes:
        for name in (*_imported(node).values(), *_uses(node, known)):
            yield name, id(node) not in inside


def _imported(node: ast.AST) -> dict[str, str]:
    if isinstance(node, ast.ImportFrom) and is_theirs(node.module):
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Import):
        return {alias.name: alias.name for alias in node.names if alias.name in LIBRARIES}
    return {}


def _uses(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """Yields the attribute, or the parameters of a call."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in known:
            yield f"{known[node.value.id]}.{node.attr}"
    elif isinstance(node, ast.Call) and (called := _called(node.func, known)):
        yield from (f"{called}({keyword.arg})" for keyword in node.keywords if keyword.arg)


def _only_checked(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def _called(function: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        base = known.get(function.value.id)
        return base and f"{base}.{function.attr}"
    return None


def exists(name: str) -> bool:
    """Tells whether the installed libraries have a name."""
    dotted, _, parameter = name.removesuffix(")").partition("(")
    found = _find(dotted)
    if found is None or not parameter:
        return found is not None
    parameters = inspect.signature(found).parameters.values()
    return any(p.name == parameter or p.kind is p.VAR_KEYWORD for p in parameters)


def _find(dotted: str) -> Any:
    """Returns the object, or None."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None


def update(chosen: str) -> None:
    """Writes what the set that is installed here lacks. The names are those of the oldest set."""
    lines = FILE.read_text().splitlines()
    names = [line for line in lines if LACKS_FAMILY not in line]
    families = [line for line in lines if LACKS_FAMILY in line and not line.startswith(chosen)]
    if chosen == "llamafactory":
        names = [name if exists(name) else LACKS + name for name in sorted(used_names())]
    families += [chosen + LACKS_FAMILY + name for name in FAMILIES if name not in CONFIG_MAPPING]
    FILE.write_text("".join(f"{line}\n" for line in [*names, *sorted(families)]))


if __name__ == "__main__":
    update(sys.argv[1])
