"""The parts of tests/benchmarks/quality.py that a wrong table could come from."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.config_file import load_config
from tests.benchmarks.expand_heads import expanded_model
from tests.benchmarks.quality import basis_of, parse_arguments, trial_name
from tests.benchmarks.quality_settings import SETTINGS, select
from tests.benchmarks.quality_table import LINES, PANELS, draw, rows_of, table
from tests.benchmarks.round_nf4 import BLOCK, LEVELS, round_nf4
from tests.oracle.models import make_tiny_llama

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_repeated_heads_compute_the_same(tmp_path: Path) -> None:
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 8, "hidden": 48, "ffn": 20, "layers": 2, "vocab": 97, "seed": 0}
    source = make_tiny_llama(tmp_path / "gqa", biases=True, **sizes)  # type: ignore[arg-type]
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (source, expanded_model(source, tmp_path / "mha"))]
    assert models[1].config.num_key_value_heads == 6
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 1])
def test_nf4_rounds_to_the_nearest_level_of_each_block(hidden: int) -> None:
    weight = torch.randn(2 * BLOCK, 2 * BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = round_nf4(weight, hidden)
    blocks, found = (m.float().movedim(hidden, -1).unflatten(-1, (-1, BLOCK)) for m in (weight, rounded))
    scale = blocks.abs().amax(-1, keepdim=True)
    grid = (LEVELS * scale[..., None]).bfloat16().float()
    assert not (grid - found[..., None]).abs().amin(-1).any()
    nearest = (LEVELS * scale[..., None] - blocks[..., None]).abs().amin(-1)
    # A level is rounded to bf16 once: at most 2^-9 of it.
    assert torch.all((found - blocks).abs() <= nearest + found.abs() / 256)


def made_up_run(setting: str, seed: int, test: float) -> dict:
    params = {"linear_dense": 1000, "linear_pruned": 583}
    return {
        "setting": setting,
        "group": "levers",
        "seed": seed,
        "tokens": 81920,
        "seconds": 100.0,
        "perplexity": {"validation": 50.0, "test": test, "other": 2 * test},
        "report": {"params": params},
    }


def test_a_row_has_mean_and_spread_of_its_seeds_alone(tmp_path: Path) -> None:
    runs = [made_up_run("plain", 0, 90.0), made_up_run("refit", 0, 70.0), made_up_run("plain", 1, 86.0)]
    plain, refit = rows_of(runs)
    assert (plain["setting"], plain["seeds"]) == ("plain", [0, 1])
    assert plain["test"] == {"mean": 88.0, "spread": 4.0}
    assert refit["other"] == {"mean": 140.0, "spread": 0.0}
    assert plain["removed_linear_fraction"] == pytest.approx(0.417)
    assert [line.split()[0] for line in table([plain, refit]).splitlines()] == ["setting", "plain", "refit"]
    draw(tmp_path / "quality.png", [plain, refit], {"test": 50.0, "other": 20.0})
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_every_setting_is_a_run_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--tune", "a", "--test", "b"])
    ranks = parse_arguments().ranks
    for setting in SETTINGS.values():
        config = load_config("launch/configs/quickstart.yaml", setting.overrides)
        tokens = (config.train.steps or 0) + config.train.recovery_steps
        tokens *= config.train.global_batch_size * config.data.window
        assert config.train.gradient_accumulation_steps(ranks) in (1, 2)
        last = setting.name.rpartition("-")[2]
        assert tokens == (int(last) if last in ("10240", "20480", "409600") else 81_920), setting.name
    with pytest.raises(SystemExit, match="no setting best"):
        select([], ["best"])


RECIPES = {
    "tuned": "fisher-refit-4-steps",
    "general": "fisher-refit-distillation-global-4-steps",
    "stock": "fisher-refit-stock-4-steps-end-0.5",
}


@pytest.mark.parametrize(("recipe", "setting"), RECIPES.items())
def test_a_recipe_is_what_was_measured(recipe: str, setting: str) -> None:
    shipped = load_config(f"launch/configs/recipe-{recipe}.yaml")
    # Two ranks share its step, too. The loss does not depend on the micro-batches.
    measured = load_config("launch/configs/quickstart.yaml", [*SETTINGS[setting].overrides, "train.micro_batch_size=4"])
    for section in ("lora", "prune", "train", "evaluate", "deepspeed"):
        assert getattr(shipped, section) == getattr(measured, section), section
    assert (shipped.model.dtype, shipped.data.window) == (measured.model.dtype, measured.data.window)


def test_the_table_of_recipes_has_what_was_measured() -> None:
    measured = {row["setting"]: row for row in json.loads((RESULTS / "quality.json").read_text())["rows"]}
    text = (RESULTS.parents[2] / "launch/configs/README.md").read_text()
    files = {f"recipe-{recipe}.yaml`:": setting for recipe, setting in RECIPES.items()}
    for file, setting in (files | {"quickstart.yaml` with": "plain"}).items():
        (row,) = [line for line in text.splitlines() if line.startswith("|") and file in line]
        found = measured[setting]
        means = [found[text]["mean"] for text in ("validation", "test", "other")]
        assert "{:.1f} / {:.1f} / {:.0f} | {} |".format(*means, len(found["seeds"])) in row, setting
    tried = measured["gqa-all-three-stock"]
    means = [tried[text]["mean"] for text in ("validation", "test", "other")]
    assert "{:.1f} / {:.1f} / {:.0f} (one seed)".format(*means) in text
    assert len(tried["seeds"]) == 1


def test_the_picture_draws_settings_that_exist() -> None:
    assert set(LINES) <= set(SETTINGS)
    assert all(any(name.endswith(suffix) for name in SETTINGS) for _, suffix, _, _ in PANELS)


def test_a_result_of_other_settings_texts_or_windows_is_not_taken_for_this_one(tmp_path: Path) -> None:
    texts = {"tune": tmp_path / "tune.txt", "test": tmp_path / "test.txt"}
    for path in texts.values():
        path.write_text("words")
    found = [basis_of(SETTINGS[name], texts, 160) for name in ("plain", "refit", "gqa-plain")]
    found.append(basis_of(SETTINGS["plain"], texts, 5))
    again = basis_of(SETTINGS["plain"], texts, 160)
    texts["tune"].write_text("other words")
    found.append(basis_of(SETTINGS["plain"], texts, 160))
    assert [basis == again for basis in found] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ([], ""),
        (["--steps", "2"], "trial-2-steps"),
        (["--windows", "5", "--model", "x/small"], "trial-small-5-windows"),
    ],
)
def test_a_trial_is_kept_apart(given: list[str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--tune", "a", "--test", "b", *given])
    assert trial_name(parse_arguments()) == folder
