"""The shape of the package, kept by a test: imports point one way, one package knows DeepSpeed, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "loraprune_ds"
MAX_LINES = 300
# A module imports from layers before its own, never from its own layer's other packages.
LAYERS = (
    ("errors", "faults"),
    ("whole",),
    ("files", "units"),
    ("config_checks",),
    ("config", "command"),
    ("config_file",),
    ("model",),
    ("pruning",),
    ("zero",),
    ("checkpoint",),
    ("evaluate", "export", "plan"),
    ("train",),
    ("launch",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
KNOWS_DEEPSPEED = "zero"

FILES = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted((ROOT / "launch").rglob("*.py"))


def part_of(module: str) -> str:
    """`loraprune_ds.zero.comm` -> `zero`; `launch.run` -> `launch`; the package itself -> empty."""
    names = module.split(".")
    return names[0] if names[0] != PACKAGE else ".".join(names[1:2])


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the file, functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_faults(part: str, source: str) -> list[str]:
    faults = []
    for module in imported_modules(ast.parse(source)):
        root, target = module.split(".")[0], part_of(module)
        if root == "deepspeed" and part != KNOWS_DEEPSPEED:
            faults.append(f"{part} imports {module}; only {KNOWS_DEEPSPEED} may know DeepSpeed")
        if root in (PACKAGE, "launch") and target in LEVEL and target != part and LEVEL[target] >= LEVEL[part]:
            faults.append(f"{part} imports {module}, which comes after it")
    return faults


def is_bare(init_source: str) -> bool:
    """Nothing but a docstring and plain constants such as `__version__`."""
    body = ast.parse(init_source).body
    constants = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    docstrings = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(constants) + len(docstrings) == len(body)


def part_of_file(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return part_of(".".join(name for name in names if name != "__init__"))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_keeps_to_its_layer_and_is_short(path: Path) -> None:
    source = path.read_text()
    part = part_of_file(path)
    assert part in LEVEL or not part, f"{label(path)}: `{part}` has no place in LAYERS"
    assert not part or import_faults(part, source) == []
    lines = len(source.splitlines())
    assert lines <= MAX_LINES
    assert path.name != "__init__.py" or is_bare(source), f"{label(path)} must not re-export"


def test_the_files_were_found() -> None:
    assert {"config", "errors", "model", "zero"} <= {part_of_file(path) for path in FILES}


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("model", "from loraprune_ds.zero.comm import Communicator"),
        ("model", "from loraprune_ds import zero"),
        ("model", "import loraprune_ds.train.loop"),
        ("model", "def load():\n    from loraprune_ds.pruning import mask"),
        ("errors", "from loraprune_ds.config import RunConfig"),
        ("export", "from loraprune_ds.evaluate.perplexity import perplexity"),
        ("train", "from launch.run import main"),
        ("train", "import deepspeed"),
        ("launch", "from deepspeed import comm"),
    ],
)
def test_a_wrong_import_is_a_fault(part: str, line: str) -> None:
    assert len(import_faults(part, line)) == 1


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("zero", "import deepspeed"),
        ("zero", "from loraprune_ds.zero.comm import Communicator"),
        ("train", "from loraprune_ds.evaluate.perplexity import perplexity"),
        ("launch", "from loraprune_ds.train.loop import train"),
        ("launch", "from loraprune_ds import __version__"),
    ],
)
def test_a_right_import_is_not(part: str, line: str) -> None:
    assert import_faults(part, line) == []


@pytest.mark.parametrize("source", ["from loraprune_ds.model.shapes import ModelShape", "__all__ = ['shapes']"])
def test_an_init_with_more_than_constants_is_not_bare(source: str) -> None:
    assert is_bare('"""What it is."""\n__version__ = "1"\n')
    assert not is_bare(source)
