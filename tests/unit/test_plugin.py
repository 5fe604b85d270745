"""What plugins of other tools share: refusals before a model is loaded, the table, and the base of the next command."""

import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, PreTrainedConfig

from loraprune_ds import PruneConfig
from loraprune_ds.config_types import Ranking
from loraprune_ds.files import read_json
from loraprune_ds.hf.plugin import OPTIMIZERS, PLAIN, check_settings, drive, find_base
from loraprune_ds.hf.table import describe
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import make_schedule
from tests.oracle.models import make_tiny_llama
from tests.support.families import tiny_model
from tests.support.local_training import make_model, train_and_save
from tests.support.refusals import must_name
from tests.support.resuming import assert_equal_tensors, read_tensors

ALLOWED = {"adapter": ("lora", "qlora"), "use_dora": PLAIN, "optim": OPTIMIZERS}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AXOLOTL = (
    "axolotl",
    "axolotl.integrations",
    "axolotl.integrations.base",
    "axolotl.cli",
    "axolotl.cli.merge_lora",
)
PRUNE = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("dense"), layers=4)


@pytest.fixture
def settings(dense: Path, tmp_path: Path) -> dict[str, Any]:
    block = {"ratio": 0.3, "channel_multiple": 1}
    return {
        "base_model": str(dense),
        "adapter": "lora",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 20,
        "loraprune": block,
    }


def check(settings: dict[str, Any]) -> tuple[PruneConfig, list[str]]:
    return check_settings(settings, settings["base_model"], ALLOWED)


def test_a_block_has_the_settings_of_a_run(settings: dict[str, Any]) -> None:
    config, linears = check(settings)
    assert config == PruneConfig(ratio=0.3, channel_multiple=1)
    assert linears == LINEARS
    others = {
        "adapter": "qlora",
        "optim": "adamw_torch_fused",
        "lora_target_modules": LINEARS,
        "max_steps": -1,
    }
    assert check(settings | others)[0] == config
    check(settings | {"lora_target_modules": "all-linear"})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"loraprune": None}, "loraprune section {ratio: 0.3}"),
        ({"loraprune": {"ratoi": 0.3}}, "unknown key prune.ratoi known keys ratio"),
        ({"loraprune": {"ratio": 1.5}}, "prune.ratio 1.5"),
        ({"loraprune": {"sizes": [0.2, 0.3]}}, "prune.sizes second run"),
        ({"loraprune": {"ratio": 0.99, "channel_multiple": 1}}, "prune.ratio 0.99"),
        (
            {
                "loraprune": {
                    "channel_multiple": 1,
                    "warmup_fraction": 0.5,
                    "cooldown_fraction": 0.5 - 1e-15,
                },
                "max_steps": 100_000_000,
            },
            "prune.ratio train.steps",
        ),
        ({"adapter": None}, "adapter: None adapter: lora"),
        ({"use_dora": True}, "use_dora"),
        ({"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit optim: adamw_torch"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"torch_compile": True}, "torch_compile"),
        (
            {"lora_target_modules": ["q_proj", "v_proj"]},
            "lora_target_modules lacks down_proj, gate_proj, k_proj",
        ),
    ],
)
def test_what_cannot_be_pruned_is_one_line_before_a_model_is_loaded(
    settings: dict[str, Any], changes: dict[str, Any], names: str
) -> None:
    must_name(names, check, settings | changes)


def test_families_are_refused_by_config_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    configs: dict[str, PreTrainedConfig] = {
        "experts prepare_model": tiny_model("mixtral").config,
        "gpt2": GPT2Config(),
    }
    for names, config in configs.items():
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        must_name(names, check, settings | {"base_model": str(folder)})


def test_an_encoder_is_sent_to_the_trainer_that_trains_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    t5: Any = tiny_model("t5", dropout_rate=0.0, tie_word_embeddings=False)
    t5.config.save_pretrained(tmp_path / "t5")
    must_name("t5 Seq2SeqTrainer", check, settings | {"base_model": str(tmp_path / "t5")})


@pytest.mark.parametrize("found", ["base", "checkpoint-6/pruning"])
def test_the_folder_of_another_run_is_refused_and_its_resume_is_not(
    settings: dict[str, Any], found: str
) -> None:
    Path(settings["output_dir"], found).mkdir(parents=True)
    must_name(f"{found} resume_from_checkpoint new folder", check, settings)
    check(settings | {"auto_resume_from_checkpoints": True})


def test_the_table_tells_cuts_shapes_and_who_can_load_the_result(dense: Path) -> None:
    shape = shape_from_config(read_json(dense / "config.json"), "tiny")
    tables: dict[Ranking, list[str]] = {"uniform": ["heads", "channels"], "global": []}
    for ranking, lines in tables.items():
        config = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1, ranking=ranking)
        schedule = make_schedule(make_goal(config, shape), 12)
        table = describe(schedule, "float32", Path("out"))
        assert "30.0 %" in table[0]
        assert ", ".join(map(str, schedule.cut_steps)) + " of 12" in table[0]
        assert [line.split()[0] for line in table[2:-2] if line.split()[0] in shape.kinds] == lines
        assert ("trust_remote_code" in table[-2]) == (ranking == "global")
        assert any(f"{shape.total_numel() / 1e3:.1f} k" in line for line in table)


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a plugin leaves it: checkpoint, base and adapter."""
    out = tmp_path_factory.mktemp("trained")
    model = make_model(dense)
    pruning = train_and_save(model.train(), PRUNE, out)
    pruning.save_base(out / "base")
    for folder in (out, out / "checkpoint-4"):
        model.save_pretrained(folder)
    return out


def test_a_base_is_found_and_that_of_a_checkpoint_is_written(trained: Path) -> None:
    base = find_base(trained)
    assert base == trained / "base"
    of_checkpoint = find_base(trained / "checkpoint-4")
    assert_equal_tensors(read_tensors(of_checkpoint), read_tensors(base))
    stamp = of_checkpoint.stat().st_mtime_ns
    assert find_base(trained / "checkpoint-4").stat().st_mtime_ns == stamp


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin beside stand-ins for what it imports of Axolotl. tests/axolotl.sh has the real ones."""
    packages: dict[str, Any] = {name: ModuleType(name) for name in AXOLOTL}
    packages[AXOLOTL[2]].BasePlugin = object
    packages[AXOLOTL[-1]].merge_lora_sharded_efficient = dict
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return import_module("loraprune_ds.hf.axolotl").LoraPrunePlugin()


@pytest.mark.parametrize("all_linears", [True, False])
def test_axolotl_trains_lora_where_scores_are(
    axolotl: Any, settings: dict[str, Any], all_linears: bool
) -> None:
    settings |= {"lora_target_linear": all_linears, "lora_mlp_kernel": True}
    settings |= {"merge_lora": False, "inference": False}
    axolotl.register(settings)
    axolotl.load_datasets(settings)
    assert settings.get("lora_target_modules") == (None if all_linears else LINEARS)
    assert settings["lora_mlp_kernel"] is False
    assert axolotl.add_callbacks_pre_trainer(settings, None) == [axolotl.callback]


def test_a_merge_in_axolotl_takes_the_base_as_it_is(axolotl: Any, trained: Path) -> None:
    qlora = {"adapter": "qlora", "load_in_4bit": True, "loraprune": {"ratio": 0.3}}
    settings = qlora | {"merge_lora": True, "lora_model_dir": str(trained)}
    axolotl.register(settings)
    command = sys.modules[AXOLOTL[-1]]
    assert settings["base_model"] == str(trained / "base")
    assert (settings["adapter"], settings["load_in_4bit"]) == ("lora", False)
    assert command.merge_lora_sharded_efficient(simulate_nf4=True) == {"simulate_nf4": False}


def take_other_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    make_tiny_llama(folder / "base", layers=4)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (shutil.rmtree, "base missing train"),
        (lambda folder: shutil.rmtree(folder / "base"), "base missing checkpoint-N"),
        (take_other_base, "does not fit different trainings lora_"),
    ],
)
def test_a_folder_that_is_gone_or_of_another_run_is_one_line(
    trained: Path, tmp_path: Path, spoil: Callable[[Path], object], names: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    spoil(folder)
    must_name(names, find_base, folder)


def test_a_training_ends_with_the_base_that_its_adapter_names(dense: Path, tmp_path: Path) -> None:
    """Under FSDP2, which would save no adapter of sharded states."""
    pruning = train_and_save(make_model(dense).train(), PRUNE, tmp_path)
    kinds: list[str] = []
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(set_state_dict_type=kinds.append))
    trainer = SimpleNamespace(
        train=lambda **given: given,
        args=SimpleNamespace(resume_from_checkpoint=None, output_dir=str(tmp_path)),
        accelerator=SimpleNamespace(print=print, state=state),
        is_fsdp_enabled=True,
    )
    callback: Any = SimpleNamespace(pruning=pruning, save_base=pruning.save_base)
    drive(trainer, callback)
    assert trainer.train() == {"resume_from_checkpoint": None}
    assert kinds == ["FULL_STATE_DICT"]
    assert (tmp_path / "base" / "config.json").is_file()
    assert not (tmp_path / "model").exists()
    adapter = pruning.peft_model.peft_config["default"].to_dict()
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
