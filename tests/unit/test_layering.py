"""The shape of the package: imports point one way and in no cycle, only zero/ knows DeepSpeed, files are short."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest

import loraprune_ds
from loraprune_ds.zero import private
from loraprune_ds.zero.private import check_private_attributes
from tests.support.launching import ROOT
from tests.support.refusals import refused

PACKAGE = "loraprune_ds"
MAX_LINES = 400
# CPU seconds that the callback's import adds, per second that its libraries take: 0.46 of 4.1 were measured
MOST_ADDED = 0.15
# A module imports from layers before its own, never from its own layer's other packages.
LAYERS = (
    ("errors",),
    ("files", "removed"),
    ("units", "config", "arguments"),
    ("ranks",),
    ("model",),
    ("pretrained",),
    ("pruning",),
    ("engine",),
    ("zero", "local", "fsdp"),
    ("engines",),
    ("checkpoint", "report"),
    ("export",),
    ("generate",),
    ("session",),
    ("train", "hf", "evaluate", "chats", "plan"),
    ("cli",),
    ("launch", "slurm"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
KNOWS_DEEPSPEED = "zero"
KNOWS_FSDP = "fsdp"  # its private modules

SCRIPTS = ("launch", "slurm")
FILES = sorted(path for folder in (PACKAGE, *SCRIPTS) for path in (ROOT / folder).rglob("*.py"))


def part_of(module: str) -> str:
    """`loraprune_ds.zero.cut` -> `zero`; `launch.run` -> `launch`; `config_file` -> `config`; the package -> empty."""
    names = module.split(".")
    return names[0] if names[0] != PACKAGE else ".".join(names[1:2]).partition("_")[0]


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
        if "._fully_shard" in module and part != KNOWS_FSDP:
            faults.append(f"{part} imports {module}; only {KNOWS_FSDP} may know FSDP2's insides")
        if (
            root in (PACKAGE, *SCRIPTS)
            and target in LEVEL
            and target != part
            and LEVEL[target] >= LEVEL[part]
        ):
            faults.append(f"{part} imports {module}, which comes after it")
    return faults


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of_file(path: Path) -> str:
    return part_of(module_of(path).removesuffix(".__init__"))


def imports_between_files() -> dict[str, set[str]]:
    modules = {module_of(path): path for path in FILES}
    found = {}
    for module, path in modules.items():
        targets = {
            name
            for name in imported_modules(ast.parse(path.read_text()))
            if name.startswith(PACKAGE)
        }
        named = {name if name in modules else name.rpartition(".")[0] for name in targets}
        found[module] = {name for name in named if name in modules} - {module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_keeps_to_its_layer_and_is_short(path: Path) -> None:
    source, part = path.read_text(), part_of_file(path)
    assert part in LEVEL or not part, f"`{part}` has no place in LAYERS"
    assert not part or import_faults(part, source) == []
    assert len(source.splitlines()) <= MAX_LINES
    if part and path.name == "__init__.py":
        assert not list(imported_modules(ast.parse(source))), (
            "only the package itself names what others define"
        )


def test_no_file_imports_itself_through_others() -> None:
    imports = imports_between_files()
    assert "loraprune_ds.pruning.prunable_model" in imports["loraprune_ds.zero.sharded"]
    TopologicalSorter(imports).prepare()  # raises a CycleError that names the files


EXPORT_AND_EVALUATE = [
    module_of(path) for path in FILES if part_of_file(path) in ("export", "evaluate")
]


@pytest.mark.parametrize(
    ("line", "unwanted"),
    [
        (f"import loraprune_ds.pruning.step, {', '.join(EXPORT_AND_EVALUATE)}", ["deepspeed"]),
        ("from loraprune_ds import PruneConfig", ["torch", "deepspeed"]),
    ],
    ids=["exports and evaluations", "settings"],
)
def test_an_import_does_not_wait_for_packages_it_does_not_need(
    line: str, unwanted: list[str]
) -> None:
    code = f"{line}; import sys; sys.exit(any(name in sys.modules for name in {unwanted}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


IMPORTS = """
import sys, time
import peft, torch, transformers.trainer
libraries = time.process_time()
from loraprune_ds import LoraPruneCallback, PruneConfig
print((time.process_time() - libraries) / libraries, *sys.modules)
"""


def test_the_callback_adds_little_to_the_import_of_its_libraries() -> None:
    added = []
    while min(added, default=1) > MOST_ADDED:
        # the first may also compile our modules
        assert len(added) < 3, f"{added} of the libraries' seconds"
        command = [sys.executable, "-c", IMPORTS]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        share, *loaded = printed.stdout.split()
        assert not {"gguf", "matplotlib"} & set(loaded)
        added.append(float(share))


# What ZeRO-3 sets on a parameter. Settings and files of DeepSpeed may have names that begin alike.
OF_A_PARAMETER = re.compile(r"\bds_(?!configs?\b)\w+")


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if part_of_file(path) != KNOWS_DEEPSPEED],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_only_one_package_reads_what_zero_3_sets_on_a_parameter(path: Path) -> None:
    assert OF_A_PARAMETER.findall(path.read_text()) == []


def test_every_public_name_leads_to_its_definition() -> None:
    assert set(loraprune_ds.__all__) == loraprune_ds._MODULES.keys() <= set(dir(loraprune_ds))
    for name in loraprune_ds.__all__:
        assert getattr(loraprune_ds, name).__name__ == name
    with pytest.raises(ImportError):
        exec("from loraprune_ds import LoraPrune")


# A DeepSpeed that lacks what a cut relies on is refused by name, with its version, before any work


def refusal() -> str:
    message = refused(check_private_attributes)
    assert message.startswith(
        f"deepspeed {deepspeed.__version__} lacks names that in-place pruning needs ("
    )
    return message.split("(", 1)[1].rsplit(")", 1)[0]


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, names in private.METHODS for name in names]
)
def test_a_missing_method_is_named(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> None:
    for base in getattr(cls, "__mro__", [cls]):
        if name in vars(base):
            monkeypatch.delattr(base, name)
    assigned = [
        f"{holder}.{x}"
        for _, function, holder, names in private.ASSIGNED
        if function == name
        for x in names
    ]
    assert refusal().split(", ") == [f"{cls.__name__}.{name}", *assigned]


@pytest.mark.parametrize(
    ("cls", "function", "holder", "name"),
    [
        (cls, function, holder, name)
        for cls, function, holder, names in private.ASSIGNED
        for name in names
    ],
)
def test_a_lack_is_named(
    monkeypatch: pytest.MonkeyPatch, cls: type, function: str, holder: str, name: str
) -> None:
    """Pretends that DeepSpeed's function assigns everything but this one."""
    names = tuple(n for n in getattr(cls, function).__code__.co_names if n != name)
    monkeypatch.setattr(cls, function, SimpleNamespace(__code__=SimpleNamespace(co_names=names)))
    assert refusal() == f"{holder}.{name}"


# The list is exact: it has every private name that the package uses.

# Names of the package's variables. Of the engine itself it uses only public names, and writes some counters.
OBJECTS = {"zero", "zero_optimizer", "optimizer", "offload", "coordinator", "init", "scaler"}
PUBLIC = {"optimizer", "state", "param_groups", "loss_scale", "get", "clear"}
ONLY_WRITTEN = {"ds_numel_aligned"}  # in a decorated function, whose names cannot be seen


def touched(source: str) -> set[str]:
    """Finds the attributes of DeepSpeed's optimizer, its helpers and its parameters that a file mentions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1].lstrip("_")
            if owner in OBJECTS or OF_A_PARAMETER.fullmatch(node.attr):
                found.add(node.attr)
    return found


def written_to_engine(source: str) -> set[str]:
    """Finds the attributes that a file assigns to DeepSpeed's engine."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    attributes = [x for node in nodes for x in node.targets if isinstance(x, ast.Attribute)]
    return {x.attr for x in attributes if ast.unparse(x.value).split(".")[-1] == "deepspeed"}


def test_everything_the_package_touches_is_checked() -> None:
    checked = {name for _, names in private.METHODS for name in names}
    checked |= {name for *_, names in private.ASSIGNED for name in names}
    files = [
        path
        for path in (ROOT / "loraprune_ds" / "zero").glob("*.py")
        if "ds_config" not in path.name
    ]
    used = set().union(*(touched(path.read_text()) for path in files))
    assert used >= {"ds_tensor", "grad_position", "is_invalid_trace", "_setup_for_real_optimizer"}
    assert used - checked - PUBLIC - ONLY_WRITTEN == set()
    assert set().union(*(written_to_engine(path.read_text()) for path in files)) == set(
        private.ENGINE_COUNTERS
    )
    by_name = {*private.FLAT_LISTS, *private.LOSS_SCALE_FIELDS}  # in loops over the list
    others = "\n".join(path.read_text() for path in files if path.name != "private.py")
    assert {name for name in checked - by_name if not re.search(rf"\b{name}\b", others)} == set()
