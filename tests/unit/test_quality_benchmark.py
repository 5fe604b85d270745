"""The settings of tests/benchmarks/quality.py are run configs, and the shipped recipe is one of them."""

from loraprune_ds.config_file import config_from_dict, read_config
from tests.benchmarks.quality_settings import SETTINGS


def test_every_setting_is_a_run_config() -> None:
    for setting in SETTINGS.values():
        config = config_from_dict(read_config("tests/benchmarks/base.yaml", setting.overrides))
        tokens = (config.train.steps or 0) + sum(config.recovery)
        tokens *= config.train.global_batch_size * config.data.window
        last = "10240" if setting.group == "once" else setting.name.rpartition("-")[2]
        assert tokens == (int(last) if last in ("10240", "20480", "409600") else 81_920), (
            setting.name
        )


def test_the_recipe_is_what_was_measured() -> None:
    shipped = config_from_dict(read_config("launch/configs/recipe.yaml"))
    # Two ranks share its step, too. The loss does not depend on the micro-batches.
    overrides = [*SETTINGS["recipe"].overrides, "train.micro_batch_size=4"]
    measured = config_from_dict(read_config("tests/benchmarks/base.yaml", overrides))
    for section in ("lora", "prune", "train", "evaluate", "deepspeed"):
        assert getattr(shipped, section) == getattr(measured, section), section
    assert (shipped.model.dtype, shipped.data.window) == (
        measured.model.dtype,
        measured.data.window,
    )
