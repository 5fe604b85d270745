"""transformers' Trainer with the callback on both engines: equal to our own trainer, resumed bit by bit."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.files import read_json
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.report.measured import read_results
from loraprune_ds.report.records import read_history
from tests.support import callback_run, trainers
from tests.support.callback_results import LINEARS, kept_indices, load, weight
from tests.support.driver import Job, family_job
from tests.support.families import heavy
from tests.support.paper import OPEN
from tests.support.ranks import RankPool
from tests.support.resuming import assert_equal_tensors
from tests.support.trainer_runs import (
    PRUNE,
    REFIT,
    SAVES,
    Run,
    assert_same_course,
    course,
    resume_and_compare,
)
from tests.support.trainers import PLAIN, WITHOUT, Setup, train_alone, train_with_callback

COPY = "modules_to_save.default"  # where PEFT keeps the copy that trains
ENGINES: dict[str, dict[str, Any]] = {"ZeRO-3": {}, "DDP": WITHOUT}


def on_engines(*in_ci: str) -> Any:
    """Runs a test in CI on these engines, and on the others by tests/run_heavy.sh."""
    waits = {name: [] if name in in_ci else [pytest.mark.heavy] for name in ENGINES}
    cases = [pytest.param(x, id=name, marks=waits[name]) for name, x in ENGINES.items()]
    return pytest.mark.parametrize("engine", cases, indirect=True)


@pytest.fixture(scope="module", params=ENGINES.values(), ids=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments that choose the engine."""
    return request.param


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return callback_run.make_job(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(
    ranks: RankPool, job: Job, engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    out = tmp_path_factory.mktemp("plain")
    return Run(*ranks.run(2, train_with_callback, job, out, SAVES | engine)[0], out)


Trained = tuple[Job, list[dict[str, Any]]]  # and the rows of our own trainer


def alone(ranks: RankPool, job: Job) -> list[dict[str, Any]]:
    """Returns the rows of our own trainer in one process, which equals ranks of ZeRO-3 (tests/numerics)."""
    return ranks.run(1, train_alone, replace(job, **WITHOUT))[0]


@pytest.fixture(scope="module")
def own_rows(ranks: RankPool, job: Job) -> list[dict[str, Any]]:
    return alone(ranks, job)


@pytest.fixture(scope="module")
def hybrid(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    steps, folder = callback_run.STEPS, tmp_path_factory.mktemp("hybrid")
    job, _ = family_job(folder, "qwen3_5_text", PRUNE | OPEN, steps=steps, max_grad_norm=0.5)
    return job, alone(ranks, job)


@pytest.fixture(scope="module")
def encoder_decoder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Sources and targets have many lengths, and no padding may reach a refit."""
    folder = tmp_path_factory.mktemp("t5")
    job, _ = family_job(folder, "t5", REFIT | OPEN, steps=6, max_grad_norm=0.5)
    for ids, labels in job.batches:
        for i, (row, wanted) in enumerate(zip(ids, labels, strict=True)):
            start, end = 2 + i % 7, 16 - i % 4
            row[start], row[end - 1], wanted[:] = 0, 2, -100  # 2 is EOS
            wanted[start + 1 : end] = row[start + 1 : end]
    return job, alone(ranks, job)


def test_the_callback_cuts_as_our_own_trainer(own_rows: list[dict[str, Any]], plain: Run) -> None:
    assert_same_course(plain.rows, own_rows, cuts=3)
    report = read_json(plain.out / "report.json")
    assert [cut["step"] for cut in report["prune_steps"]] == [3, 5, 7]
    (found,) = read_results([plain.out])  # as launch/compare.py does
    assert found.parameters < (found.values["parameters"].dense or 0)
    assert found.method == "lora, uniform"
    assert "perplexity" not in found.values
    steps = read_history(plain.out / "metrics.jsonl").steps
    assert [step.loss for step in steps] == [row["loss"] for row in plain.rows]
    shrunk = [
        before.step for before, after in pairwise(steps) if after.weight_bytes < before.weight_bytes
    ]
    assert shrunk == [3, 5, 7]
    assert (plain.out / "kept_groups.json").is_file()


@on_engines("DDP")
def test_a_hybrid_is_cut_as_by_our_own_trainer(
    ranks: RankPool, engine: dict[str, Any], hybrid: Trained, tmp_path: Path
) -> None:
    """A delta net amplifies rounding, sooner or later by the CPU: after the last cut five digits agree."""
    job, own = hybrid
    rows = ranks.run(2, train_with_callback, job, tmp_path / "out", engine)[0][0]
    assert_same_course(rows[:5], own[:5], cuts=2)
    assert [row["kept"] for row in rows[:8]] == [row["kept"] for row in own[:8]]
    for key in ("loss", "norm"):  # 2.3e-6 with AVX-512, below 1e-6 with AVX2
        assert [row[key] for row in rows[5:8]] == pytest.approx(
            [row[key] for row in own[5:8]], rel=1e-5
        )


MIXTURES = ("qwen3_moe", heavy("deepseek_v3"), heavy("mixtral"), heavy("gpt_oss"))


@pytest.fixture(params=MIXTURES)
def mixture(ranks: RankPool, request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    """Experts and heads leave."""
    prune = PRUNE | OPEN | {"head_ratio": 0.2}
    job, _ = family_job(tmp_path / "dense", request.param, prune, steps=6, max_grad_norm=0.5)
    return job, alone(ranks, job)


def test_a_mixture_is_cut_as_by_our_own_trainer(
    ranks: RankPool, engine: dict[str, Any], mixture: Trained, tmp_path: Path
) -> None:
    """The resume is between the two cuts."""
    job, own = mixture
    run = Run(*ranks.run(2, train_with_callback, job, tmp_path, SAVES | engine)[0], tmp_path)
    steep = open_pretrained(job.folder).shape.model_type == "gpt_oss"
    # GPT-OSS's gate is steep, which amplifies rounding: 3e-6 after a cut
    assert_same_course(run.rows, own, cuts=2, norms=1e-5 if steep else 1e-6)
    if not steep:
        resume_and_compare(ranks, job, run, tmp_path / "again", 2, **engine)


@on_engines("DDP")
def test_an_encoder_decoder_is_cut_in_a_seq2seq_trainer_as_by_our_own(
    ranks: RankPool, engine: dict[str, Any], encoder_decoder: Trained, tmp_path: Path
) -> None:
    job, own = encoder_decoder
    rows = ranks.run(2, trainers.train_pairs_with_callback, job, tmp_path / "out", engine)[0]
    # a row of our own has a start, and the last token
    own = [ours | {"tokens": theirs["tokens"]} for theirs, ours in zip(rows, own, strict=True)]
    # Rounding adds up: after step 3 norms have five digits in common.
    assert_same_course(rows[:3], own[:3], cuts=1)
    assert [row["kept"] for row in rows] == [row["kept"] for row in own]
    assert rows[5]["loss"] == pytest.approx(own[5]["loss"], rel=1e-6)
    counted = job.batches[0][1] != -100
    assert rows[0]["tokens"] == int(counted.int().argmax(1).sum() - len(counted) + counted.sum())
    pruned, dense = (
        open_pretrained(folder).shape for folder in (tmp_path / "out" / "model", job.folder)
    )
    assert pruned.total_numel() < dense.total_numel()


@on_engines("ZeRO-3")
@pytest.mark.parametrize(
    ("prune", "reentrant"),
    [(PRUNE | {"criterion": "fisher", "normalize": "none"}, True), heavy(REFIT, False)],
    ids=["fisher", "refit"],
)
def test_checkpointing_and_a_reference_s_forward_pass_change_no_score(
    ranks: RankPool,
    job: Job,
    engine: dict[str, Any],
    tmp_path: Path,
    prune: dict[str, Any],
    reentrant: bool,
) -> None:
    job = replace(job, batches=job.batches[:5], prune=prune)  # cuts after 2 and 4
    # DDP lets no parameter get a gradient twice
    setup = Setup(reference=True, reentrant=reentrant and not engine)
    rows, _ = ranks.run(2, train_with_callback, job, tmp_path, engine, None, setup)[0]
    assert_same_course(rows, alone(ranks, job), cuts=2)


@on_engines("ZeRO-3")
def test_a_resume_goes_on_from_refitted_weights_and_kept_passes(
    ranks: RankPool, job: Job, engine: dict[str, Any], tmp_path: Path
) -> None:
    job = replace(job, prune=REFIT, batches=job.batches[:6])
    saves = {"save_strategy": "steps", "save_steps": 4, "report_to": "tensorboard"} | engine
    run = Run(*ranks.run(2, train_with_callback, job, tmp_path / "a", saves)[0], tmp_path / "a")
    resume_and_compare(ranks, job, run, tmp_path / "b", 4, **engine)


@on_engines("DDP")
def test_a_resume_across_a_cut_after_a_broken_save_changes_no_bit(
    ranks: RankPool, job: Job, engine: dict[str, Any], plain: Run, tmp_path: Path
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1} | engine
    ranks.run(2, trainers.cut_a_save_short, job, tmp_path, saves, 8)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    again, resumed = ranks.run(2, train_with_callback, job, tmp_path, saves, str(tmp_path))[0]
    assert course(again) == course(plain.rows[4:])
    assert_equal_tensors(resumed, plain.weights)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    report = read_json(tmp_path / "report.json")
    assert ([cut["step"] for cut in report["prune_steps"]], report["resumed_from"]) == (
        [3, 5, 7],
        [4],
    )


@pytest.mark.heavy  # test_local has ZeRO-3 go on without them
def test_a_checkpoint_of_the_model_alone_goes_on_without_deepspeed_s_files(
    ranks: RankPool, job: Job, tmp_path: Path
) -> None:
    job = replace(job, batches=job.batches[:5])  # cuts after 2 and 4
    falling: dict[str, Any] = {"lr_scheduler_type": "linear"}
    saves = falling | {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    run = Run(*ranks.run(2, train_with_callback, job, tmp_path / "a", saves)[0], tmp_path / "a")
    assert not list(run.out.glob("checkpoint-3/global_step*"))
    resume_and_compare(ranks, job, run, tmp_path / "b", 3, **falling)


@pytest.mark.parametrize(
    "setup",
    [
        heavy(Setup(fp32_lora=True)),  # in CI test_cutting cuts it, and test_qlora resumes it
        Setup(whole=("embed_tokens", "lm_head")),
    ],
    ids=["fp32 LoRA", "modules_to_save"],
)
def test_what_trains_beside_a_bf16_base_goes_through_cuts_and_a_resume(
    ranks: RankPool, job: Job, tmp_path: Path, setup: Setup
) -> None:
    job = replace(job, dtype="bfloat16", batches=job.batches[:6])  # cuts after 2, 4 and 5
    out, saves = tmp_path / "a", {"save_strategy": "steps", "save_steps": 3}
    run = Run(*ranks.run(2, train_with_callback, job, out, saves, None, setup)[0], out)
    resume_and_compare(ranks, job, run, tmp_path / "b", 3, setup)
    dense = load(job.folder, "bfloat16")
    kept, trained = kept_indices(out, dense), torch.float32 if setup.fp32_lora else torch.bfloat16
    assert {tensor.dtype for name, tensor in run.weights.items() if ".lora_" in name} == {trained}
    for i, rows in enumerate(kept):
        for name, (kind, axis) in LINEARS.items():
            live = run.weights[f"base_model.model.model.layers.{i}.{name}.base_layer.weight"]
            assert torch.equal(weight(dense, i, name).index_select(axis, rows[kind]), live), (
                i,
                name,
            )
    for name in setup.whole:
        path = next(path for path, _ in dense.named_modules() if path.endswith(name))
        at_first, learned = (
            dense.get_parameter(f"{path}.weight"),
            run.weights[f"base_model.model.{path}.{COPY}.weight"],
        )
        assert not torch.equal(learned, at_first), name
        assert torch.equal(
            load(out / "base", "bfloat16").get_parameter(f"{path}.weight"), at_first
        ), name
        assert torch.equal(
            load(out / "model", "bfloat16").get_parameter(f"{path}.weight"), learned
        ), name


OF_DEEPSPEED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "eps": 1e-3, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 5e-3, "warmup_num_steps": "auto"},
    },
}
PLATEAU = {
    "optim": "adagrad",
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.99},  # every evaluation lowers the rate
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "loss",
}


@pytest.mark.parametrize(
    "more",
    [
        {"deepspeed": trainers.deepspeed_config() | OF_DEEPSPEED, "warmup_steps": 9},
        PLATEAU | WITHOUT,
    ],
    ids=["of DeepSpeed", "on a plateau"],
)
def test_other_optimizers_and_schedules_go_on_to_the_bit(
    ranks: RankPool, job: Job, tmp_path: Path, more: dict[str, Any]
) -> None:
    job = replace(job, batches=job.batches[:5])  # cuts after 2 and 4
    out, saves = tmp_path / "a", {"save_strategy": "steps", "save_steps": 3}
    run = Run(*ranks.run(1, train_with_callback, job, out, saves | more)[0], out)
    resume_and_compare(ranks, job, run, tmp_path / "b", 3, ranks=1, **more)


@on_engines("ZeRO-3")
def test_an_evaluation_between_cuts_changes_nothing(
    ranks: RankPool, job: Job, engine: dict[str, Any], plain: Run, tmp_path: Path
) -> None:
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 20,
    } | engine
    rows, same = ranks.run(2, train_with_callback, job, tmp_path, evaluated)[0]
    assert course(rows) == course(plain.rows)
    assert_equal_tensors(same, plain.weights)
    # the order of modules is recorded again meanwhile
    assert rows[-1]["gathered"] == plain.rows[-1]["gathered"]


def test_stopping_early_and_half_gradients_are_warned_of(
    ranks: RankPool, job: Job, tmp_path: Path
) -> None:
    first, second = ranks.run(2, trainers.stop_early, replace(job, dtype="bfloat16"), tmp_path)
    rounded, stopped = first
    assert "bfloat16" in rounded
    assert "step 2, before the last cut at step 14: 0.0 % of 40.0 %" in stopped
    assert second == []  # one rank says it


ALL_REDUCE = {"stage3_use_all_reduce_for_fetch_params": True}
BF16_STATE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


@pytest.mark.parametrize(
    ("setup", "section", "settings"),
    [(Setup(fp32_lora=True), "zero_optimization", ALL_REDUCE), (PLAIN, "bf16", BF16_STATE)],
    ids=["all-reduce beside fp32 LoRA", "bf16 masters"],
)
def test_a_deepspeed_config_that_cannot_work_is_one_line(
    ranks: RankPool, job: Job, tmp_path: Path, setup: Setup, section: str, settings: dict[str, Any]
) -> None:
    for line in ranks.run(
        2, trainers.refusal, replace(job, dtype="bfloat16"), tmp_path, setup, section, settings
    ):
        assert line.startswith(f"the DeepSpeed config: {section}.{next(iter(settings))}")
        assert "\n" not in line


def test_compilation_by_accelerate_is_named_on_each_engine(
    ranks: RankPool, job: Job, engine: dict[str, Any], tmp_path: Path
) -> None:
    for line in ranks.run(2, trainers.refusal_of_compilation, job, tmp_path, engine):
        assert "ACCELERATE_DYNAMO_BACKEND" in line


def test_a_resume_that_forgets_the_callback_is_refused(
    ranks: RankPool, job: Job, engine: dict[str, Any], plain: Run, tmp_path: Path
) -> None:
    for step in (2, 4):  # before and after the first cut
        checkpoint = str(plain.out / f"checkpoint-{step}")
        error = ranks.run(
            2, trainers.resume_without_the_callback, job, tmp_path, engine, checkpoint
        )[0]
        assert "pruning.resume(trainer.model)" in error
