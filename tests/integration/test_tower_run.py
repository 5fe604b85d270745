"""A whole run on a multimodal model: the text part is cut on two ranks, and the tower is copied."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loraprune_ds.config_file import config_from_dict, read_config
from loraprune_ds.errors import UserError
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import write_json
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support.multimodal import load_whole, multimodal
from tests.support.ranks import RankFailure, RankPool
from tests.support.resuming import config_for, metrics, read_tensors, run_here, write_run

STEPS = 6
PROCESSOR = "preprocessor_config.json"


def write_whole(folder: Path, outer: str) -> tuple[Path, PreTrainedModel]:
    """Writes a tiny multimodal model next to the model of `write_run`."""
    whole, source = multimodal(outer), folder / "whole"
    shutil.copytree(
        folder / "source", source, ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    shutil.copy(folder / "source" / "tokenizer_config.json", source)
    write_json(
        source / PROCESSOR,
        {"image_processor_type": "any", "auto_map": {"AutoProcessor": "code.Any"}},
    )
    whole.save_pretrained(source)
    return source, whole


def test_a_run_keeps_the_tower(ranks: RankPool, tmp_path: Path) -> None:
    """The checkpoint gives the same model. The adapter's base is the text class."""
    config = write_run(tmp_path, prune={"ranking": None, "prune_every": 3}, train={"steps": STEPS})
    out, (source, whole) = tmp_path / "out", write_whole(tmp_path, "qwen3_5")
    ranks.run(2, run_here, config_for(config, out, f"model.path={source}"))

    loaded = load_whole(out / "model")
    assert type(loaded) is type(whole)
    assert config_from_dict(read_config(out / "config.yaml")).prune.ranking == "uniform"
    cut, left = metrics(out, "cut")[-1], open_pretrained(out / "model").shape.counts
    assert {kind: [layer[kind] for layer in left] for kind in left[0]} == {
        kind: cut[kind] for kind in left[0]
    }
    assert 0 < left[0]["delta"] < 5
    given = {name: x for name, x in whole.state_dict().items() if "visual" in name}
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in given.items())
    assert "auto_map" not in (out / "model" / PROCESSOR).read_text()
    assert "Images were not tuned" in (out / "model" / "README.md").read_text()

    unfinished = tmp_path / "unfinished"
    export(find_contents(out / "checkpoints" / f"step-{STEPS}"), "hf", unfinished)
    found, wanted = read_tensors(unfinished), read_tensors(out / "model")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    export(find_contents(out), "adapter", tmp_path / "adapter")
    assert open_pretrained(tmp_path / "adapter" / "base").tower is None


def test_a_text_that_auto_model_for_causal_lm_lacks_is_cut_with_its_tower_alone(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = write_run(
        tmp_path, prune={"ranking": None, "prune_every": 3, "ratio": 0.2}, train={"steps": STEPS}
    )
    out, (source, whole) = tmp_path / "out", write_whole(tmp_path, "muse_glimmer")
    settings = f"model.path={source}", "deepspeed=null"
    with pytest.raises(RankFailure, match="AutoModelForCausalLM"):
        ranks.run(
            1, run_here, config_for(config, tmp_path / "text", *settings, "model.text_only=true")
        )
    ranks.run(1, run_here, config_for(config, out, *settings))
    assert type(load_whole(out / "model")) is type(whole)
    assert metrics(out, "cut")[-1]["channels"][0] < 23
    with pytest.raises(UserError, match="adapter"):
        export(find_contents(out), "adapter", tmp_path / "adapter")
