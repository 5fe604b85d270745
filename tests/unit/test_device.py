"""A rank's device: questions to a GPU that is not there, where tensors lie, and half-precision products on a CPU."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.cli import run as command
from loraprune_ds.errors import UserError
from loraprune_ds.pruning import compensate
from loraprune_ds.ranks.device import HALF, ThroughFloat32, fast_half_products
from loraprune_ds.zero import engine, params
from loraprune_ds.zero.engine import Zero3
from loraprune_ds.zero.params import into_pinned, shard_at_birth
from tests.support.launching import write_config


@pytest.fixture
def switches() -> Iterator[Any]:
    """Lets a test change the precision of products."""
    backends: Any = torch.backends
    yield backends
    torch.set_float32_matmul_precision("highest")
    for switch in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        switch.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["cuda", "cpu"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_products_of_halves_keep_only_the_bits_of_halves(
    dtype: torch.dtype,
    name: str,
    native: bool,
    before: str,
    switches: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a trainer has set for all products, which later changes of that still reach."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    precision = "ieee"
    if name == "cuda" and dtype != torch.float32:
        precision = "tf32"
    elif name == "cpu" and dtype == torch.bfloat16 and native:
        precision = "bf16"
    switch = switches.cuda.matmul if name == "cuda" else switches.mkldnn.matmul
    switches.fp32_precision = before
    with compensate.products_of(dtype, torch.device(name)):
        assert switch.fp32_precision == precision
    for later in (before, "ieee", "tf32"):
        switches.fp32_precision = later
        assert switch.fp32_precision == later


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.usefixtures("switches")
def test_the_older_switch_of_products_is_what_it_was(
    is_new: bool, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_new:  # torch before 2.9
        monkeypatch.delattr(type(torch.backends), "fp32_precision")
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    torch.set_float32_matmul_precision(before)
    with compensate.products_of(torch.bfloat16, torch.device("cpu")):
        if not is_new:
            assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("emulates", [True, False])
def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch, emulates: bool) -> None:
    gpu = SimpleNamespace(device_name=lambda: "cuda")
    # DeepSpeed takes emulation for support
    gpu.is_fp16_supported = gpu.is_bf16_supported = lambda: True
    monkeypatch.setattr(engine, "accelerator", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or not emulates,
    )
    Zero3().check_device("float16")
    Zero3().check_device("float32")
    refused = pytest.raises(UserError, match=r"model\.dtype bfloat16")
    with refused if emulates else nullcontext():
        Zero3().check_device("bfloat16")


def test_a_block_is_pinned_only_when_a_smaller_one_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pin_memory = Mock(wraps=torch.clone)
    monkeypatch.setattr(params, "accelerator", lambda: SimpleNamespace(pin_memory=pin_memory))
    shard = torch.arange(100, dtype=torch.bfloat16)  # 200 bytes: a block of 256
    shards: list[Tensor] = []
    for kept in (90, 70, 65, 64, 40, 33, 32):
        cut = shard[:kept] + 1
        shard = into_pinned(shard, cut)
        assert torch.equal(shard, cut)
        shards.append(shard)  # so that no block is free again
    # blocks of 128 and of 64
    assert [call.args[0].nbytes for call in pin_memory.call_args_list] == [64 * 2, 32 * 2]
    assert len({shard.untyped_storage().data_ptr() for shard in shards}) == 3


def test_buffers_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frequencies of a rotary embedding would be copied from the host in each pass."""
    monkeypatch.setattr(
        params, "Init", MagicMock(return_value=MagicMock(local_device=torch.device("meta")))
    )
    model = nn.Sequential(nn.Identity())
    model[0].register_buffer("inv_freq", torch.ones(4), persistent=False)
    model[0].register_buffer("none", None)
    unused: Any = None  # there is no parameter
    shard_at_birth(model, unused, {}, torch.bfloat16)
    assert model[0].inv_freq.is_meta
    assert "inv_freq" not in model.state_dict()
    assert model[0].none is None


# Half-precision products through fp32 equal torch's own to a rounding. They cost one part of a weight at a time


def attend(x: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = functional.linear(x, w).unflatten(-1, (3, -1)).transpose(1, 2)
    return functional.scaled_dot_product_attention(
        heads, heads, heads, attn_mask=mask, is_causal=mask is None
    )


def masked_attention(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    n = x.shape[1]
    return attend(x, w, torch.zeros(n, n, dtype=x.dtype).masked_fill(torch.eye(n) == 1, -2.0))


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "linear": lambda x, w, bias: functional.linear(x, w),
    "linear with bias": functional.linear,
    "scaled": lambda x, w, bias: torch.addmm(bias, x.flatten(0, 1), w.t(), beta=0.5, alpha=2),
    "batched": lambda x, w, bias: torch.bmm(x, w.t().expand(len(x), -1, -1)),
    "batched with addition": lambda x, w, bias: torch.baddbmm(
        bias, x, w.t().expand(len(x), -1, -1)
    ),
    "attention": lambda x, w, bias: attend(x, w),
    "masked attention": masked_attention,
}


def outputs(product: Product, dtype: torch.dtype) -> list[Tensor]:
    """Returns the product and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16, 24), (48, 24), (48,))
    tensors = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    out = product(*tensors)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


class Halves(TorchDispatchMode):
    """Notes the products of half-precision tensors that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("mm", "attention")) and args[0].dtype in HALF:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_same_as_torchs_own_product(product: Product, dtype: torch.dtype) -> None:
    with Halves() as without:
        expected = outputs(product, dtype)
    with Halves() as through, ThroughFloat32():
        got = outputs(product, dtype)
    assert without.seen
    assert not through.seen
    for mine, torchs in zip(got, expected, strict=True):
        assert mine.dtype == torchs.dtype
        # A sum of about 24 terms in another order rounds to the next number at most. Attention rounds a few times.
        assert (mine - torchs).abs().max() <= 4 * torch.finfo(dtype).eps * torchs.abs().max()


@pytest.mark.parametrize(
    ("dtype", "has_instructions", "goes"),
    [
        ("bfloat16", False, True),
        ("bfloat16", True, False),
        ("float16", False, True),
        ("float32", False, False),
    ],
)
def test_only_where_faster(
    dtype: str, has_instructions: bool, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has_instructions)
    assert isinstance(fast_half_products(dtype), ThroughFloat32) == goes


# `train.deterministic` reaches torch, and the libraries that read the environment once, before anything computes

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")


class Reached(UserError):
    pass


@pytest.fixture(params=[False, True])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    train = {"steps": 1, "deterministic": request.param}
    return write_config(
        tmp_path / "run.yaml", {"output_dir": str(tmp_path / "out"), "train": train}
    ), request.param


def test_the_environment_has_it_before_ranks_join(
    monkeypatch: pytest.MonkeyPatch, config: tuple[Path, bool]
) -> None:
    found: list[str | None] = []

    def join_ranks(sharded: bool) -> None:
        found.extend(os.environ.get(name) for name in NAMES)
        raise Reached("far enough")

    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr(command, "join_ranks", join_ranks)
    monkeypatch.setattr(command, "tell", lambda error, agreed: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(config[0])])
    assert command.main() == Reached.exit_code
    assert found == ([":4096:8", "1"] if config[1] else [None, None])
