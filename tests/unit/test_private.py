"""A DeepSpeed that lacks what a cut relies on is refused by name, with its version, before any work."""

import ast
import re
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest

from loraprune_ds.zero import private
from loraprune_ds.zero.private import check_private_attributes
from tests.integration.launching import ROOT
from tests.refusals import refused


def refusal() -> str:
    message = refused(check_private_attributes)
    assert message.startswith(f"deepspeed {deepspeed.__version__} lacks names that in-place pruning needs (")
    return message.split("(", 1)[1].rsplit(")", 1)[0]


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in private.METHODS for name in names])
def test_a_missing_method_is_named(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str) -> None:
    for base in getattr(cls, "__mro__", [cls]):
        if name in vars(base):
            monkeypatch.delattr(base, name)
    assigned = [f"{holder}.{x}" for _, function, holder, names in private.ASSIGNED if function == name for x in names]
    assert refusal().split(", ") == [f"{cls.__name__}.{name}", *assigned]


@pytest.mark.parametrize(
    ("cls", "function", "holder", "name"),
    [(cls, function, holder, name) for cls, function, holder, names in private.ASSIGNED for name in names],
)
def test_a_lack_is_named(monkeypatch: pytest.MonkeyPatch, cls: type, function: str, holder: str, name: str) -> None:
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
            owner = ast.unparse(node.value).split(".")[-1]
            if owner in OBJECTS or node.attr.startswith("ds_"):
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
    files = [path for path in (ROOT / "loraprune_ds" / "zero").glob("*.py") if "ds_config" not in path.name]
    used = set().union(*(touched(path.read_text()) for path in files))
    assert used >= {"ds_tensor", "grad_position", "is_invalid_trace", "_setup_for_real_optimizer"}
    assert used - checked - PUBLIC - ONLY_WRITTEN == set()
    assert set().union(*(written_to_engine(path.read_text()) for path in files)) == set(private.ENGINE_COUNTERS)
    by_name = {*private.FLAT_LISTS, *private.LOSS_SCALE_FIELDS}  # in loops over the list
    others = "\n".join(path.read_text() for path in files if path.name != "private.py")
    assert {name for name in checked - by_name if not re.search(rf"\b{name}\b", others)} == set()
