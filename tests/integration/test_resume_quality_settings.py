"""Stops a run with `fisher`, refit, distillation, two sizes and recoveries. Resumed, it ends with the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.checkpoint.layout import sha256
from loraprune_ds.checkpoint.load import open_checkpoint
from loraprune_ds.cli.compare import read_results
from loraprune_ds.cli.run import summary_table
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.run import drop_later_models
from tests.support import resuming
from tests.support.families import heavy
from tests.support.ranks import RankPool
from tests.support.refusals import refused
from tests.support.resuming import (
    assert_same_run,
    config_for,
    losses,
    metrics,
    read_state,
    run_here,
    write_run,
)

STEPS, RECOVERY, CUTS, FIRST = 8, [1, 2], [3, 4, 9, 10], 6  # `prune.sizes` is not sorted
TOTAL, SIZE = STEPS + sum(RECOVERY), "model-0.2/model-00002-of-00004.safetensors"
NO_DROPOUT = ("lora.lora_dropout=0", "train.learning_rate=1e-3")
SECTIONS: dict[str, dict[str, Any]] = {
    "prune": resuming.REFITS | {"criterion": "fisher", "ratio": None, "sizes": [0.4, 0.2]},
    "train": {
        "steps": STEPS,
        "recovery_steps": RECOVERY,
        "distill_weight": 0.5,
        "distill_temperature": 2,
    },
    "checkpoint": {"every": None, "keep_last": 1},
}


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levers")
    ranks.run(2, run_here, config_for(write_run(folder, **SECTIONS), folder / "out"))
    return folder / "out"


def test_stopped_twice_and_taken_up_again(ranks: RankPool, straight: Path, tmp_path: Path) -> None:
    config = config_for(straight.parent / "config.yaml", tmp_path / "out")
    assert not any(ranks.run(2, run_here, config, None, 1))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    assert not any(ranks.run(2, run_here, config, "auto", FIRST))
    assert not (tmp_path / "out" / "model-0.2").exists()  # the run exports it at its end
    step = tmp_path / "out" / "checkpoints" / f"step-{FIRST}"
    assert len(list(step.glob("resume/passes-*.pt"))) == 2  # one of each rank
    assert all(ranks.run(2, run_here, config, "auto"))

    assert [cut["step"] for cut in metrics(straight, "cut")] == CUTS
    assert read_state(tmp_path / "out", TOTAL)["resumed_from"] == [1, FIRST]
    assert_same_run(tmp_path / "out", straight, TOTAL)
    assert sha256(tmp_path / "out" / SIZE) == sha256(straight / SIZE)
    assert not list(
        (straight / "checkpoints" / f"step-{TOTAL}").glob("resume/passes-*")
    )  # no cut is left that needs them


def test_a_run_killed_after_its_model_is_there_can_be_finished(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    """Kills it before status.json says "finished"."""
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert all(ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out), "auto"))
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


@pytest.fixture(scope="module")
def no_dropout(ranks: RankPool, straight: Path) -> Path:
    """Makes a run that others can be compared with. Dropout draws by micro-batch, so it is off."""
    out = straight.parent / "no_dropout"
    ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out, *NO_DROPOUT))
    return out


@pytest.mark.parametrize(
    ("before", "micro_batch_size", "after"),
    [heavy(2, 1, 3), (3, 2, 2)],  # at last three passes a step for two ranks
)
def test_goes_on_with_another_number_of_ranks(
    ranks: RankPool,
    no_dropout: Path,
    tmp_path: Path,
    before: int,
    micro_batch_size: int,
    after: int,
) -> None:
    """Stops between two cuts, so the next refit repeats passes of before and after the stop."""
    given = no_dropout.parent / "config.yaml"
    of_before = (*NO_DROPOUT, f"train.micro_batch_size={micro_batch_size}")
    ranks.run(before, run_here, config_for(given, tmp_path / "out", *of_before), None, FIRST - 1)
    moved = config_for(given, tmp_path / "out", *NO_DROPOUT)
    assert all(ranks.run(after, run_here, moved, "auto"))
    found, expected = (resuming.contents(out, TOTAL).kept for out in (tmp_path / "out", no_dropout))
    assert found == expected
    # sums in fp32 in another order, as in tests/numerics
    assert losses(tmp_path / "out") == pytest.approx(losses(no_dropout), abs=1e-5)


def test_the_learning_rate_rises_for_each_recovery_and_each_size(straight: Path) -> None:
    rates = [step["learning_rate"] for step in metrics(straight, "step")]
    assert rates == pytest.approx(
        [5e-3 * part for n in (4, 2, 4, 1) for part in (1 - s / n for s in range(n))]
    )
    assert metrics(straight, "step")[-1]["sparsity"] == pytest.approx(
        metrics(straight, "cut")[-1]["reached"]
    )


def test_a_size_is_exported_once_and_whole(ranks: RankPool, straight: Path, tmp_path: Path) -> None:
    """Goes on from the end of the training, with the model of the first size there, and killed while it was written."""
    out, written = tmp_path / "out", dict[str, Any]()
    config = config_for(straight.parent / "config.yaml", out)
    for left in ("model-0.2", ".model-0.2.1234.partial"):
        shutil.copytree(straight, out)
        shutil.rmtree(out / "model")
        (out / "model-0.2").rename(out / left)
        (out / left / "written").touch()
        (out / "status.json").write_text(
            (out / "status.json").read_text().replace("finished", "running")
        )
        assert all(ranks.run(2, run_here, config, "auto"))
        written[left] = (out / "model-0.2" / "written").exists()
        assert sha256(out / SIZE) == sha256(straight / SIZE)
        shutil.rmtree(out)
    assert list(written.values()) == [True, False]


def test_the_shelf(straight: Path) -> None:
    report = read_json(straight / "report.json")
    first, last = report["shelf"]
    assert [first["size"], first["folder"], first["step"]] == ["0.2", "model-0.2", FIRST]
    assert [last["size"], last["folder"], last["step"]] == ["0.4", "model", TOTAL]
    assert (
        last["parameters"]
        == report["params"]["pruned"]
        < first["parameters"]
        < report["params"]["dense"]
    )
    assert last["perplexity"] == report["perplexity"]["pruned"]
    assert first["perplexity"] is not None
    assert first["tokens"] * TOTAL == last["tokens"] * FIRST
    for row in (first, last):
        model = open_pretrained(straight / row["folder"]).shape
        assert model.total_numel() == row["parameters"]
        assert row["kv_bytes_per_token"] == 2 * 2 * model.head_dim * sum(
            layer["heads"] for layer in model.counts
        )
    models = [model.name for model in read_results([straight])]
    assert models == ["out/model-0.2", "out"]
    assert "0.2 " in summary_table(report, straight)


def test_a_resume_elsewhere_past_a_size_lists_what_is_there(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(straight, tmp_path / "source")
    config = config_for(straight.parent / "config.yaml", tmp_path / "out")
    assert all(ranks.run(2, run_here, config, str(source / "checkpoints" / f"step-{TOTAL}")))
    assert [row["folder"] for row in read_json(tmp_path / "out" / "report.json")["shelf"]] == [
        "model-0.2",
        "model",
    ]
    assert sha256(tmp_path / "out" / SIZE) == sha256(straight / SIZE)
    shutil.rmtree(source / "checkpoints" / f"step-{FIRST}")
    config = config_for(straight.parent / "config.yaml", tmp_path / "without")
    assert all(ranks.run(2, run_here, config, str(source / "checkpoints" / f"step-{TOTAL}")))
    assert [row["folder"] for row in read_json(tmp_path / "without" / "report.json")["shelf"]] == [
        "model"
    ]
    assert read_json(tmp_path / "without" / "status.json")["error"] is None


def test_the_step_of_a_size_stays_for_exports_alone(straight: Path, tmp_path: Path) -> None:
    step = straight / "checkpoints" / f"step-{FIRST}"
    assert not (step / "resume").exists()
    assert (straight / "checkpoints" / f"step-{TOTAL}" / "resume").exists()
    export(find_contents(step), "hf", tmp_path / "again")
    resuming.assert_equal_tensors(
        resuming.read_tensors(tmp_path / "again"), resuming.read_tensors(straight / "model-0.2")
    )
    (tmp_path / "out").mkdir()
    again = config_for(straight.parent / "config.yaml", tmp_path / "other")
    assert "resume" in refused(open_checkpoint, step, Communicator(), resume=True)
    assert OutputFolder(again.to_dict(), str(step)).config.prune == again.prune


def test_models_of_later_steps_that_an_earlier_start_left_go(tmp_path: Path) -> None:
    sizes, made = (
        {6: "0.2", 8: "0.3", 11: "0.4"},
        ("model-0.2", "model-0.3", "model", ".model.exported"),
    )
    for name in made:
        (tmp_path / name).mkdir()
    assert drop_later_models(tmp_path, sizes, 11, 11) == []
    lines = drop_later_models(tmp_path, sizes, 11, 6)
    assert [line.partition("/")[0] for line in lines] == ["model-0.3", ".model.exported", "model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-0.2"]
    (line,) = drop_later_models(tmp_path, sizes, 11, 0)  # again from the start
    assert "model-0.2" in line
