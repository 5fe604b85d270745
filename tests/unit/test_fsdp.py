"""What FSDP2's engine needs of torch is checked before any work: private names, and several dtypes in a unit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from loraprune_ds.fsdp import checks, private
from tests.support.refusals import must_name, refused


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, names in private.NAMES for name in names]
)
def test_a_missing_name_of_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, cls: Any, name: str
) -> None:
    seen = private._mentioned(cls) - {name}
    other = private._mentioned
    monkeypatch.setattr(private, "_mentioned", lambda x: seen if x is cls else other(x))
    message = refused(private.check_private_attributes)
    assert message.startswith(f"torch {torch.__version__} lacks")
    assert f"({cls.__name__}.{name})" in message


def test_a_renamed_argument_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "FSDPParam", lambda param: None)
    must_name("FSDPParam(mesh_info)", private.check_private_attributes)


@pytest.mark.parametrize(("version", "refuses"), [("2.7.1", True), ("2.8.0", False)])
def test_a_torch_that_shards_one_dtype_alone_is_refused_for_several(
    monkeypatch: pytest.MonkeyPatch, version: str, refuses: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))

    def unit(*dtypes: torch.dtype) -> Any:
        params = [SimpleNamespace(sharded_param=torch.empty(0, dtype=dtype)) for dtype in dtypes]
        return {index: private.Slot(params, index) for index in range(len(params))}

    checks._check_dtypes(unit(torch.float32, torch.float32))
    mixed = unit(torch.bfloat16, torch.float32)
    if refuses:
        must_name("2.7.1 float32", checks._check_dtypes, mixed)
    else:
        checks._check_dtypes(mixed)
