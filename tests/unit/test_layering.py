"""The shape of the package: imports point one way and in no cycle, only zero/ knows DeepSpeed, files are short."""

import ast
import dataclasses
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import deepspeed
import pytest

import loraprune_ds
from loraprune_ds import config
from loraprune_ds.zero.private import METHODS, check_private_attributes
from tests.support.imports import imported_modules, imports_between, module_of
from tests.support.launching import ROOT
from tests.support.refusals import must_name

PACKAGE = "loraprune_ds"
MAX_LINES = 400
# A function that reads one key takes that key.
MOST_WITH_SETTINGS = 10  # packages
SETTINGS = {name for name, kind in vars(config).items() if dataclasses.is_dataclass(kind)}
# A module imports from layers before its own, never from its own layer's other packages.
LAYERS = (
    ("errors",),
    ("files", "removed", "versions"),
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


def part_of_file(path: Path) -> str:
    return part_of(module_of(path).removesuffix(".__init__"))


def takes_settings(source: str) -> bool:
    """Tells whether a parameter is annotated with a class of config.py."""
    functions = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)]
    annotations = [parameter.annotation for x in functions for parameter in every(x.args)]
    names = {
        name.id
        for annotation in annotations
        if annotation is not None
        for name in ast.walk(annotation)
        if isinstance(name, ast.Name)
    }
    return bool(names & SETTINGS)


def every(arguments: ast.arguments) -> list[ast.arg]:
    return arguments.posonlyargs + arguments.args + arguments.kwonlyargs


def test_few_packages_take_settings() -> None:
    packages = {
        path.relative_to(ROOT / PACKAGE).parts[0]
        for path in (ROOT / PACKAGE).glob("*/**/*.py")
        if takes_settings(path.read_text())
    }
    assert "pruning" in packages
    assert len(packages) <= MOST_WITH_SETTINGS, packages


def test_every_file_keeps_to_its_layer_and_is_short() -> None:
    for path in FILES:
        source, part = path.read_text(), part_of_file(path)
        assert part in LEVEL or not part, f"`{part}` has no place in LAYERS"
        assert not part or import_faults(part, source) == [], path
        assert len(source.splitlines()) <= MAX_LINES, path
        if part and path.name == "__init__.py":
            imported = list(imported_modules(ast.parse(source)))
            assert not imported, "only the package itself names what others define"


def test_no_file_imports_itself_through_others() -> None:
    imports = imports_between(FILES)
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
    ],  # and test_versions.py has the callback
    ids=["exports and evaluations", "settings"],
)
def test_an_import_does_not_wait_for_packages_it_does_not_need(
    line: str, unwanted: list[str]
) -> None:
    code = f"{line}; import sys; sys.exit(any(name in sys.modules for name in {unwanted}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# What ZeRO-3 sets on a parameter. Settings and files of DeepSpeed may have names that begin alike.
OF_A_PARAMETER = re.compile(r"\bds_(?!configs?\b)\w+")


def test_only_one_package_reads_what_zero_3_sets_on_a_parameter() -> None:
    for path in FILES:
        if part_of_file(path) != KNOWS_DEEPSPEED:
            assert OF_A_PARAMETER.findall(path.read_text()) == [], path


def test_every_public_name_leads_to_its_definition() -> None:
    assert set(loraprune_ds.__all__) == loraprune_ds._MODULES.keys() <= set(dir(loraprune_ds))
    for name in loraprune_ds.__all__:
        assert getattr(loraprune_ds, name).__name__ == name
    with pytest.raises(ImportError):
        exec("from loraprune_ds import LoraPrune")


def test_a_deepspeed_without_a_name_that_cuts_need_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_private_attributes()
    cls, (name, *_) = METHODS[0]
    monkeypatch.delattr(cls, name)
    must_name(f"{deepspeed.__version__} {name}", check_private_attributes)
