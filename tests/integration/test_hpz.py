"""Checks hierarchical partitioning (hpZ): a cut reaches the second copy of the weights on each node."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.launching import ROOT, Ended, fork_ranks
from tests.support.resuming import losses, write_run

RANKS, PER_NODE = 4, 2
FFN = 93  # of the model that write_run makes
RUN = {
    "lora": {"lora_dropout": 0.0},
    "prune": {"channel_multiple": 1, "prune_every": 2},
    "train": {"steps": 6, "global_batch_size": 4},
}
METHOD = (
    "prune.criterion=fisher",
    "prune.compensate=least_squares",
    "train.distill_weight=0.5",
    "model.frozen=int8",
)


def watch_second_copies() -> None:
    """Reports every shard of a second copy when it is made. Called in a rank."""
    from deepspeed.runtime.zero.partition_parameters import Init

    partition = Init._partition_param_sec

    def watched(self: Any, param: Any, *arguments: Any, **named: Any) -> None:
        partition(self, param, *arguments, **named)
        sys.stderr.write(
            f"copy {tuple(param.ds_shape)} in pieces of {param.ds_secondary_tensor.numel()}\n"
        )

    Init._partition_param_sec = watched


def run(config: Path, name: str, *changes: str, resume: Path | None = None) -> Ended:
    folder = config.parent / f"{name}-outputs"
    folder.mkdir()
    words = [
        word
        for change in (f"output_dir={config.parent / name}", *changes)
        for word in ("--set", change)
    ]
    arguments = ["--config", str(config), *words, *(["--resume", str(resume)] if resume else [])]
    return fork_ranks(arguments, folder, ranks=RANKS, before=watch_second_copies, timeout=400)[
        0
    ].check()


def test_hpz_cuts_both_copies_and_changes_no_number(tmp_path: Path) -> None:
    config = write_run(tmp_path, **RUN)
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = PER_NODE
    (tmp_path / "hpz.json").write_text(json.dumps(settings))
    deepspeed = f"deepspeed={tmp_path / 'hpz.json'}"
    flat = run(config, "flat", *METHOD)
    # Before the first cut. The copies hold the checkpoint's LoRA, not the initial one.
    begun = tmp_path / "flat" / "checkpoints" / "step-1"
    hierarchical = run(config, "hpz", deepspeed, *METHOD, resume=begun)

    assert "copy" not in flat.err
    shards = [line for line in hierarchical.err.splitlines() if line.startswith("copy (")]
    assert f"copy ({FFN}, 64) in pieces of {FFN * 64 // PER_NODE}" in shards
    kept = json.loads((tmp_path / "hpz" / "kept_groups.json").read_text())
    channels = len(kept["layers"][0]["channels"])
    assert channels < FFN
    assert (
        f"copy ({channels}, 64) in pieces of {-(-channels * 64 // RANKS) * RANKS // PER_NODE}"
        in shards
    )

    assert (tmp_path / "hpz" / "kept_groups.json").read_bytes() == (
        tmp_path / "flat" / "kept_groups.json"
    ).read_bytes()
    assert losses(tmp_path / "hpz") == losses(tmp_path / "flat")
