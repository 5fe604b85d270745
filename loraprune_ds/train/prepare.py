"""Prepares a run, and finds every error in its input before any long work."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraprune_ds.checkpoint.layout import RunData, RunState
from loraprune_ds.checkpoint.load import source_digest
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import require
from loraprune_ds.export.model_card import model_name
from loraprune_ds.model.classes import check_flash_attention, config_object, describe_attention
from loraprune_ds.model.frozen import describe_dtype
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.perplexity import Labelled
from loraprune_ds.pretrained.adapters import check_adapter
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.pretrained.exported_config import NEXT_TOKENS
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import MTP, check_processor, check_tower
from loraprune_ds.pretrained.tokenizer import load_tokenizer, text_starts
from loraprune_ds.pretrained.windows import split_batches
from loraprune_ds.pruning.schedule import Schedule, plan_pruning, steps_for_epochs
from loraprune_ds.pruning.target import final_shape, resolve
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import device_name
from loraprune_ds.report.reporters import check_installed
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import SampleOrder, Samples
from loraprune_ds.train.data.sources import at_commits, resolve_commits
from loraprune_ds.units import format_count, format_percent
from loraprune_ds.zero.ds_config import resolve_ds_config

# Checks a tokenizer with the positions and the vocabulary of its model.
CheckTokenizer = Callable[[RunConfig, PreTrainedTokenizerBase, int | None, int], None] | None


@dataclass(frozen=True)
class Prepared:
    """Holds the checked input of a run."""

    config: RunConfig
    pretrained: PretrainedModel
    samples: Samples
    order: SampleOrder
    held_out: list[Labelled]  # batches of the held-out text
    schedule: Schedule
    engines: ModuleType  # `find_engines`
    ds_config: dict[str, Any]  # with every "auto" replaced. Empty without DeepSpeed
    data: RunData


def prepare(
    config: RunConfig,
    comm: Communicator,
    earlier: RunState | None = None,
    check_tokenizer: CheckTokenizer = None,
) -> Prepared:
    """Checks the whole input on every rank. All ranks raise the same UserError. Collective.

    Args:
        earlier: the newest state of the run that goes on.
        check_tokenizer: a further check, before the data is read.
    """
    comm.all_or_raise(lambda: _check_before_download(config, comm.world_size))
    commits = earlier.data.commits if earlier else None
    query_heads = earlier is None or earlier.query_heads
    # From rank 0, since the hub may change from rank to rank.
    found = comm.gather_objects(comm.on_rank_0(lambda: commits or resolve_commits(config.data)))[0]
    own = partial(
        _prepare,
        config,
        found or {},
        query_heads,
        comm.world_size,
        comm.ranks_per_node(),
        check_tokenizer,
    )
    # One rank per node downloads, converts and tokenises. The others find the results in the node's caches.
    with comm.patient() as waiting:
        first = waiting.all_or_raise(
            lambda: own() if os.environ.get("LOCAL_RANK", "0") == "0" else None
        )
        prepared = waiting.all_or_raise(lambda: first or own())
    rank = comm.differing_rank(prepared.data)
    same = "model.path and data.path must be the same everywhere"
    require(
        rank is None, f"rank {rank} reads another model or other training data than rank 0; {same}"
    )
    return prepared


def find_engines(sharded: bool) -> ModuleType:
    """Returns zero/engine.py, or local/engine.py, which needs no DeepSpeed. They have the same functions."""
    if sharded:
        from loraprune_ds.zero import engine
    else:
        from loraprune_ds.local import engine
    return engine


def _check_before_download(config: RunConfig, world_size: int) -> None:
    """Makes the checks that need no model, because its download may take an hour."""
    find_engines(config.deepspeed is not None).check_device(config.model.dtype)
    check_flash_attention(config.model)
    config.train.gradient_accumulation_steps(world_size)
    check_installed(config.logging.report_to or ())


def _prepare(
    config: RunConfig,
    commits: dict[str, str],
    query_heads: bool,
    world_size: int,
    ranks_per_node: int,
    check_tokenizer: CheckTokenizer,
) -> Prepared:
    model, train = config.model, config.train
    pretrained = open_for_pruning(
        locate_model(model), model, packing=config.data.packs_rows, query_heads=query_heads
    )
    shape = pretrained.shape
    if model.adapter:
        check_adapter(Path(model.adapter).expanduser(), config.lora, shape)
    ds_config = resolve_ds_config(config, shape, world_size, ranks_per_node)
    tower = pretrained.tower
    # Its errors come before the data, which may take long to read.
    prune, limits, sizes = resolve(config.prune, shape, tower=tower is not None)
    if tower:
        check_tower(tower.config, final_shape(limits, sizes), str(pretrained.folder))
        check_processor(pretrained.folder)
    no_class = f"{pretrained.folder}: AutoModelForCausalLM lacks the class of a {shape.model_type}; keep its tower"
    require(tower is not None or not shape.family.lm_class(), no_class)
    config = replace(config, prune=prune)
    _check_model(config, pretrained)
    tokenizer = load_tokenizer(pretrained.folder)
    positions, vocab_size = pretrained.config.get("max_position_embeddings"), shape.vocab_size
    if check_tokenizer:
        check_tokenizer(config, tokenizer, positions, vocab_size)
    starts = text_starts(tokenizer, shape.family, pretrained.config)
    global_batch_size = train.global_batch_size
    data = at_commits(config.data, commits)
    loaded = load_samples(
        data, tokenizer, minimum=global_batch_size, vocab_size=vocab_size, starts=starts
    )
    lengths = loaded.samples.lengths() if train.group_by_length else None
    order = SampleOrder(loaded.epoch_length, global_batch_size, config.seed, loaded.epoch, lengths)
    pruning_steps = train.steps or steps_for_epochs(
        train.epochs or 1, loaded.epoch_length, global_batch_size
    )
    schedule = plan_pruning(prune, limits, sizes, pruning_steps, config.recovery)
    train.check_warmup(schedule.cycles()[0])
    window, most, size = (
        config.evaluate.window,
        config.evaluate.max_windows,
        config.evaluate.batch_size,
    )
    held_out = split_batches(loaded.held_out, tokenizer, window, most, starts, size, vocab_size)
    digests = loaded.samples.digest(), loaded.held_out_digest(), source_digest(pretrained.folder)
    return Prepared(
        config=config,
        pretrained=pretrained,
        samples=loaded.samples,
        order=order,
        held_out=held_out,
        schedule=schedule,
        engines=find_engines(config.deepspeed is not None),
        ds_config=ds_config,
        data=RunData(schedule.steps, *digests, commits),
    )


def _check_model(config: RunConfig, pretrained: PretrainedModel) -> None:
    """Checks that the model can be built here and is large enough for the settings."""
    shape, positions = pretrained.shape, pretrained.config.get("max_position_embeddings")
    build_for_losses(pretrained, config.model.attn_implementation)  # as the engine will build it
    hidden = shape.hidden_size
    require(
        config.lora.r <= hidden, f"lora.r {config.lora.r} is above the model's hidden_size {hidden}"
    )
    for key, window in (
        ("data.window", config.data.window),
        ("evaluate.window", config.evaluate.window),
    ):
        fits = positions is None or window <= positions
        require(fits, f"{key} {window} is longer than the model's {positions} positions")


def describe_run(prepared: Prepared, world_size: int) -> Iterator[str]:
    """Yields lines about the model, the ranks and the cuts of a run, and what a user may not expect."""
    config, dense, schedule = prepared.config, prepared.pretrained.shape, prepared.schedule
    where = (
        "in one process"
        if config.deepspeed is None
        else f"on {world_size} rank{'s' * (world_size > 1)}"
    )
    count, dtype = format_count(dense.total_numel()), describe_dtype(config.model)
    yield f"{model_name(config.model)}: {count} parameters, {dtype}, {where} ({device_name()})"
    steps = (
        f"{schedule.steps} steps of {config.train.global_batch_size} x {config.data.window} tokens"
    )
    ratio = format_percent(schedule.ratio)
    yield f"{steps}, {len(schedule.cut_steps)} cuts to {ratio} of the decoder layers' linear parameters"
    yield config.recipe
    if ends := schedule.ends():
        sizes = ", ".join(f"{size} at step {step}" for step, size in ends.items())
        yield f"keeps a checkpoint of each size, and exports all at the end: {sizes}"
    yield from _describe_model(config.model.attn_implementation, prepared.pretrained)
    if dense.mixture and config.prune.compensate != "none":
        yield f"prune.compensate: {config.prune.compensate} refits o_proj. Removed experts cannot be compensated"
    if config.train.distill_weight and config.model.adapter:
        yield "the teacher is model.path without model.adapter; merge the adapter first to keep it"
    if left_out := prepared.samples.left_out:
        such = f"such as {prepared.samples.first_left_out}"
        yield f"{left_out:,} rows have no answer in data.window {config.data.window}, {such}; they are left out"
    if world_size == 1 and config.deepspeed is not None:
        yield "world size 1: nothing is sharded (on CPU: deepspeed --num_accelerators 2 launch/run.py ...)"


def _describe_model(attn_implementation: str, pretrained: PretrainedModel) -> Iterator[str]:
    family = pretrained.shape.family
    if attention := describe_attention(attn_implementation, family):
        yield attention
    if QUERY_HEADS in pretrained.shape.kinds:
        yield "the one or two key-value heads of a layer stay, and an equal number of query heads leaves each"
    for name, value in family.changed_in_memory(config_object(pretrained.config)).items():
        yield f"config.json's {name} {value} is {family.in_memory[name]} here"
    if pretrained.tower:
        yield "only the text part is tuned and cut. The vision tower is copied, so layers must stay of one size"
    if pretrained.config.get(NEXT_TOKENS):
        gone = f"the result has no layers that predict further tokens ({MTP}*), and {NEXT_TOKENS} 0"
        yield f"{gone}. launch/export.py --mtp keeps them, cut to fit"
