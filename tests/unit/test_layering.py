"""The shape of the package: imports point one way and in no cycle, only zero/ knows DeepSpeed, files are short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "loraprune_ds"
MAX_LINES = 300
# A module imports from layers before its own, never from its own layer's other packages.
LAYERS = (
    ("errors", "faults"),
    ("whole",),
    ("files", "units"),
    ("config_types", "command"),
    ("config_data",),
    ("config",),
    ("config_file",),
    ("model",),
    ("pruning",),
    ("zero",),
    ("checkpoint",),
    ("export", "plan"),
    ("evaluate",),
    ("report",),
    ("train", "hf"),
    ("cli",),
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


def find_cycle(imports: dict[str, set[str]]) -> list[str] | None:
    """Finds modules that import each other in a ring, in order; None if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        found = (visit(target, [*path, module]) for target in sorted(imports[module]))
        cycle = next((ring for ring in found if ring), None)
        done.add(module)
        return cycle

    return next((ring for module in imports if (ring := visit(module, []))), None)


def imports_between_files() -> dict[str, set[str]]:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    found = {}
    for module, path in modules.items():
        targets = {name for name in imported_modules(ast.parse(path.read_text())) if name.startswith(PACKAGE)}
        named = {name if name in modules else name.rpartition(".")[0] for name in targets}
        found[module] = {name for name in named if name in modules} - {module}
    return found


def test_every_file_keeps_to_its_layer_and_is_short() -> None:
    for path in FILES:
        source, part = path.read_text(), part_of_file(path)
        assert part in LEVEL or not part, f"{label(path)}: `{part}` has no place in LAYERS"
        assert not part or import_faults(part, source) == [], label(path)
        assert len(source.splitlines()) <= MAX_LINES, label(path)
        assert path.name != "__init__.py" or is_bare(source), f"{label(path)} must not re-export"


def test_no_file_imports_itself_through_others() -> None:
    imports = imports_between_files()
    assert "loraprune_ds.pruning.prunable_model" in imports["loraprune_ds.zero.sharded"]
    assert find_cycle(imports) is None


def test_a_cycle_between_files_of_one_package_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_pruning_runs_without_deepspeed() -> None:
    code = "import loraprune_ds.pruning.step, sys; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_files_were_found() -> None:
    assert {"config", "errors", "model", "zero"} <= {part_of_file(path) for path in FILES}


def test_a_wrong_import_is_a_fault() -> None:
    for part, line in [
        ("model", "from loraprune_ds.zero.comm import Communicator"),
        ("model", "from loraprune_ds import zero"),
        ("model", "import loraprune_ds.train.loop"),
        ("model", "def load():\n    from loraprune_ds.pruning import mask"),
        ("pruning", "from loraprune_ds.zero.comm import Communicator"),
        ("errors", "from loraprune_ds.config import RunConfig"),
        ("export", "from loraprune_ds.evaluate.perplexity import perplexity"),
        ("train", "from launch.run import main"),
        ("cli", "from launch.run import main"),
        ("train", "import deepspeed"),
        ("launch", "from deepspeed import comm"),
    ]:
        assert len(import_faults(part, line)) == 1, line


def test_a_right_import_is_not() -> None:
    for part, line in [
        ("zero", "import deepspeed"),
        ("zero", "from loraprune_ds.zero.comm import Communicator"),
        ("zero", "from loraprune_ds.pruning.prunable_model import LayerKeep"),
        ("train", "from loraprune_ds.evaluate.perplexity import perplexity"),
        ("launch", "from loraprune_ds.train.loop import train"),
        ("launch", "from loraprune_ds import __version__"),
    ]:
        assert import_faults(part, line) == [], line


def test_an_init_with_more_than_constants_is_not_bare() -> None:
    assert is_bare('"""What it is."""\n__version__ = "1"\n')
    for source in ["from loraprune_ds.model.shapes import ModelShape", "__all__ = ['shapes']"]:
        assert not is_bare(source)
