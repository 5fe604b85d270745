"""A base that bitsandbytes holds: what it becomes, that it is pruned like its 16-bit twin, and what is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from peft import prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerState

from loraprune_ds import LoraPruneCallback, PruneConfig, Pruning
from loraprune_ds.engine.torch_state import check_optimizer
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.codecs import INT8, NF4
from loraprune_ds.model.frozen import Blocks, Slice, stored_tensors
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pretrained import sources
from loraprune_ds.session.live import base_shape
from loraprune_ds.session.quantised import adopt_quantised
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import PRUNE, STEPS, train
from tests.support.qlora import DOUBLE, EIGHT, NF4_BITS, SIZES, load, stored_and_loaded, with_lora
from tests.support.refusals import must_name

BNB: Any = bitsandbytes  # it marks nothing as public
IDS = torch.arange(5, 85).view(4, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), biases=True, dtype="bfloat16", **SIZES)


def linears(model: Any) -> dict[str, Any]:
    """Returns the linears of the decoder layers, by their name and layer."""
    named: dict[str, Any] = {}
    shape = base_shape(model)
    for i, layer in enumerate(decoder_layers(model)):
        for spec in shape.layers[i].linears:
            named[f"{shape.prefix(i)}{spec.linear}"] = layer.get_submodule(spec.linear)
    return named


def weight_of(module: Any) -> Tensor:
    return module.base_layer.stored_as.join(stored_tensors(module.base_layer))


def loses_columns(name: str) -> bool:
    return name.endswith(("o_proj", "down_proj"))


def bits_of(module: Any) -> Tensor:
    """Returns the weight of bitsandbytes' linear, by its own functions."""
    weight = module.base_layer.weight
    if hasattr(weight, "quant_state"):
        return BNB.functional.dequantize_4bit(weight.data, weight.quant_state)
    return BNB.functional.int8_vectorwise_dequant(weight.data, weight.SCB).bfloat16()


CASES: dict[str, Callable[[Path], Any]] = {
    "nf4": partial(load, bits=NF4_BITS),
    "double": partial(load, bits=DOUBLE),
    "default dtype": partial(
        load, bits={key: NF4_BITS[key] for key in ("load_in_4bit", "bnb_4bit_quant_type")}
    ),
    "storage": partial(load, bits=DOUBLE | {"bnb_4bit_quant_storage": torch.bfloat16}),
    "fp16": partial(load, bits=NF4_BITS, dtype=torch.float16),
    "k-bit": lambda folder: prepare_model_for_kbit_training(load(folder, NF4_BITS)),
    "8 bits": partial(load, bits=EIGHT),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_keep_their_bits_and_columns_come_from_the_files(case: str, folder: Path) -> None:
    model = with_lora(CASES[case](folder))
    dense = load(folder, None).state_dict()
    before = {name: bits_of(module) for name, module in linears(model).items()}
    lora = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    held_by_ddp = [module.base_layer.weight for module in linears(model).values()]
    adopt_quantised(model, refits=True)
    adopt_quantised(model, refits=True)
    assert not any(weight.numel() or vars(weight) for weight in held_by_ddp)
    assert all(model.get_parameter(name) is parameter for name, parameter in lora.items())
    for name, module in linears(model).items():
        weight = weight_of(module)
        source = dense[f"{name}.weight"].to(weight.dtype)
        error = float((weight - source).norm() / source.norm())
        in_4_bits = case != "8 bits" and not loses_columns(name)
        assert module.base_layer.stored_as.codec == (NF4 if in_4_bits else INT8)
        assert (0.05 if in_4_bits else 0.0) < error < (0.15 if in_4_bits else 0.02)
        if in_4_bits:
            assert weight.dtype == before[name].dtype
            assert torch.equal(weight, before[name])


def test_an_evaluation_before_leaves_the_codes(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes packs the weights then, with scales in bf16. It fails where inputs are not 64s."""
    folder = make_tiny_llama(tmp_path, dtype="bfloat16", **dict(SIZES, ffn=128))
    fresh, evaluated = load(folder, DOUBLE), load(folder, DOUBLE).eval()
    with torch.no_grad():
        evaluated(IDS)
    models = [with_lora(base) for base in (fresh, evaluated)]
    for model in models:
        adopt_quantised(model, refits=False)
    expected, found = map(linears, models)
    for name, module in found.items():
        assert torch.equal(module.base_layer.weight, expected[name].base_layer.weight)
        torch.testing.assert_close(
            weight_of(module), weight_of(expected[name]), rtol=2e-2, atol=1e-3
        )


def test_without_the_files_columns_are_rounded_a_second_time(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So it is with a base that was stored in 4 bits, and with one that was changed in memory."""
    dense = load(folder, None).state_dict()
    changed = load(folder, NF4_BITS)
    down = changed.model.layers[0].mlp.down_proj
    other = dense["model.layers.1.mlp.down_proj.weight"]
    down.weight = BNB.nn.Params4bit(other, False, quant_type="nf4").to("cpu")
    for base in (stored_and_loaded(tmp_path, folder), changed):
        model = with_lora(base)
        caplog.clear()
        adopt_quantised(model, refits=True)
        (warning,) = caplog.messages
        assert "model.layers.0." in warning
        source = dense["model.layers.0.mlp.down_proj.weight"] if base is not changed else other
        weight = weight_of(linears(model)["model.layers.0.mlp.down_proj"])
        assert 0.05 < float((weight - source).norm() / source.norm()) < 0.15


def test_the_files_of_a_hub_id_are_in_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = tmp_path / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / "abc").symlink_to(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    find = partial(try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(sources, "try_to_load_from_cache", find)
    for name, warnings in (
        ("someone/tiny", 0),
        ("someone/other", 1),
        ("/a/folder/that/is/gone", 1),
    ):
        base = load(folder, NF4_BITS)
        base.config._name_or_path = name
        caplog.clear()
        adopt_quantised(with_lora(base), refits=True)
        assert len(caplog.messages) == warnings


def twins(folder: Path, bits: dict[str, Any]) -> tuple[Any, Any]:
    """Makes a quantised model without refits, and one in bf16 with the weights that it computes with."""
    model = with_lora(load(folder, bits))
    adopt_quantised(model, refits=False)
    base = load(folder, None)
    for name, module in linears(model).items():
        base.get_submodule(name).weight.data = weight_of(module).contiguous()
    twin = with_lora(base)  # whose LoRA PEFT has rounded to bf16
    lora = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    twin.load_state_dict(lora, strict=False)
    return model, twin


@pytest.mark.parametrize(
    ("bits", "criterion"), [(NF4_BITS, "lora"), (DOUBLE, "fisher"), (EIGHT, "fisher")]
)
def test_it_is_pruned_like_its_twin_and_every_cut_takes_slices(
    folder: Path, tmp_path: Path, bits: dict[str, Any], criterion: str
) -> None:
    model, twin = twins(folder, bits)
    start = {
        name: [tensor.clone() for tensor in stored_tensors(module.base_layer)]
        for name, module in linears(model).items()
    }
    dense = base_shape(model)
    more: dict[str, Any] = {"criterion": criterion, "compensate": "none", "lr": 1e-3}
    rows, _, _ = train(model, torch.optim.AdamW, out=tmp_path / "model", **more)
    other, _, _ = train(twin, torch.optim.AdamW, **more)
    assert rows[0][1] != rows[-1][1]
    for (scores, kept), (twin_scores, twin_kept) in zip(rows, other, strict=True):
        assert kept == twin_kept
        torch.testing.assert_close(scores, twin_scores, rtol=0.0, atol=0.0)
    kept = iter(rows[-1][1])
    for i, layer in enumerate(dense.layers):
        keep = LayerKeep((kind, torch.tensor(next(kept))) for kind in ("heads", "channels"))
        for spec in layer.linears:
            name = f"{dense.prefix(i)}{spec.linear}"
            base = linears(model)[name].base_layer
            part = base.stored_as.kept(Slice(spec.axis, spec.kept_indices(keep)))
            for first, now in zip(start[name], stored_tensors(base), strict=True):
                assert torch.equal(now, first.index_select(*part))
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True, dtype="auto"
    ).eval()
    assert exported.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    with torch.no_grad():
        live = model.eval()(IDS).logits.float()
        found = exported(IDS).logits.float()
    # merging rounds to bf16, 2⁻⁹ of a weight
    assert float((found - live).norm() / live.norm()) < 2e-2


def test_a_refit_rewrites_int8_alone_and_a_second_training_may_begin_one(folder: Path) -> None:
    model = with_lora(load(folder, NF4_BITS))
    train(model, compensate="none", ratio=0.1)
    for name, module in linears(model).items():
        expected = Blocks(NF4, torch.bfloat16, loses_columns(name))
        assert module.base_layer.stored_as == expected
    rows, _, _ = train(model, compensate="least_squares", criterion="fisher")
    assert rows[0][1] != rows[-1][1]
    for name, module in linears(model).items():
        assert module.base_layer.stored_as.codec == (INT8 if loses_columns(name) else NF4)
    must_name("save_model", model.merge_and_unload)
    with model.disable_adapter(), torch.no_grad():  # the reference of DPO
        reference = model(IDS).logits
    assert not torch.equal(reference, model(IDS).logits)


def test_trl_s_cast_of_lora_is_undone_before_there_is_an_optimizer(folder: Path) -> None:
    model = with_lora(load(folder, NF4_BITS), modules_to_save=["lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    args = cast(Any, SimpleNamespace(output_dir="unused", fp16=False))
    begin = partial(LoraPruneCallback(PruneConfig()).on_init_end, args, TrainerState())
    begin(cast(Any, None), model=model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    config = SimpleNamespace(config={"zero_optimization": {"stage": 3}})
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=config)
    must_name("ZeRO-3 DDP model.frozen", begin, None, model=model)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(BNB.optim).values() if isinstance(kind, type)],
    ids=lambda kind: kind.__name__,
)
def test_the_state_of_its_optimizers_is_cut_by_none(kind: type) -> None:
    if issubclass(kind, torch.optim.Optimizer):
        must_name(f"{kind.__name__} adamw_torch", check_optimizer, kind.__new__(kind))


def test_a_cast_of_the_model_leaves_what_stores_its_weights(folder: Path) -> None:
    model = with_lora(load(folder, NF4_BITS))
    eight = with_lora(load(folder, EIGHT, dtype=torch.float32))
    for base in (model, eight):
        adopt_quantised(base, refits=False)
        before = {name: weight_of(module) for name, module in linears(base).items()}
        base.to(torch.float16).bfloat16()
        assert base.dtype == torch.bfloat16
        for name, module in linears(base).items():
            assert torch.equal(weight_of(module), before[name])
        assert base(IDS).logits.dtype == torch.bfloat16


def narrow(folder: Path) -> Any:
    small = make_tiny_llama(folder / "narrow", hidden=32, dtype="bfloat16")
    return with_lora(load(small, NF4_BITS))


def changed(name: str, value: object) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        model = with_lora(load(folder, NF4_BITS))
        weight = cast(Any, decoder_layers(model)[0]).self_attn.q_proj.base_layer.weight
        setattr(weight if name == "ds_tensor" else weight.quant_state, name, value)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "optimizer", "names"),
    [
        (
            lambda folder: with_lora(load(folder, NF4_BITS | {"bnb_4bit_quant_type": "fp4"})),
            torch.optim.AdamW,
            "model.layers.0.self_attn.q_proj fp4 bnb_4bit_quant_type='nf4'",
        ),
        (changed("blocksize", 128), torch.optim.AdamW, "model.layers.0.self_attn.q_proj 128 64"),
        (changed("ds_tensor", None), torch.optim.AdamW, "ZeRO-3 DDP model.frozen"),
        (narrow, torch.optim.AdamW, "model.layers.0.self_attn.q_proj 32 64"),
        (
            lambda folder: with_lora(load(folder, NF4_BITS), use_dora=True),
            torch.optim.AdamW,
            "layer 0 self_attn.q_proj",
        ),
        (
            partial(lambda folder: with_lora(load(folder, NF4_BITS))),
            BNB.optim.PagedAdamW8bit,
            "adamw_torch",
        ),
    ],
)
def test_what_cannot_be_cut_is_named(
    make: Callable[[Path], Any], optimizer: Any, names: str, folder: Path
) -> None:
    model = make(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    must_name(names, Pruning, model, optimizer(trained, lr=1e-3), PRUNE, STEPS)
