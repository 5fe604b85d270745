"""Prepares a run, and finds every error in its input before any long work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraprune_ds.checkpoint.load import counts_to_lists, source_digest
from loraprune_ds.checkpoint.state import Origin, RunData, State
from loraprune_ds.config import RunConfig
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.engine.training import Engine
from loraprune_ds.engines import deepspeed_sections, run_engine
from loraprune_ds.errors import require
from loraprune_ds.export.model_card import model_name
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import check_flash_attention, config_object, describe_attention
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.perplexity import Labelled
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import check_adapter
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.pretrained.exported_config import NEXT_TOKENS
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import MTP, check_processor, check_tower
from loraprune_ds.pretrained.tokenizer import load_tokenizer, text_starts
from loraprune_ds.pretrained.windows import split_batches
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import Schedule, make_schedule, steps_for_epochs
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import device_name
from loraprune_ds.report.reporters import SERVICES
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import LoadedData, SampleOrder, Samples
from loraprune_ds.train.data.sources import at_commits, resolve_commits
from loraprune_ds.units import format_count, format_percent
from loraprune_ds.versions import check_installed

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
    engine: Engine
    ds_config: JsonObject  # with every "auto" replaced. Empty without DeepSpeed
    origin: Origin


def prepare(
    config: RunConfig,
    comm: Communicator,
    earlier: State | None = None,
    check_tokenizer: CheckTokenizer = None,
) -> Prepared:
    """Checks the whole input on every rank. All ranks raise the same UserError. Collective.

    Args:
        earlier: the newest state of the run that goes on.
        check_tokenizer: a further check, before the data is read.
    """
    comm.all_or_raise(lambda: _check_before_download(config, comm.world_size))
    recorded = earlier.origin.data.commits if earlier and earlier.origin.data else None
    query_heads = earlier is None or earlier.origin.query_heads
    # From rank 0, since the hub may change from rank to rank.
    resolved = comm.on_rank_0(lambda: recorded or resolve_commits(config.data))
    commits = comm.from_rank_0(resolved) or {}
    ranks_per_node = comm.ranks_per_node()

    def prepare_here() -> Prepared:
        pretrained = _open_model(config, query_heads)
        ds_config = resolve_ds_config(
            config, pretrained.shape, deepspeed_sections(), comm.world_size, ranks_per_node
        )
        return _prepare(config, pretrained, ds_config, commits, check_tokenizer)

    # downloads, converts and tokenises. The other ranks find the results in the node's caches
    prepared = comm.first_per_node(prepare_here)
    rank = comm.differing_rank((prepared.origin.digest, prepared.origin.data))
    require(
        rank is None,
        f"rank {rank} reads another model or other training data than rank 0; "
        "model.path and data.path must be the same everywhere",
    )
    return prepared


def _check_before_download(config: RunConfig, world_size: int) -> None:
    """Makes the checks that need no model, because its download may take an hour."""
    run_engine(sharded=config.deepspeed is not None).check_device(config.model.dtype)
    check_flash_attention(config.model)
    config.train.gradient_accumulation_steps(world_size)
    for name in config.logging.reporters:
        if name in SERVICES:
            check_installed(name, f"logging.report_to {name}")


def _open_model(config: RunConfig, query_heads: bool) -> PretrainedModel:
    model = config.model
    pretrained = open_for_pruning(
        locate_model(model), model, packing=config.data.packs_rows, query_heads=query_heads
    )
    if model.adapter:
        check_adapter(Path(model.adapter).expanduser(), config.lora, pretrained.shape)
    return pretrained


def _prepare(
    config: RunConfig,
    pretrained: PretrainedModel,
    ds_config: JsonObject,
    commits: dict[str, str],
    check_tokenizer: CheckTokenizer,
) -> Prepared:
    """Checks the model first, because the data may take long to read."""
    shape = pretrained.shape
    has_tower = pretrained.tower is not None
    goal = make_goal(config.prune, shape, tower=has_tower)
    config = replace(config, prune=goal.config)
    pretrained = pretrained.with_refits(goal.config.compensate)
    _check_tower(pretrained, goal.final_shape)
    _check_model(config, pretrained)
    tokenizer = load_tokenizer(pretrained.folder)
    if check_tokenizer:
        check_tokenizer(config, tokenizer, _positions(pretrained), shape.vocab_size)
    starts = text_starts(tokenizer, shape.family, pretrained.config)
    loaded = load_samples(
        at_commits(config.data, commits),
        tokenizer,
        minimum=config.train.global_batch_size,
        vocab_size=shape.vocab_size,
        starts=starts,
    )
    order = _order_samples(config, loaded)
    steps = _pruning_steps(config, loaded)
    schedule = make_schedule(goal, steps, config.train.recovery_steps)
    config.train.check_warmup(steps)
    held_out = split_batches(
        loaded.held_out,
        tokenizer,
        config.evaluate.window,
        config.evaluate.max_windows,
        starts,
        config.evaluate.batch_size,
        shape.vocab_size,
    )
    data = RunData(
        samples=loaded.samples.digest(), held_out=loaded.held_out_digest(), commits=commits
    )
    origin = Origin(
        config=config.to_dict(),
        steps=schedule.steps,
        seed=config.seed,
        query_heads=QUERY_HEADS in shape.kinds,
        folder=str(pretrained.folder.resolve()),
        digest=source_digest(pretrained.folder),
        groups=counts_to_lists(shape),
        data=data,
    )
    return Prepared(
        config=config,
        pretrained=pretrained,
        samples=loaded.samples,
        order=order,
        held_out=held_out,
        schedule=schedule,
        engine=run_engine(sharded=config.deepspeed is not None),
        ds_config=ds_config,
        origin=origin,
    )


def _check_tower(pretrained: PretrainedModel, final: ModelShape | None) -> None:
    """Checks that the vision tower fits the final model, or that the model can be built without one."""
    folder = pretrained.folder
    if pretrained.tower:
        check_tower(pretrained.tower.config, final, str(folder))
        check_processor(folder)
        return
    shape = pretrained.shape
    require(
        not shape.family.lm_class(),
        f"{folder}: AutoModelForCausalLM lacks the class of a {shape.model_type}; keep its tower",
    )


def _check_model(config: RunConfig, pretrained: PretrainedModel) -> None:
    """Checks that the model can be built here and is large enough for the settings."""
    build_for_losses(pretrained, config.model.attn_implementation)  # as the engine will build it
    hidden = pretrained.shape.hidden_size
    require(
        config.lora.r <= hidden, f"lora.r {config.lora.r} is above the model's hidden_size {hidden}"
    )
    positions = _positions(pretrained)
    windows = {"data.window": config.data.window, "evaluate.window": config.evaluate.window}
    for key, window in windows.items():
        require(
            positions is None or window <= positions,
            f"{key} {window} is longer than the model's {positions} positions",
        )


def _positions(pretrained: PretrainedModel) -> int | None:
    return pretrained.config.get("max_position_embeddings")


def _order_samples(config: RunConfig, loaded: LoadedData) -> SampleOrder:
    train = config.train
    lengths = loaded.samples.lengths() if train.group_by_length else None
    return SampleOrder(
        loaded.epoch_length, train.global_batch_size, config.seed, loaded.epoch, lengths
    )


def _pruning_steps(config: RunConfig, loaded: LoadedData) -> int:
    train = config.train
    return train.steps or steps_for_epochs(
        train.epochs or 1, loaded.epoch_length, train.global_batch_size
    )


def describe_run(prepared: Prepared, world_size: int) -> Iterator[str]:
    """Yields lines about the model, the ranks and the cuts of a run, and what a user may not expect."""
    config = prepared.config
    dense = prepared.pretrained.shape
    schedule = prepared.schedule
    where = f"on {world_size} rank{'s' * (world_size > 1)}"
    if config.deepspeed is None:
        where = "in one process"
    count = format_count(dense.total_numel())
    storage = prepared.pretrained.storage.describe(dense, taught=config.train.distill_weight > 0)
    yield (
        f"{model_name(config.model.path)}: {count} parameters, {config.model.dtype}, {storage}, "
        f"{where} ({device_name()})"
    )
    steps = (
        f"{schedule.steps} steps of {config.train.global_batch_size} x {config.data.window} tokens"
    )
    ratio = format_percent(schedule.goal.ratio)
    yield f"{steps}, {len(schedule.cut_steps)} cuts to {ratio} of the decoder layers' linear parameters"
    yield config.recipe
    yield from _describe_model(config.model.attn_implementation, prepared.pretrained)
    if dense.mixture and config.prune.compensate != "none":
        yield f"prune.compensate: {config.prune.compensate} refits o_proj. Removed experts cannot be compensated"
    if config.train.distill_weight and config.model.adapter:
        yield "the teacher is model.path without model.adapter; merge the adapter first to keep it"
    samples = prepared.samples
    if samples.left_out:
        yield (
            f"{samples.left_out:,} rows have no answer in data.window {config.data.window}, "
            f"such as {samples.first_left_out}; they are left out"
        )
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
        yield (
            f"the result has no layers that predict further tokens ({MTP}*), and {NEXT_TOKENS} 0"
        )
