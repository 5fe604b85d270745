"""Runs the package's trainer on real ZeRO-3 ranks. Brings back all that the oracle can be compared with."""

import gc
import json
import math
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.checkpoint.layout import step_folder
from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.checkpoint.state import Origin, read_state
from loraprune_ds.config import LoraConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.config_types import Dtype, Frozen
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engines import connect, run_engine
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning, open_pretrained
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.schedule import Schedule, make_schedule
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.device import storage_bytes
from loraprune_ds.ranks.flat import partition_numel
from loraprune_ds.report.records import CutRecord, History, Recorder, StepRecord
from loraprune_ds.session.joining import Beginning
from loraprune_ds.session.live import find_peft_model
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.train.data.samples import PADDING_ID, Samples, starts_of
from loraprune_ds.train.optimizer import build_lora
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.engine import ShardedEngine
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.shards import full_shape
from tests.oracle.dense_trainer import DenseTrainer, Settings
from tests.oracle.models import ODD_SIZES, make_batches, make_lora, make_tiny_llama
from tests.support.families import SIZES, is_seq2seq, tiny_model
from tests.support.paper import PAPER
from tests.support.plain_training import in_peft
from tests.support.zero_bytes import state_tensors

Options = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class Job:
    """One training run of the package, small enough to send to a worker."""

    folder: Path
    adapter: Path
    batches: list[tuple[Tensor, Tensor]]
    prune: dict[str, Any]
    dtype: Dtype = "float32"
    micro_batch_size: int = 2
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    deepspeed: str | None = "ds_configs/zero3.json"
    lora_dropout: float = 0.0
    learning_rate: float = 5e-3
    adam_epsilon: float = 1e-3
    seed: int = 0
    lora_r: int = 4
    lora_alpha: float = 8
    lengths: list[int] | None = None  # tokens of each sample, whose rest is padding
    frozen: Frozen | None = None
    distill_weight: float = 0.0
    distill_temperature: float = 1.0


@dataclass
class Outcome:
    """Holds what one run did. Tensors are whole, gathered on every rank."""

    losses: list[float] = field(default_factory=list)
    averages: list[list[tuple[Tensor, ...]]] = field(default_factory=list)
    kept: list[list[tuple[list[int], ...]]] = field(default_factory=list)
    cut_steps: list[int] = field(default_factory=list)
    masters: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, Tensor] = field(default_factory=dict)
    state_bytes: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Consecutive:
    """Orders samples as the oracle does: batch s is [s·G, (s+1)·G)."""

    size: int

    def batch(self, step: int) -> Tensor:
        return torch.arange(step * self.size, (step + 1) * self.size)


def write_adapter(folder: Path, lora: dict[str, Tensor], *, r: int, alpha: float) -> Path:
    """Writes the oracle's LoRA ("layers.{i}.{linear}.lora_A") as a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{in_peft(name)}.weight": tensor.contiguous() for name, tensor in lora.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in lora})
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": targets,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tiny_job(
    folder: Path, prune: Options, *, steps: int, samples: int = 12, tokens: int = 16,
    model: Options | None = None, **settings: Any,
) -> Job:  # fmt: skip
    """Writes a tiny LLaMA and an adapter that matters. `model` goes to `make_tiny_llama`, `settings` to the job."""
    source = make_tiny_llama(folder / "model", **ODD_SIZES | (model or {}))
    r, alpha = settings.get("lora_r", 4), settings.get("lora_alpha", 8)
    adapter = write_adapter(folder / "adapter", make_lora(source, r=r, seed=2), r=r, alpha=alpha)
    batches = make_batches(steps=steps, samples=samples, tokens=tokens, vocab=97, seed=3)
    return Job(source, adapter, batches, prune, **settings)


def family_job(
    folder: Path,
    family: str,
    prune: Options,
    *,
    steps: int,
    model: Options | None = None,
    **settings: Any,
) -> tuple[Job, dict[str, Tensor]]:
    """Writes a tiny model of a family with an adapter. Returns the job, and LoRA by the oracle's names."""
    source = folder / "model"
    tiny_model(family, seed=1, **model or {}).save_pretrained(source)
    lora = random_lora(source)
    adapter = write_adapter(folder / "adapter", in_file(lora, source), r=4, alpha=8)
    batches = make_batches(steps=steps, samples=12, tokens=16, vocab=SIZES["vocab_size"], seed=3)
    # whose source has at least one token, and the start of the target comes before labels
    if is_seq2seq(family):
        batches = [
            (ids, torch.cat([torch.full_like(labels[:, :2], -100), labels[:, 2:]], 1))
            for ids, labels in batches
        ]
    return Job(source, adapter, batches, prune, **settings), lora


def random_lora(folder: Path) -> dict[str, Tensor]:
    shape = open_pretrained(folder).shape
    generator = torch.Generator().manual_seed(2)
    lora: dict[str, Tensor] = {}
    for i, linear in shape.linears():
        name = f"{shape.prefix(i).removeprefix('model.')}{linear.linear}.lora_"
        for factor, size in zip("AB", linear.lora_shapes(4), strict=True):
            lora[name + factor] = torch.randn(size, generator=generator) * 0.2
    return lora


def in_file(lora: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Returns LoRA as an adapter's file stores it, which is another layout for experts."""
    shape, found = open_pretrained(folder).shape, dict[str, Tensor]()
    for i in range(len(shape.layers)):
        prefix = shape.prefix(i).removeprefix("model.")
        own = {
            name.removeprefix(prefix): factor
            for name, factor in lora.items()
            if name.startswith(prefix)
        }
        found |= {
            f"{prefix}{name}": factor
            for name, factor in as_in_peft(own, shape.layers[i].linears).items()
        }
    return found


def config_of(job: Job) -> RunConfig:
    """Returns the settings of the run that a job stands for."""
    pinned: dict[str, Any] = PAPER | {"channel_multiple": 1}  # the models are narrow
    return RunConfig(
        output_dir="unused",
        seed=job.seed,
        deepspeed=job.deepspeed,
        model=ModelConfig(
            path=str(job.folder), dtype=job.dtype, adapter=str(job.adapter), frozen=job.frozen
        ),
        lora=LoraConfig(r=job.lora_r, lora_alpha=job.lora_alpha, lora_dropout=job.lora_dropout),
        prune=PruneConfig(**(pinned | job.prune)),
        train=TrainConfig(
            steps=len(job.batches),
            global_batch_size=len(job.batches[0][0]),
            micro_batch_size=job.micro_batch_size,
            learning_rate=job.learning_rate,
            adam_epsilon=job.adam_epsilon,
            lr_scheduler="constant",
            max_grad_norm=job.max_grad_norm,
            gradient_checkpointing=job.gradient_checkpointing,
            distill_weight=job.distill_weight,
            distill_temperature=job.distill_temperature,
        ),
    )


class ShardedTrainer(Trainer):
    """A trainer over ZeRO-3's engine, unless the job has no DeepSpeed. Tests cut apart from the step."""

    engine: ShardedEngine
    model: ShardedModel

    @property
    def pruner(self) -> Pruner:
        return self.pruning.pruner

    def step(self, step: int) -> StepRecord:
        """Makes this optimizer step, without its cut."""
        self.pruning.step = step - 1
        with patch.object(self.pruning, "cut", lambda: None):
            self.train_step()
        return self.pruning.recorder.history.steps[-1]

    def cut(self, step: int) -> CutRecord | None:
        """Makes the cut of the last step."""
        self.pruning.step = step
        return self.pruning.cut()


def open_stored(job: Job) -> PretrainedModel:
    """Opens the model with the storage that its linears have in training."""
    config = config_of(job)
    return open_for_pruning(job.folder, config.model).with_refits(config.prune.compensate)


def build(job: Job) -> ShardedTrainer:
    """Builds the package's trainer over a fresh engine."""
    # DeepSpeed collects garbage twice per cut: over all that torch has imported that takes a second
    gc.freeze()
    world_size, size, config = (
        torch.distributed.get_world_size(),
        len(job.batches[0][0]),
        config_of(job),
    )
    pretrained = open_stored(job)
    ds_config = resolve_ds_config(config, pretrained.shape, {}, world_size, world_size)
    trainer = assemble(
        config, pretrained, ds_config, make_samples(job), Consecutive(size), len(job.batches)
    )
    if job.distill_weight:
        engine = run_engine(sharded=job.deepspeed is not None)
        trainer.teacher = engine.build_inference_engine(
            pretrained.with_refits("none"), "sdpa", job.dtype, ds_config, head=False
        )
    return trainer


def assemble(
    config: RunConfig, pretrained: PretrainedModel, ds_config: dict[str, Any], samples: Samples, order: Any, steps: int,
    schedule: type[Schedule] = Schedule,
) -> ShardedTrainer:  # fmt: skip
    """Puts a trainer together over a fresh engine."""
    library = run_engine(sharded=config.deepspeed is not None)
    model = config.model
    add_lora = partial(build_lora, pretrained.shape, config, [steps])
    engine = library.build_training_engine(
        pretrained,
        model.attn_implementation,
        model.dtype,
        ds_config,
        add_lora,
        config.train.max_grad_norm,
    )
    peft_model = find_peft_model(engine.module)
    training = LiveTraining(engine.module, peft_model, pretrained.shape, engine.optimizer)
    plan = make_schedule(make_goal(config.prune, pretrained.shape), steps)
    origin = Origin(
        config.to_dict(),
        steps,
        config.seed,
        query_heads=QUERY_HEADS in pretrained.shape.kinds,
        groups=[],
        folder=str(pretrained.folder),
        digest="",
    )
    planned = schedule(**{field.name: getattr(plan, field.name) for field in fields(plan)})
    recorder = Recorder(History(), [])
    pruning = Pruning.of_run(
        Beginning(connect(training), planned, config.model.dtype, origin, recorder)
    )
    return ShardedTrainer(engine, pruning, samples, order, config)


def make_samples(job: Job) -> Samples:
    input_ids, labels = (torch.cat(parts) for parts in zip(*job.batches, strict=True))
    if job.lengths is None:
        return Samples.of_windows(input_ids, labels)
    ids, wanted = (
        torch.cat([row[:length] for row, length in zip(rows, job.lengths, strict=True)])
        for rows in (input_ids, labels)
    )
    columns = {"input_ids": ids.where(ids != PADDING_ID, PADDING_ID + 1), "labels": wanted}
    return Samples(columns, starts_of(torch.tensor(job.lengths)), input_ids.shape[1])


def save(trainer: ShardedTrainer, config: RunConfig, root: Path) -> TrainingCheckpoint:
    """Saves a step with all that its results need, and opens it. Collective."""
    dense = open_for_pruning(Path(config.model.path), config.model)
    dense = dense.with_refits(config.prune.compensate)
    folder = step_folder(root, config.train.steps or 0)
    trainer.pruning.save_step(folder, "step")
    state = read_state(folder)
    return TrainingCheckpoint(folder, state, config, dense.folder, dense)


def assert_same_outcome(found: Outcome, expected: Outcome, rtol: float = 0.0) -> None:
    """Checks that two runs with cuts are the same, bit by bit. Scores may differ by `rtol`."""
    assert len(found.cut_steps) >= 2
    assert found.losses == expected.losses
    assert found.kept == expected.kept
    torch.testing.assert_close(found.averages, expected.averages, rtol=rtol, atol=0.0)
    assert all(
        torch.equal(found.masters[name], expected.masters[name]) for name in expected.masters
    )


def dense_twin(job: Job, **settings: Any) -> DenseTrainer:
    """Returns the oracle of a job that `tiny_job` made."""
    lora = make_lora(job.folder, r=job.lora_r, seed=2)
    return DenseTrainer(job.folder, lora, Settings(lora_alpha=job.lora_alpha, **settings))


def first_batch(job: Job) -> tuple[Tensor, Tensor]:
    """Returns ids and labels of the first batch. Labels beyond a sample's length do not count."""
    ids, labels = job.batches[0]
    if job.lengths is not None:
        beyond = torch.arange(labels.shape[1]) >= torch.tensor(job.lengths[: len(labels)])[:, None]
        labels = labels.masked_fill(beyond, -100)
    return ids, labels


def train(job: Job) -> Outcome:
    """Makes the whole run. Returns the outcome."""
    return run_steps(build(job), job)


def run_steps(trainer: ShardedTrainer, job: Job) -> Outcome:
    """Makes all steps of a trainer that has made none yet."""
    model, pruner = trainer.model, trainer.pruner
    outcome = Outcome()
    storage = open_stored(job).storage
    for step in range(1, len(job.batches) + 1):
        outcome.losses.append(trainer.step(step).loss)
        outcome.averages.append([as_pair(scores) for scores in pruner.average.scores or []])
        if trainer.cut(step):
            outcome.cut_steps.append(step)
        outcome.kept.append(
            [tuple(x.tolist() for x in keep.values()) for keep in pruner.kept_of_dense]
        )
        if job.deepspeed is not None:
            outcome.state_bytes.append(
                (storage_bytes(state_tensors(model)), expected_bytes(job, model, storage))
            )
    collect_into(outcome, trainer)
    return outcome


def expected_bytes(job: Job, model: ShardedModel, storage: Any) -> int:
    """Counts the shards of the weights, and of LoRA with fp32 masters, two moments and gradients, and the bucket."""
    (bucket, *_), element_size = (
        model.zero_optimizer.ipg_buckets.values(),
        4 if job.dtype == "float32" else 2,
    )
    stored = storage.stored(model.shape).values()
    frozen = sum(
        x.dtype.itemsize * partition_numel(math.prod(x.shape), model.world_size) for x in stored
    )
    lora = sum(
        partition_numel(numel, model.world_size) for numel in model.shape.lora_numel(job.lora_r)
    )
    return frozen + (element_size + 4 + 8 + 4) * lora + 4 * bucket.buffer.numel()


def equal_scores(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def as_pair(scores: LayerScores) -> tuple[Tensor, ...]:
    """Returns the scores of each kind. Most families have two."""
    return tuple(values.clone() for values in scores.values())


def collect_into(outcome: Outcome, trainer: Trainer) -> None:
    """Adds whole tensors by the oracle's names."""
    model, state = trainer.model, trainer.model.optimizer_state
    for name, parameter in model.module.named_parameters():
        whole = gather_everywhere(model, parameter)
        if not parameter.requires_grad:
            outcome.frozen[name.removeprefix("base_model.model.").replace(".base_layer", "")] = (
                whole
            )
            continue
        key = (
            name.removeprefix("base_model.model.")
            .removeprefix("model.")
            .removesuffix(".default.weight")
        )
        outcome.lora[key] = whole
        outcome.masters[key] = gather_everywhere(model, parameter, state.shard(parameter, "master"))
        first, second = (
            gather_everywhere(model, parameter, state.shard(parameter, k)) for k in MOMENTS
        )
        outcome.moments[key] = (first, second)


def gather_everywhere(model: PrunableModel, parameter: Any, shard: Tensor | None = None) -> Tensor:
    """Gathers a whole tensor on every rank, by a broadcast of what rank 0 collected."""
    source = model.held(parameter) if shard is None else shard
    whole = model.layout.collect(parameter, 0, shard)
    whole = torch.empty(full_shape(parameter), dtype=source.dtype) if whole is None else whole
    whole = whole.clone(memory_format=torch.contiguous_format)
    model.comm.broadcast_from(0, whole)
    return whole
