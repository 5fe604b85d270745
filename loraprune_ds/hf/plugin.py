"""What plugins of other tools share: a block in their config, a table before the first step, a base for what follows.

A plugin names the keys of its tool (`Tool`), and calls these where the tool lets it:

shorten_errors    at once (errors.py)
check_settings    before a model is loaded
PluginCallback    for the trainer, and `drive` with the trainer
find_base         in the tool's next command
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
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
# torch's, by transformers' names. None: the tool's default
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", None)
PLAIN = (False, None)  # no DoRA
FROM_CHECKPOINT = "pruned"  # folder in a checkpoint: its base, for a next command


class Tool(NamedTuple):
    """Names keys of a tool's config. Those of transformers' TrainingArguments are the same in all."""

    model: str
    targets: str
    values: Mapping[str, tuple[Any, ...]]  # of other keys, those that allow cuts
    resume: tuple[str, ...] = ("resume_from_checkpoint",)


def check_settings(tool: Tool, settings: Mapping[str, Any]) -> tuple[PruneConfig, list[str]]:
    """Checks a tool's config before a model is loaded.

    Returns the settings of pruning, and all linears that need LoRA.

    Raises:
        UserError: what it asks for cannot be pruned. The line names the key.
    """
    config = read_block(settings.get(BLOCK))
    for key, values in tool.values.items():
        value = settings.get(key)
        require(
            getattr(value, "value", value) in values,
            f"{key}: {value} cannot be pruned; write {key}: {values[0]}",
        )
    check_arguments(SimpleNamespace(**settings), None)
    shape = shape_of_files(settings[tool.model])
    needed = targets_of(shape)
    named = settings.get(tool.targets)
    missing = set(needed).difference(named if isinstance(named, list) else needed)
    require(
        not missing,
        f"{tool.targets} lacks {', '.join(sorted(missing))}: each linear needs LoRA for its score; "
        "add them, or leave the key out",
    )
    plan = resolve(config, shape)
    steps = settings.get("max_steps") or 0
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
    found = [*folder.glob(BASE_FOLDER), *folder.glob(f"checkpoint-*/{PRUNING_FOLDER}")]
    require(
        not found,
        f"output_dir has another pruning: {found[:1]}; go on from it by {resume}, or take a new folder",
    )


class PluginCallback(LoraPruneCallback):
    """Says before the first step what will leave in which steps, and what will be written."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        if state.is_world_process_zero:
            item = DTYPES[self.pruning.dtype].itemsize
            tqdm.write("\n".join(describe(self.pruning.schedule, item, str(args.output_dir))))


def describe(schedule: Schedule, bytes_per_weight: int, out: str) -> list[str]:
    """Lays out what will leave, and what will be written into `out`."""
    dense = schedule.limits.dense
    before = dense.total_numel()
    after = round(before - schedule.limits.leaving(schedule.ratio))
    rows = [
        ("", "dense", "pruned"),
        ("parameters", format_count(before), format_count(after)),
        (
            "weights",
            format_bytes(before * bytes_per_weight),
            format_bytes(after * bytes_per_weight),
        ),
    ]
    note = (
        "layers will differ, so stock tools need trust_remote_code for the result; "
        "with ranking: uniform they do not"
    )
    pruned = final_shape(schedule.limits, [section.size for section in schedule.sections])
    if pruned is not None:
        note = "layers stay equal, so stock tools load the result"
        for kind in dense.kinds:
            sizes = (str(max(layer[kind] for layer in x.counts)) for x in (dense, pruned))
            rows.append((kind, *sizes))
    steps = ", ".join(map(str, schedule.cut_steps))
    return [
        f"{BLOCK}: {format_percent(schedule.ratio)} of the layers' linears leave, "
        f"by cuts after steps {steps} of {schedule.steps}",
        *aligned(rows, "<>>"),
        f"written into {out}: {PRUNING_FOLDER}/ in each checkpoint; at the end a report and {BASE_FOLDER}/",
        note,
    ]


def drive(trainer: Any, callback: LoraPruneCallback) -> None:
    """Makes `trainer.train` resume pruning by the tool's own setting, and write the base at its end."""
    train = trainer.train

    def resume_and_train(resume_from_checkpoint: Any = None, **more: Any) -> Any:
        asked = resume_from_checkpoint or trainer.args.resume_from_checkpoint
        if asked:
            folder = None if str(asked).lower() == "true" else asked
            resume_from_checkpoint = callback.resume(trainer.model, folder)
        result = train(resume_from_checkpoint=resume_from_checkpoint, **more)
        if trainer.is_fsdp_enabled:  # of a SHARDED_STATE_DICT the Trainer would save no adapter
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        base = Path(trainer.args.output_dir, BASE_FOLDER).absolute()
        pruning = callback.pruning
        # that of a training that went on here
        pruning.model.comm.write_on_rank_0(base, lambda: remove_folder(base))
        callback.save_base(base)
        _name_base(pruning.peft_model, base)
        return result

    trainer.train = resume_and_train


def _name_base(model: Any, base: Path) -> None:
    """Makes each adapter that `model` saves from now on name its pruned base.

    PEFT itself would read that config with the class of the dense model.
    """
    save = model.save_pretrained

    def save_named(folder: str, *args: Any, **more: Any) -> None:
        save(folder, *args, **more)
        path = Path(folder, ADAPTER_FILE)
        write_json(path, read_json(path) | {"base_model_name_or_path": str(base)})

    model.save_pretrained = save_named


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
    require(
        base.is_dir(),
        f"{adapter} has no {BASE_FOLDER}/: its training was stopped; take its newest checkpoint-N",
    )
    header = read_header(adapter / ADAPTER_WEIGHTS)
    shape = open_pretrained(base).shape
    for i, linear in shape.linears():
        name = name_in_file(shape, i, f"{linear.linear}.lora_B")
        sizes, _ = header.get(name, ((0,), ""))
        require(
            sizes[0] == linear.matrix[0],
            f"the adapter in {adapter} does not fit {base}, so they are of different trainings: "
            f"{name} has sizes {[*sizes]}",
        )
    return base
