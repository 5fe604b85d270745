"""What plugins of other tools share: a block in their config, a table before the first step, a base for what follows.

A plugin names the keys of its tool (`Tool`), and calls these where the tool lets it:

shorten_errors    at once (errors.py)
check_settings    before a model is loaded
before_lora       on the model, before it gets LoRA
PluginCallback    for the trainer, and `drive` with the trainer
find_base         in the tool's next command
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft import PeftModel
from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER, numbered
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import require
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json, remove_folder, write_json
from loraprune_ds.hf.arguments import check_arguments
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.pretrained.adapters import ADAPTER_FILE, BASE_FOLDER, name_in_file
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_header
from loraprune_ds.pruning.schedule import Schedule, plan_pruning
from loraprune_ds.pruning.target import final_shape, resolve
from loraprune_ds.session.preparing import shape_of_files, targets_of
from loraprune_ds.units import aligned, format_bytes, format_count, format_percent

BLOCK = "loraprune"
# torch's, by transformers' names
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
FROM_CHECKPOINT = "pruned"  # folder in a checkpoint: its base, for a next command


class Tool(NamedTuple):
    """Names keys of a tool's config. Those of transformers' TrainingArguments are the same in all."""

    model: str
    lora: str  # switches LoRA on
    with_lora: tuple[Any, ...]  # its values that do
    targets: str
    dora: str
    optimizer: str
    resume: tuple[str, ...] = ("resume_from_checkpoint",)


def check_settings(tool: Tool, settings: Mapping[str, Any]) -> tuple[PruneConfig, list[str]]:
    """Checks a tool's config before a model is loaded.

    Returns the settings of pruning, and all linears that need LoRA.

    Raises:
        UserError: what it asks for cannot be pruned. The line names the key.
    """
    config = read_block(settings.get(BLOCK))
    adapter = settings.get(tool.lora)
    require(
        adapter in tool.with_lora,
        f"{tool.lora}: {adapter}: pruning needs LoRA; write {tool.lora}: {tool.with_lora[0]}",
    )
    require(
        not settings.get(tool.dora), f"{tool.dora}: DoRA cannot be cut; leave it out for plain LoRA"
    )
    optimizer = settings.get(tool.optimizer)
    optimizer = getattr(optimizer, "value", optimizer)
    require(
        optimizer in (None, *OPTIMIZERS),
        f"{tool.optimizer}: {optimizer} is not torch's, and its state cannot be cut; "
        f"write {tool.optimizer}: {OPTIMIZERS[0]}",
    )
    check_arguments(SimpleNamespace(**settings), None)
    shape = shape_of_files(settings[tool.model])
    needed = targets_of(shape)
    named = settings.get(tool.targets)
    missing = set(needed) - set(named) if isinstance(named, list) else ()
    require(
        not missing,
        f"{tool.targets} lacks {', '.join(sorted(missing))}: each linear needs LoRA for its score; "
        "add them, or leave the key out",
    )
    steps = settings.get("max_steps") or 0
    plan = resolve(config, shape)
    if steps > 0:
        plan_pruning(*plan, steps)
    if not any(map(settings.get, tool.resume)):
        _check_new(Path(settings["output_dir"]), " or ".join(tool.resume))
    return config, needed


def read_block(block: Any) -> PruneConfig:
    """Checks a tool's block like section `prune` of a run. Raises UserError, which names the key."""
    require(
        isinstance(block, Mapping), f"{BLOCK} must be a section of keys, such as {{ratio: 0.3}}"
    )
    return config_from_dict({"output_dir": "", "prune": dict(block)}).prune


def _check_new(folder: Path, resume: str) -> None:
    for found in (folder / BASE_FOLDER, *folder.glob(f"checkpoint-*/{PRUNING_FOLDER}")):
        require(
            not found.exists(),
            f"output_dir {folder} has another pruning: {found.relative_to(folder)}; "
            f"go on from it by {resume}, or take a new folder",
        )


class PluginCallback(LoraPruneCallback):
    """Shows what will happen before the first step. At the end it writes the base that the adapter names."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        base = self._base(args)
        # of the training that goes on here
        self.pruning.model.comm.write_on_rank_0(
            base, lambda: remove_folder(base) if base.exists() else None
        )
        if state.is_world_process_zero:
            lines = describe(self.pruning.schedule, DTYPES[self.pruning.dtype].itemsize, base)
            tqdm.write("\n".join(lines))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_end(args, state, control, **more)
        base = self._base(args)
        self.save_base(base)
        _name_base(self.pruning.peft_model, base)
        if state.is_world_process_zero:
            tqdm.write(f"{BLOCK}: the pruned base is {base}; the adapter names it")

    def _base(self, args: TrainingArguments) -> Path:
        return Path(str(args.output_dir), BASE_FOLDER).absolute()


def describe(schedule: Schedule, bytes_per_weight: int, base: Path) -> list[str]:
    """Says what will leave in which steps, and what will be written."""
    dense = schedule.limits.dense
    pruned = final_shape(schedule.limits, [section.size for section in schedule.sections])
    before = dense.total_numel()
    after = before - schedule.limits.leaving(schedule.ratio)
    rows = [["", "dense", "pruned"]]
    if pruned is not None:
        after = pruned.total_numel()
        for kind in dense.kinds:
            counts = (max(layer[kind] for layer in x.counts) for x in (dense, pruned))
            rows.append([kind, *map(str, counts)])
    rows.append(["parameters", format_count(before), format_count(after)])
    sizes = before * bytes_per_weight, after * bytes_per_weight
    rows.append(["weights", *map(format_bytes, sizes)])
    steps = ", ".join(map(str, schedule.cut_steps))
    lines = [
        f"{BLOCK}: {format_percent(schedule.ratio)} of the layers' linears leave, "
        f"by cuts after steps {steps} of {schedule.steps}",
        *aligned(rows, "<>>"),
        f"written: {PRUNING_FOLDER}/ in each checkpoint; at the end a report in {base.parent}, "
        f"and the pruned base in {base.name}/",
    ]
    if pruned is None:
        lines.append(
            "layers will differ, so stock tools need trust_remote_code for the result; "
            "with ranking: uniform they do not"
        )
    return lines


def _name_base(model: PeftModel, base: Path) -> None:
    """Makes each adapter that `model` saves from now on name its pruned base.

    PEFT itself would read that config with the class of the dense model.
    """
    live: Any = model
    save = live.save_pretrained

    def save_named(folder: str, *args: Any, **more: Any) -> None:
        save(folder, *args, **more)
        path = Path(folder, ADAPTER_FILE)
        if path.is_file():
            write_json(path, read_json(path) | {"base_model_name_or_path": str(base)})

    live.save_pretrained = save_named


def drive(trainer: Any, callback: LoraPruneCallback) -> None:
    """Makes `trainer.train` resume pruning, too, by the tool's own setting."""
    train = trainer.train

    def resume_and_train(resume_from_checkpoint: Any = None, **more: Any) -> Any:
        asked = resume_from_checkpoint or trainer.args.resume_from_checkpoint
        if asked:
            folder = None if str(asked).lower() == "true" else asked
            resume_from_checkpoint = callback.resume(trainer.model, folder)
        result = train(resume_from_checkpoint=resume_from_checkpoint, **more)
        if trainer.is_fsdp_enabled:  # of a SHARDED_STATE_DICT the Trainer would save no adapter
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        return result

    trainer.train = resume_and_train


def find_base(adapter: Path) -> Path:
    """Finds the pruned base of an adapter, for a tool's next command. A checkpoint's is written first.

    Raises:
        UserError: the folder is gone, its training has not ended, or the base is of another one.
    """
    require((adapter / ADAPTER_FILE).is_file(), f"{adapter} has no adapter; train first")
    base = adapter / BASE_FOLDER
    if (adapter / PRUNING_FOLDER).is_dir():
        base = adapter / FROM_CHECKPOINT / BASE_FOLDER
        if not base.exists():
            export(find_contents(adapter), "adapter", base.parent)
    checkpoints = [f"checkpoint-{step}" for step in numbered(adapter, "checkpoint")]
    newest = f"take {adapter / checkpoints[-1]}" if checkpoints else "train again"
    require(
        base.is_dir(),
        f"{adapter} has no {BASE_FOLDER}/, the pruned base: its training was stopped; {newest}",
    )
    shape = open_pretrained(base).shape
    header = read_header(adapter / ADAPTER_WEIGHTS)
    for i, linear in shape.linears():
        for factor, axis, size in zip("AB", (1, 0), reversed(linear.matrix), strict=True):
            name = name_in_file(shape, i, f"{linear.linear}.lora_{factor}")
            sizes, _ = header.get(name, ((), ""))
            require(
                len(sizes) == 2 and sizes[axis] == size,
                f"the adapter in {adapter} does not fit {base}, so they are of different trainings: "
                f"{name} has sizes {[*sizes]}",
            )
    return base
