"""PEFT LoRA: the same start everywhere, no silent upcast, and an existing adapter taken over whole or refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loraprune_ds.config import LoraConfig
from loraprune_ds.model import adapters
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.codecs import INT8
from loraprune_ds.model.frozen import Blocks, QuantisedLinear
from loraprune_ds.model.lora_product import FusedLoraLinear, draw_mask
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained import adapters as adapters_on_disk
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.criterion import Tap
from tests.oracle.models import make_lora, make_tiny_llama
from tests.support.families import LLAMA_LINEARS
from tests.support.refusals import Spoil, edit, edit_tensors, must_name, remove, truncate

CONFIG = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0)
LAYERS = 2
WEIGHTS, UP_B = (
    "adapter_model.safetensors",
    "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight",
)
THIRD = UP_B.replace("layers.1", "layers.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), ffn=37, layers=LAYERS, biases=True)


def wrap(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, config: LoraConfig = CONFIG
) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return adapters.add_lora(model, open_pretrained(folder).shape, config, seed)


def lora_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """Saves an adapter with PEFT, with random factors."""
    model = wrap(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_on_all_seven_linears_and_only_lora_is_trained(
    folder: Path, dtype: torch.dtype
) -> None:
    model = wrap(folder, dtype=dtype, config=LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_of(model))
    assert len(trained) == LAYERS * len(LLAMA_LINEARS) * 2
    assert {tensor.dtype for tensor in lora_of(model).values()} == {dtype}
    shape = open_pretrained(folder).shape
    for i, layer in enumerate(decoder_layers(model)):
        for linear in LLAMA_LINEARS:
            module = adapters.lora_linear(layer, linear.name)
            a, b = adapters.lora_weights(module)
            out_features, in_features = shape.linear(LinearId(i, linear.name)).matrix
            assert (a.shape, b.shape) == ((4, in_features), (out_features, 4))
            assert a.abs().max() > 0
            assert not b.any()
            assert module.scaling[adapters.ADAPTER] == 1.5
            assert module.lora_dropout[adapters.ADAPTER].p == 0.5
    # The tests' own writer of adapters uses the same names.
    assert {
        f"base_model.model.model.{name}.default.weight" for name in make_lora(folder, r=4, seed=1)
    } == trained


def test_the_start_depends_on_the_seed_alone(folder: Path) -> None:
    first = lora_of(wrap(folder, seed=3))
    torch.manual_seed(99)
    again, other = lora_of(wrap(folder, seed=3)), lora_of(wrap(folder, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_existing_adapter_is_loaded(folder: Path, adapter: Path, dtype: torch.dtype) -> None:
    shape = open_pretrained(folder).shape
    adapters_on_disk.check_adapter(adapter, CONFIG, shape)
    edit("adapter_config.json", target_modules=".*_proj")(adapter)  # PEFT takes a pattern too
    adapters_on_disk.check_adapter(adapter, CONFIG, shape)
    model = wrap(folder, dtype=dtype)
    adapters_on_disk.load_adapter(model, adapter, shape, CONFIG.r)
    saved = load_file(adapter / WEIGHTS)
    for name, tensor in lora_of(model).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, saved[name.replace(".default", "")].to(dtype)), name
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter
    )
    if dtype == torch.float32:
        input_ids = torch.arange(3, 20)[None]
        assert torch.equal(
            model.eval()(input_ids=input_ids).logits, stock.eval()(input_ids=input_ids).logits
        )


def check(folder: Path, adapter: Path, names: str) -> None:
    must_name(
        f"{adapter} {names}",
        adapters_on_disk.check_adapter,
        adapter,
        CONFIG,
        open_pretrained(folder).shape,
    )


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"peft_type": "IA3"}, "LoRA"),
        ({"use_rslora": True}, "LoRA"),
        ({"alora_invocation_tokens": [1]}, "LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"bias": "all"}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "alphas"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, "lora.r 8 4"),
        ({"lora_alpha": 16}, "lora.lora_alpha 16 6"),
        ({"target_modules": ["q_proj", "v_proj"]}, "down_proj, gate_proj, k_proj, o_proj, up_proj"),
        ({"target_modules": None}, "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(
    folder: Path, adapter: Path, values: dict[str, Any], names: str
) -> None:
    edit("adapter_config.json", **values)(adapter)
    check(folder, adapter, names)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (truncate(WEIGHTS, -1), WEIGHTS),
        (remove(WEIGHTS), WEIGHTS),
        (remove("adapter_config.json"), "adapter_config.json"),
        (edit_tensors(lambda tensors: tensors.pop(UP_B), WEIGHTS), UP_B),
        (
            edit_tensors(lambda tensors: tensors.update({UP_B: torch.ones(5, 4)}), WEIGHTS),
            f"{UP_B} [5, 4] [37, 4]",
        ),
        (
            edit_tensors(lambda tensors: tensors.update({THIRD: tensors[UP_B].clone()}), WEIGHTS),
            THIRD,
        ),
    ],
)
def test_files_that_do_not_fit(folder: Path, adapter: Path, spoil: Spoil, names: str) -> None:
    spoil(adapter)
    check(folder, adapter, names)


# A linear with LoRA as one operation against PEFT's linear with the same parameters, in fp64

PEFT_CONFIG = PeftLoraConfig(r=3, lora_alpha=5, lora_dropout=0.4)
IN, OUT = 70, 9


class SameMask(nn.Dropout):
    """PEFT's dropout with our masks."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        mask, kept = draw_mask(input, self.p)
        return input * mask / kept


def pair(
    *, bias: bool, int8: bool, dtype: torch.dtype = torch.float64
) -> tuple[FusedLoraLinear, LoraLinear]:
    """Builds both with the same parameters. PEFT's has the dequantised weight."""
    torch.manual_seed(1)
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    dense.requires_grad_(False)
    base = dense
    if int8:
        form = Blocks(INT8, dtype)
        tensors = form.split(dense.weight)
        base = QuantisedLinear(dense, form, tensors)
        dense.weight.data = form.join(tensors.values())
    settings: Any = {
        "config": PEFT_CONFIG,
        "r": PEFT_CONFIG.r,
        "lora_alpha": PEFT_CONFIG.lora_alpha,
    }
    ours, theirs = (
        FusedLoraLinear(base, "default", **settings),
        LoraLinear(dense, "default", **settings),
    )
    theirs.lora_dropout["default"] = SameMask(PEFT_CONFIG.lora_dropout)
    for factor, other in zip(factors(ours), factors(theirs), strict=True):
        factor.data = torch.randn_like(factor, dtype=dtype)
        other.data = factor.data.clone()
    return ours, theirs


def factors(linear: LoraLinear) -> list[nn.Parameter]:
    return [parameter for name, parameter in linear.named_parameters() if "lora_" in name]


def run(linear: LoraLinear, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of A, B and x, which is (batch, window, in_features)."""
    torch.manual_seed(2)  # the same mask
    x = x.clone().requires_grad_()
    out = linear(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = [*(factor.grad for factor in factors(linear)), x.grad]
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_peft_computes(bias: bool, int8: bool, training: bool) -> None:
    ours, theirs = pair(bias=bias, int8=int8)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    found, wanted = (run(linear.train(training), x) for linear in (ours, theirs))
    assert len(found) == len(wanted) == 4
    for mine, other in zip(found, wanted, strict=True):
        # fp64: sums may have another order
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_the_output_has_the_bits_of_pefts(dtype: torch.dtype) -> None:
    ours, theirs = pair(bias=False, int8=False, dtype=dtype)
    # as PEFT has it then
    ours.lora_dropout["default"] = theirs.lora_dropout["default"] = nn.Identity()
    x = torch.randn(2, 5, IN, dtype=dtype)
    assert torch.equal(run(ours, x)[0], run(theirs, x)[0])


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-4, 1e-6, 1 - 1e-6])
def test_dropout_has_its_rate(p: float) -> None:
    torch.manual_seed(3)
    x = torch.empty(1001, 999)  # no multiple of the 4 elements of a draw
    mask, kept = draw_mask(x, p)
    assert mask.shape == x.shape
    assert 0 <= kept - (1 - p) < 2**-16
    deviation = math.sqrt(kept * (1 - kept) / x.numel())
    for i in range(4):  # the place in a draw
        assert abs(mask.flatten()[i::4].double().mean() - kept) <= 4 * 2 * deviation


def test_the_seed_decides_the_mask_and_the_numbers_after_it() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append((*draw_mask(torch.empty(9, 7), 0.4)[:1], torch.rand(3)))
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_without_the_adapter_the_base_computes() -> None:
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(4, IN, dtype=torch.float64)
    ours._disable_adapters = True
    assert torch.equal(ours(x), ours.base_layer(x))


@pytest.mark.parametrize("tapped", [False, True])
def test_keeps_the_input_the_mask_and_a_narrow_product(tapped: bool) -> None:
    """A tap of pruning/criterion.py saves the same input."""
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        seen: Any = Tap.apply(x, x, None) if tapped else x
        ours.train()(seen)
    if tapped:
        assert kept.pop(0).data_ptr() == x.data_ptr()
    parameters = {parameter.data_ptr() for parameter in ours.parameters()}
    assert kept[0].data_ptr() == x.data_ptr()  # no copy: neighbours keep the same
    found = [
        (tuple(tensor.shape), tensor.dtype)
        for tensor in kept
        if tensor.data_ptr() not in parameters
    ]
    wide, narrow = (2, 5, IN), (2, 5, PEFT_CONFIG.r)
    assert found == [(wide, torch.float64), (wide, torch.uint8), (narrow, torch.float64)]
