"""What a rank asks of its device, with a GPU that is not there."""

from types import SimpleNamespace

import pytest
import torch

from loraprune_ds.zero import device
from loraprune_ds.zero.device import empty_host_cache


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The accelerator, as far as it is asked for."""
    fake = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(device, "accelerator", lambda: fake)
    return fake


def test_pinned_memory_is_given_back_only_where_there_can_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: pytest.fail("there is no GPU"), raising=False)
    empty_host_cache()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("public", [True, False])
def test_pinned_memory_is_given_back_by_the_name_that_torch_has(monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    called = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: called.append("public"), raising=False)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("private"), raising=False)
    if not public:
        monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    empty_host_cache()
    assert called == ["public" if public else "private"]
