"""A model that cannot be pruned inside a foreign trainer is refused in one line, before the first step."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    TrainerControl,
    TrainerState,
)

from loraprune_ds.config import PruneConfig
from loraprune_ds.hf.arguments import check_arguments
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.local.live import LiveLocal
from loraprune_ds.model.adapters import set_sizes
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.session.checkpoint import PruningCheckpoint
from loraprune_ds.session.checks import check_model
from loraprune_ds.session.live import base_dtype, base_shape, find_peft_model, live_shape
from loraprune_ds.session.preparing import linear_names, lora_config, prepare_model
from loraprune_ds.zero.external_engine import share_model
from tests.support.families import LLAMA_LINEARS, tiny_model
from tests.support.multimodal import multimodal
from tests.support.refusals import must_name

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
ALL = [linear.name.rpartition(".")[2] for linear in LLAMA_LINEARS]
CONTROL = cast(Any, None)


def base(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **more)
    )


def adapted(base_model: PreTrainedModel | None = None, **more: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": ALL, "task_type": "CAUSAL_LM"} | more)
    return cast(PeftModel, get_peft_model(base_model or base(), config))


def test_plain_lora_passes_also_beside_another_adapter_and_an_untied_head_that_trains() -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("ref", LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM"))
    check(model)
    assert live_shape(model) == base_shape(model)
    assert base_dtype(model, base_shape(model)) == "float32"
    layer, smaller = decoder_layers(model)[0], LayerCounts(heads=1, channels=20)
    # a cut tells all adapters their sizes
    set_sizes(layer, base_shape(model).layers[0].resized(smaller))
    for adapter in ("default", "ref"):
        module = cast(Any, layer).mlp.up_proj
        assert (module.lora_B[adapter].out_features, module.lora_A[adapter].in_features) == (20, 16)
        assert (module.lora_A[adapter].out_features, module.base_layer.out_features) == (
            module.r[adapter],
            20,
        )
        assert cast(Any, layer).mlp.down_proj.lora_A[adapter].in_features == 20


def test_a_head_of_its_own_is_seen_though_the_config_calls_it_tied() -> None:
    """So is it in transformers, where the files hold two different tensors."""
    assert base_shape(adapted(base(tie_word_embeddings=True))).tie_word_embeddings
    model = base(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    assert not base_shape(adapted(model)).tie_word_embeddings


def test_a_hybrid_passes_with_the_linears_of_both_sorts_of_layers() -> None:
    model = tiny_model("qwen3_5_text")
    names = linear_names(model)
    assert {"in_proj_qkv", "q_proj"} < set(names)
    adapted_model = adapted(cast(Any, model), target_modules=names)
    check(adapted_model)
    assert live_shape(adapted_model) == base_shape(adapted_model)
    without = adapted(
        cast(Any, tiny_model("qwen3_5_text")), target_modules=[x for x in names if x != "q_proj"]
    )
    must_name("layer 1 self_attn.q_proj target_modules in_proj_qkv", check, without)


def test_a_mixture_passes_once_its_experts_are_stacks() -> None:
    model: Any = tiny_model("deepseek_v3")
    names = linear_names(model)
    attention = [name for name in names if name not in ("gate_up", "down")]
    must_name("deepseek_v3 prepare_model", check, adapted(model, target_modules=attention))
    model = tiny_model("deepseek_v3")
    assert prepare_model(model) is model
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(model(ids).logits, tiny_model("deepseek_v3")(ids).logits, atol=1e-6)
    for config in (lora_config(model, r=2), LoraConfig(r=2, target_modules=names)):
        stacked: Any = tiny_model("deepseek_v3")
        prepared = cast(PeftModel, get_peft_model(prepare_model(stacked), config))
        check(prepared)
        assert live_shape(prepared) == base_shape(prepared)


def test_a_t5_passes_once_each_layer_has_its_bias(caplog: pytest.LogCaptureFixture) -> None:
    t5: Any = tiny_model("t5", dropout_rate=0.1, tie_word_embeddings=False)
    must_name("t5 prepare_model", check, adapted(t5, target_modules=linear_names(t5)))
    own: Any = prepare_model(tiny_model("t5", dropout_rate=0.1, tie_word_embeddings=False))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        own(ids, decoder_input_ids=ids).logits, t5(ids, decoder_input_ids=ids).logits
    )
    model = adapted(own, target_modules=linear_names(own))
    check(model)
    assert live_shape(model) == base_shape(model)
    assert not base_shape(model).tie_word_embeddings
    assert not caplog.messages
    noisy: Any = tiny_model("umt5", dropout_rate=0.1)
    noisy = adapted(noisy, target_modules=linear_names(noisy))
    check(noisy)
    assert "dropout_rate=0.1" in caplog.messages.pop()
    must_name("umt5 float16", check, noisy.half())


def check(model: torch.nn.Module) -> None:
    peft_model = find_peft_model(model)
    base_dtype(peft_model, base_shape(peft_model))
    check_model(peft_model)


def olmo2_that_trains_a_norm() -> PeftModel:
    model = Olmo2ForCausalLM(Olmo2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    return cast(
        PeftModel,
        get_peft_model(model, LoraConfig(r=2, target_modules=ALL, modules_to_save=["q_norm"])),
    )


def changed(change: Callable[[Any], object]) -> Callable[[], torch.nn.Module]:
    def make() -> PeftModel:
        model = adapted()
        change(model)
        return model

    return make


def tied(**more: Any) -> Callable[[], torch.nn.Module]:
    return lambda: adapted(base(tie_word_embeddings=True), **more)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tied(target_modules=[n for n in ALL if n != "k_proj"]), "layer 0 self_attn.k_proj"),
        (tied(use_dora=True), "layer 0 self_attn.q_proj"),
        (tied(bias="all"), "default bias='all'"),
        (tied(modules_to_save=["lm_head"]), "modules_to_save"),
        (tied(trainable_token_indices=[1]), "model.embed_tokens trainable_token_indices"),
        (tied(target_modules=[*ALL, "lm_head"]), "lm_head"),
        (lambda: adapted(base(attention_bias=True, mlp_bias=True), lora_bias=True), "lora_bias"),
        (lambda: get_peft_model(base(), LoraConfig(r=2, target_modules=ALL), "mine"), "'default'"),
        (changed(lambda model: model.requires_grad_(False)), "q_proj 'default'"),
        (changed(lambda model: setattr(model.get_base_model(), "is_quantized", True)), "quantised"),
        (changed(lambda model: model.compile()), "torch.compile"),
        (changed(lambda model: model.to(torch.float64)), "torch.float64"),
        (base, "LlamaForCausalLM"),
        (lambda: adapted(multimodal("llava")), "LlavaForConditionalGeneration tower"),
        (lambda: adapted(multimodal("gemma3")), "Gemma3ForConditionalGeneration tower"),
        (olmo2_that_trains_a_norm, "model.layers.0.self_attn.q_norm"),
        (
            changed(lambda m: delattr(decoder_layers(m)[1].mlp, "gate_proj")),
            "layer 1 mlp.gate_proj",
        ),
    ],
)
def test_a_model_that_cannot_be_pruned_is_named(
    make: Callable[[], torch.nn.Module], names: str
) -> None:
    model = make()
    must_name(names, check, model)


def test_fp32_lora_beside_a_module_that_trains_in_bf16_is_refused() -> None:
    lora: dict[str, Any] = {
        "target_modules": ALL,
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(base().bfloat16(), LoraConfig(r=2, **lora))
    begin = LoraPruneCallback(PruneConfig()).on_init_end
    args, state = cast(Any, SimpleNamespace(output_dir="unused", fp16=False)), TrainerState()
    begin(args, state, CONTROL, model=model)  # DeepSpeed casts what is not born sharded
    for parameter in model.parameters():
        cast(Any, parameter).ds_tensor = None
    must_name(
        "bfloat16 float32 autocast_adapter_dtype=False", begin, args, state, CONTROL, model=model
    )
    model.requires_grad_(False)
    begin(args, state, CONTROL, model=model)


@pytest.mark.parametrize(
    "name",
    """load_best_model_at_end auto_find_batch_size fsdp_config n_gpu torch_compile use_vllm
    use_transformers_continuous_batching cache_implementation generation_kwargs precompute_ref_log_probs
    parallelism_config.sp_size parallelism_config.cp_size generation_config.cache_implementation""".split(),
)
def test_an_argument_that_does_not_allow_cuts_is_named(name: str) -> None:
    model, value = (
        base(),
        "static" if "cache" in name else 2 if "size" in name or name == "n_gpu" else True,
    )
    args = SimpleNamespace(
        cache_implementation=None, parallelism_config=SimpleNamespace(sp_size=1, cp_size=1)
    )
    sections = {
        "generation_kwargs": {"cache_implementation": "static"},
        "fsdp_config": {"version": 1},
    }
    value = sections.get(name, value)
    check_arguments(args, model)
    owners = {
        "generation_config": cast(Any, model).generation_config,
        "parallelism_config": args.parallelism_config,
    }
    setattr(owners.get(name.partition(".")[0], args), name.rpartition(".")[2], value)
    must_name(f"{name}={value}", check_arguments, args, model)


def zero_over(inner: Any) -> Any:
    """Stands in for ZeRO-3's optimizer around torch's."""
    zero: Any = object.__new__(DeepSpeedZeroOptimizer_Stage3)
    zero.optimizer, zero.dp_process_group = inner, "g"
    return zero


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("SGD", {"lr": 0.1}, "SGD"),
        ("Adafactor", {}, "Adafactor"),
        ("AdamW", {"amsgrad": True}, "Adam with amsgrad"),
    ],
)
def test_an_optimizer_without_adam_s_state_or_zero_3_is_refused(
    kind: str, options: dict[str, Any], name: str
) -> None:
    inner = getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(1))], **options)
    model = adapted()
    must_name(name, share_model, model, zero_over(inner), base_shape(model))
    must_name(f"ZeRO-3 {kind}", share_model, model, inner, base_shape(model))


# All of it is asked before the first step


def begins_with(
    names: str, model: Any, inner: Any, callback: Any = None, step: int = 0, **args: Any
) -> None:
    """Begins a training as a Trainer does, over a stand-in for ZeRO-3's optimizer. Checks what the refusal names."""
    state, zero = TrainerState(global_step=step, max_steps=10), zero_over(inner)
    given = cast(Any, SimpleNamespace(output_dir="unused", report_to=[], **args))
    begin = (callback or LoraPruneCallback(PruneConfig())).on_train_begin
    must_name(names, begin, given, state, CONTROL, model=model, optimizer=zero)


def test_a_training_begins_with_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    nvme = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    weights = [torch.nn.Parameter(torch.zeros(1))]
    adam, sgd = torch.optim.AdamW(weights), torch.optim.SGD(weights)
    begins_with("load_best_model_at_end=True", adapted(), adam, load_best_model_at_end=True)
    begins_with("DeepSpeed NVMe", adapted(), adam, deepspeed_plugin=nvme)
    begins_with("layer 0 self_attn.q_proj", adapted(target_modules=ALL[1:]), adam)
    begins_with("SGD", adapted(), sgd)
    monkeypatch.setattr(
        "loraprune_ds.zero.external_engine.dist.get_world_size",
        lambda group=None: 2 if group else 4,
    )
    begins_with("2 4 ranks", adapted(), adam)


def test_a_resume_needs_the_callback_s_own_and_the_same_schedule() -> None:
    begins_with("step 3", torch.nn.Linear(1, 1), None, step=3)
    state: Any = SimpleNamespace(step=3, origin=SimpleNamespace(steps=20, seed=1))
    for given, names in (({}, "20 10"), ({"steps": 20, "seed": 2}, "seed 1 2")):
        callback = LoraPruneCallback(PruneConfig(), **given)
        unused: Any = None
        callback._checkpoint = PruningCheckpoint(Path(), state, PruneConfig(), unused, LiveLocal())
        begins_with(names, adapted(), None, callback, step=3)


@pytest.mark.parametrize(
    ("rank", "strategy", "saves", "forgotten"),
    [
        (0, "steps", True, True),
        (0, "steps", False, False),
        (1, "steps", True, False),
        (0, "best", False, True),
    ],
)
def test_a_checkpoint_that_is_written_over_does_not_count_as_complete(
    tmp_path: Path, *, rank: int, strategy: str, saves: bool, forgotten: bool
) -> None:
    """It has `pruning/` of the training before, until the new one is there."""
    for step in (4, 6):
        pruning = tmp_path / f"checkpoint-{step}" / "pruning"
        pruning.mkdir(parents=True)
        (pruning / "state.json").touch()
    callback = LoraPruneCallback(PruneConfig())
    callback._pruning = cast(Any, SimpleNamespace(end_step=lambda: None))
    args = cast(
        Any,
        SimpleNamespace(output_dir=str(tmp_path), should_save=rank == 0, save_strategy=strategy),
    )
    callback.on_step_end(args, TrainerState(global_step=4), TrainerControl(should_save=saves))
    assert (tmp_path / "checkpoint-4" / "pruning").exists() != forgotten
    assert (tmp_path / "checkpoint-6" / "pruning").exists()


def test_before_the_training_there_is_nothing_to_save() -> None:
    must_name("training", LoraPruneCallback(PruneConfig()).save_model, "anywhere")


def test_an_evaluation_before_the_training_may_log() -> None:
    logs = {"eval_loss": 2.0}
    LoraPruneCallback(PruneConfig()).on_log(CONTROL, TrainerState(), CONTROL, logs=logs)
