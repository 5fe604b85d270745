"""The callback in Trainers that shard by FSDP2, on CPU ranks: equal to our own trainer, which holds the model whole."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.files import read_json, write_json
from tests.oracle.models import make_tiny_llama
from tests.support import callback_run, fsdp_trainers, trainers
from tests.support.callback_results import check_results
from tests.support.driver import Job
from tests.support.examples import ALONE, write_rows
from tests.support.families import heavy
from tests.support.fsdp_trainers import fsdp, train_with_callback
from tests.support.launching import ROOT, free_port, run_to_end
from tests.support.ranks import RankFailure, RankPool
from tests.support.resuming import assert_equal_tensors
from tests.support.trainer_runs import PRUNE, REFIT, SAVES, assert_same_course, course
from tests.support.trainers import PLAIN, WITHOUT, Setup, train_alone

# of launch/examples, by the options of their tests
TRAINER = f"{ALONE} --fsdp --max_length 32"
SHARDED: dict[str, Any] = {"state_dict_type": "SHARDED_STATE_DICT"}
FROM_RANK_0: dict[str, Any] = {"cpu_ram_efficient_loading": True}
BY_SHARDS = ["--fsdp_config", json.dumps({"version": 2, **SHARDED})]
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": WITHOUT,
    "ZeRO-3": {},
    "FULL": fsdp(),
    "FULL from rank 0": fsdp(**FROM_RANK_0),
    "SHARDED": fsdp(**SHARDED),
    "SHARDED from rank 0": fsdp(**SHARDED, **FROM_RANK_0),
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 20}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return callback_run.make_job(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("prune", "more", "setup", "size"),
    [
        (REFIT, fsdp() | EVALUATED, PLAIN, 2),
        (PRUNE, fsdp(activation_checkpointing=True, reshard_after_forward=False), PLAIN, 2),
        heavy(PRUNE, fsdp(), Setup(reference=True, reentrant=False), 2),
        heavy(PRUNE, fsdp(cpu_ram_efficient_loading=True), Setup(whole=("embed_tokens",)), 2),
        heavy(REFIT, fsdp(reshard_after_forward=False) | EVALUATED, Setup(reference=True), 4),
    ],
    ids=["refit", "checkpointing", "reference", "modules_to_save", "four ranks"],
)
def test_the_callback_cuts_as_our_own_trainer(
    ranks: RankPool, job: Job, tmp_path: Path, prune: Any, more: Any, setup: Setup, size: int
) -> None:
    job = replace(job, prune=prune, batches=job.batches[:6])  # cuts after 2, 4 and 5
    rows, _ = ranks.run(size, train_with_callback, job, tmp_path, more, None, setup)[0]
    if not setup.whole:  # our trainer trains nothing beside LoRA
        assert_same_course(rows, ranks.run(1, train_alone, replace(job, deepspeed=None))[0], cuts=3)


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ("sft.py", ("text",)),
        ("fsdp_loop.py", ("text",)),
        heavy("dpo.py", ("prompt", "chosen", "rejected")),
    ],
)
def test_an_example_prunes_and_what_it_writes_agrees(
    ranks: RankPool, tmp_path: Path, script: str, fields: tuple[str, ...]
) -> None:
    model = make_tiny_llama(tmp_path / "dense", heads=8, kv_heads=4, hidden=64, ffn=640, layers=4)
    data = str(write_rows(tmp_path / "rows.jsonl", fields))
    out = tmp_path / "out"
    own_loop = script == "fsdp_loop.py"
    options = [str(out)] if own_loop else ["--output_dir", str(out), *TRAINER.split(), *BY_SHARDS]
    ids = torch.arange(3, 35)[None]
    arguments = [str(model), data, *options]
    live = ranks.run(2, fsdp_trainers.run_example, script, arguments, ids)[0]
    check_results(model, out, ids, live, has_adapter=not own_loop)


@pytest.mark.parametrize("kind", [heavy("FULL"), heavy("SHARDED")])
def test_an_example_runs_by_accelerate_launch(tmp_path: Path, kind: str) -> None:
    model = make_tiny_llama(tmp_path / "dense", heads=8, kv_heads=4, hidden=64, ffn=640, layers=4)
    config = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    config |= {"fsdp_state_dict_type": f"{kind}_STATE_DICT"}
    ranks = {"distributed_type": "FSDP", "use_cpu": True, "num_processes": 2, "num_machines": 1}
    write_json(tmp_path / "accelerate.json", ranks | {"fsdp_config": config})
    words = f"""{Path(sys.executable).with_name("accelerate")} launch
    --config_file {tmp_path / "accelerate.json"} --main_process_port {free_port()}
    tests/support/launched_fsdp.py launch/examples/sft.py {model}
    {write_rows(tmp_path / "rows.jsonl", ("text",))} --output_dir {tmp_path / "out"} {ALONE} --max_length 32"""
    ended = run_to_end(words.split(), cwd=ROOT)
    assert ended.code == 0, ended.everything
    assert ended.out.count("FSDPPeftModel") == 2
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    adapter = read_json(tmp_path / "out" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == str(tmp_path / "out" / "base")


@pytest.fixture(scope="module")
def straight(
    ranks: RankPool, job: Job, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Job, Any, Any, str]]:
    """Returns a job, its rows and weights on an engine with two ranks, and its checkpoint of step 2, each made once."""
    refitting = replace(job, prune=REFIT, batches=job.batches[:6])  # cuts after 2, 4 and 5

    @cache
    def train(engine: str) -> tuple[Job, Any, Any, str]:
        out = tmp_path_factory.mktemp("straight")
        more = SAVES | ENGINES[engine]
        rows, weights = ranks.run(2, training(more), refitting, out, more)[0]
        return refitting, rows, weights, str(out / "checkpoint-2")

    return train


@pytest.mark.parametrize(("kind", "size"), [heavy("FULL", 2), ("SHARDED", 2), heavy("FULL", 4)])
def test_a_resume_across_a_cut_changes_no_bit_and_other_engines_and_ranks_go_on(
    ranks: RankPool, straight: Any, tmp_path: Path, kind: str, size: int
) -> None:
    job, rows, weights, checkpoint = straight(kind)
    more = ENGINES[kind]
    forgetful = fsdp_trainers.resume_without_the_callback
    for error in ranks.run(size, forgetful, job, tmp_path / "f", more, checkpoint):
        assert "pruning.resume(trainer.model)" in error
    again, resumed = ranks.run(size, train_with_callback, job, tmp_path / "b", more, checkpoint)[0]
    assert rows[1]["kept"] != rows[0]["kept"]
    if size == 2:
        assert course(again) == course(rows[2:])
        assert_equal_tensors(resumed, weights)
    else:
        assert_same_course(again, rows[2:], cuts=2)
    alone, _ = ranks.run(1, trainers.train_with_callback, job, tmp_path / "c", WITHOUT, checkpoint)[
        0
    ]
    assert_same_course(alone, rows[2:], cuts=2)


def test_a_model_that_is_evaluated_and_saved_can_train_after_that(
    ranks: RankPool, job: Job, tmp_path: Path
) -> None:
    """A save reads the state of the model. So does a load, which needs `pruning.resume`."""
    job = replace(job, prune=PRUNE, batches=job.batches[:2])
    more = ENGINES["SHARDED"] | {"per_device_eval_batch_size": 20}
    for cuts in ranks.run(2, fsdp_trainers.evaluate_save_and_train, job, tmp_path, more):
        assert cuts == [2]


@pytest.mark.parametrize("kind", [heavy("FULL"), heavy("SHARDED")])
def test_a_kill_within_a_save_leaves_the_checkpoint_before(
    ranks: RankPool, job: Job, tmp_path: Path, kind: str
) -> None:
    job = replace(job, prune=REFIT, batches=job.batches[:5])  # cuts after 2 and 4
    more = SAVES | ENGINES[kind]
    rows, weights = ranks.run(2, train_with_callback, job, tmp_path / "a", ENGINES[kind])[0]
    with pytest.raises(RankFailure, match="rank 1 of 2: killed by SIGKILL"):
        ranks.run(2, fsdp_trainers.kill_within_a_save, job, tmp_path / "b", more)
    saved = {path.name: (path / "pruning").is_dir() for path in tmp_path.glob("b/checkpoint-*")}
    assert saved == {"checkpoint-2": True, "checkpoint-4": False}
    checkpoints = str(tmp_path / "b")
    again, resumed = ranks.run(2, train_with_callback, job, tmp_path / "b", more, checkpoints)[0]
    assert course(again) == course(rows[2:])
    assert_equal_tensors(resumed, weights)


@pytest.mark.parametrize(
    ("engine", "other", "size"),
    [
        heavy("DDP", "FULL", 2),
        ("DDP", "SHARDED", 2),
        heavy("ZeRO-3", "FULL", 2),
        ("FULL", "SHARDED", 2),
        heavy("SHARDED", "FULL", 2),
        heavy("SHARDED", "SHARDED", 4),
        heavy("ZeRO-3", "SHARDED", 2),
        heavy("DDP", "FULL from rank 0", 2),
        heavy("ZeRO-3", "SHARDED from rank 0", 4),
        heavy("FULL", "DDP", 2),
        heavy("FULL", "ZeRO-3", 2),
        heavy("SHARDED", "ZeRO-3", 2),
    ],
)
def test_what_another_engine_has_saved_goes_on(
    ranks: RankPool, straight: Any, tmp_path: Path, engine: str, other: str, size: int
) -> None:
    job, rows, _, checkpoint = straight(engine)
    more = ENGINES[other]
    again, _ = ranks.run(size, training(more), job, tmp_path / "b", more, checkpoint)[0]
    assert_same_course(again, rows[2:], cuts=2)


@pytest.mark.parametrize("kind", [heavy("FULL")])
def test_where_accelerate_makes_ddp_of_it_a_resume_is_ddp_s(
    ranks: RankPool, job: Job, tmp_path: Path, kind: str
) -> None:
    job = replace(job, prune=REFIT, batches=job.batches[:5])  # cuts after 2 and 4
    more = SAVES | ENGINES[kind]
    on_cpu = trainers.train_with_callback
    rows, weights = ranks.run(2, on_cpu, job, tmp_path / "a", more)[0]
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    again, resumed = ranks.run(2, on_cpu, job, tmp_path / "b", more, checkpoint)[0]
    assert course(again) == course(rows[2:])
    assert_equal_tensors(resumed, weights)


def training(arguments: dict[str, Any]) -> Any:
    """Returns the function that trains with these arguments."""
    return (fsdp_trainers if "fsdp" in arguments else trainers).train_with_callback
