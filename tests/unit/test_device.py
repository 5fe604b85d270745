"""A rank's questions to its device, with a GPU that is not there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.errors import UserError
from loraprune_ds.model.dtypes import tf32_where_exact
from loraprune_ds.pruning import input_moments, taps
from loraprune_ds.pruning.input_moments import InputMoments
from loraprune_ds.zero import device
from loraprune_ds.zero.device import check_dtype, empty_host_cache, peak_flops
from tests.unit.shapes_and_scores import make_shape


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Fakes the accelerator, as far as it is asked for."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_tf32_is_for_products_of_halves_on_a_gpu_and_for_no_others(dtype: torch.dtype, name: str) -> None:
    matmul = torch.backends.cuda.matmul
    exact = name == "cuda" and dtype != torch.float32
    with tf32_where_exact(dtype, torch.device(name)):
        assert matmul.allow_tf32 == exact
    assert not matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_half(dtype: torch.dtype) -> None:
    """All 65,536 of them end with 13 zero bits in fp32. These are the bits that TF32 drops."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = every[every.isfinite()].float()
    assert len(numbers) > 60_000
    assert not (numbers.view(torch.int32) & (2**13 - 1)).any()


def test_second_moments_ask_with_the_dtype_that_their_inputs_came_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = input_moments.tf32_where_exact

    def asking(dtype: torch.dtype, device: torch.device) -> Any:
        asked.append((dtype, device.type))
        return original(dtype, device)

    monkeypatch.setattr(input_moments, "tf32_where_exact", asking)
    monkeypatch.setattr(taps, "lora_linear", lambda layer, linear: nn.Identity())
    shape = make_shape([(1, 4)])
    model: Any = SimpleNamespace(layers=[None], shape=shape, owner=lambda layer: 0, reduce_to=lambda owner, part: part)
    moments = InputMoments(model, [0], decay=0.0)
    inputs: Tensor = torch.randn(1, 5, 4).bfloat16()
    linear_id = shape.input_linear_ids()[0]
    with moments.record_forward(None):
        moments._record(linear_id, inputs)
    assert asked == [(torch.bfloat16, "cpu")]


@pytest.mark.parametrize(("emulates", "accepted"), [(True, False), (False, True)])
def test_bf16_that_a_gpu_only_emulates_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace, emulates: bool, accepted: bool
) -> None:
    gpu.is_fp16_supported = gpu.is_bf16_supported = lambda: True  # DeepSpeed takes emulation for support
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulates
    )
    check_dtype("float16")
    check_dtype("float32")
    if accepted:
        check_dtype("bfloat16")
    else:
        with pytest.raises(UserError, match=r"^model\.dtype bfloat16 is not supported by the cuda device$"):
            check_dtype("bfloat16")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_operations_of_known_cards(name: str, teraflops: int | None) -> None:
    assert peak_flops(name, "bfloat16") == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops(name, "float32") is None
