"""The computations of tests/benchmarks/quality.py: repeated heads, settings, means, and results that are kept."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.config_file import load_config
from loraprune_ds.files import read_json
from tests.benchmarks.quality import basis_of, parse_arguments
from tests.benchmarks.quality_settings import GONE, SETTINGS, select
from tests.benchmarks.running import RESULTS
from tests.benchmarks.two_four import expanded_model
from tests.oracle.models import make_tiny_llama


def test_repeated_heads_compute_the_same(tmp_path: Path) -> None:
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 8, "hidden": 48, "ffn": 20, "layers": 2, "vocab": 97, "seed": 0}
    source = make_tiny_llama(tmp_path / "gqa", biases=True, **sizes)  # type: ignore[arg-type]
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (source, expanded_model(source, tmp_path / "mha"))]
    assert models[1].config.num_key_value_heads == 6
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_every_setting_is_a_run_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--tune", "a", "--test", "b"])
    ranks = parse_arguments().ranks
    for setting in SETTINGS.values():
        config = load_config("launch/configs/quickstart.yaml", setting.overrides)
        tokens = (config.train.steps or 0) + sum(config.recovery)
        tokens *= config.train.global_batch_size * config.data.window
        assert config.train.gradient_accumulation_steps(ranks) in (1, 2)
        last = "10240" if setting.group == "once" else setting.name.rpartition("-")[2]
        assert tokens == (int(last) if last in ("10240", "20480", "409600") else 81_920), setting.name
    with pytest.raises(SystemExit, match="no setting best"):
        select([], ["best"])


def test_every_published_row_is_a_setting_or_one_that_is_gone() -> None:
    published = {row["setting"] for row in read_json(RESULTS / "quality.json")["rows"]}
    assert set(GONE) <= published <= {*SETTINGS, *GONE}


def test_the_recipe_is_what_was_measured() -> None:
    shipped = load_config("launch/configs/recipe.yaml")
    # Two ranks share its step, too. The loss does not depend on the micro-batches.
    measured = load_config(
        "launch/configs/quickstart.yaml", [*SETTINGS["recipe"].overrides, "train.micro_batch_size=4"]
    )
    for section in ("lora", "prune", "train", "evaluate", "deepspeed"):
        assert getattr(shipped, section) == getattr(measured, section), section
    assert (shipped.model.dtype, shipped.data.window) == (measured.model.dtype, measured.data.window)


def test_a_result_of_other_settings_or_texts_is_not_taken_for_this_one(tmp_path: Path) -> None:
    texts = {"tune": tmp_path / "tune.txt", "test": tmp_path / "test.txt"}
    for path in texts.values():
        path.write_text("words")
    found = [basis_of(SETTINGS[name], texts) for name in ("plain", "refit", "gqa-plain")]
    again = basis_of(SETTINGS["plain"], texts)
    texts["tune"].write_text("other words")
    found.append(basis_of(SETTINGS["plain"], texts))
    assert [basis == again for basis in found] == [True, False, False, False]
