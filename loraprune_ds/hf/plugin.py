"""What plugins of other tools share: a block in their config, and a base for what follows.

A plugin calls these where its tool lets it:

shorten_errors    at once (errors.py)
check_settings    before a model is loaded
drive             on the trainer, which has a callback with these settings
drive_next        before a trainer that the tool lets nobody see
find_base         in the tool's next command
write_next        for a next command of a tool without plugins
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from transformers import Trainer

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import require
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import JsonObject, remove_folder, write_text
from loraprune_ds.hf.arguments import check_arguments
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.model.adapters import ADAPTER, target_modules
from loraprune_ds.pretrained.adapters import BASE_FOLDER, name_in_file
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_header
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import make_schedule
from loraprune_ds.report.records import MODEL_FOLDER
from loraprune_ds.session.preparing import prunable_shape

BLOCK = "loraprune"
TARGETS = "lora_target_modules"
# torch's, by transformers' names. None: the tool's default
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", None)
RESUME = ("resume_from_checkpoint", "auto_resume_from_checkpoints")
PLAIN = (False, None)  # no DoRA
FROM_CHECKPOINT = "pruned"  # folder in a checkpoint: its base, for a next command


def check_settings(
    settings: Mapping[str, Any],
    model: str,
    allowed: Mapping[str, tuple[Any, ...]],
    key_of_targets: str = TARGETS,
) -> tuple[PruneConfig, Any]:
    """Checks a tool's config before a model is loaded.

    Args:
        allowed: the values of keys of this tool that allow cuts.

    Returns:
        The settings of pruning, and the user's target modules, or all linears.

    Raises:
        UserError: what it asks for cannot be pruned. The line names the key.
    """
    config = read_block(settings)
    for key, values in allowed.items():
        value = settings.get(key)
        value = getattr(value, "value", value)
        require(value in values, f"{key}: {value} cannot be pruned; write {key}: {values[0]}")
    check_arguments(SimpleNamespace(**settings), None)
    shape = prunable_shape(model)
    require(
        not shape.family.has_encoder,
        f"{model}: a {shape.model_type} trains in Seq2SeqTrainer; give that the callback",
    )
    require(
        not shape.family.has_experts,
        f"{model}: plugins do not prune families with experts; use prepare_model and the callback, or launch/run.py",
    )
    linears = target_modules(shape)
    targets = settings.get(key_of_targets) or linears
    missing = set(linears).difference(targets)
    require(
        isinstance(targets, str) or not missing,
        f"{key_of_targets} lacks {', '.join(sorted(missing))}: each linear needs LoRA for its score; "
        "add them, or leave the key out",
    )
    goal = make_goal(config, shape)
    steps = settings.get("max_steps") or 0
    if steps > 0:
        make_schedule(goal, steps)
    folder = Path(settings["output_dir"])
    found = [*folder.glob(BASE_FOLDER), *folder.glob(f"checkpoint-*/{PRUNING_FOLDER}")]
    require(
        not found or any(map(settings.get, RESUME)),
        f"output_dir has another pruning: {found[:1]}; go on by {RESUME[0]}, or take a new folder",
    )
    return config, targets


def read_block(settings: Mapping[str, Any]) -> PruneConfig:
    """Checks a tool's block like section `prune` of a run. Raises UserError, which names the key."""
    block = settings.get(BLOCK)
    require(block, f"{BLOCK} must be a section of keys, such as {{ratio: 0.3}}")
    return config_from_dict({"output_dir": "", "prune": block}).prune


def drive(trainer: Any, callback: LoraPruneCallback, *, merged: bool = False) -> None:
    """Makes `trainer.train` resume pruning by the tool's own setting, and write the base at its end.

    Each adapter that is saved from then on names the base.

    Args:
        merged: the model with LoRA merged is written, too.
    """
    train = trainer.train

    def resume_and_train(resume_from_checkpoint: Any = None, **more: Any) -> Any:
        asked = resume_from_checkpoint or trainer.args.resume_from_checkpoint
        if asked:
            folder = None if str(asked).lower() == "true" else asked
            resume_from_checkpoint = callback.resume(trainer.model, folder)
        out = Path(trainer.args.output_dir).absolute()
        results: dict[str, Callable[[Path], None]] = {BASE_FOLDER: callback.save_base}
        if merged:
            results[MODEL_FOLDER] = callback.save_model
        trainer.accelerator.print(f"{BLOCK}: at the end {out} gets {', '.join(results)}")
        result = train(resume_from_checkpoint=resume_from_checkpoint, **more)
        if trainer.is_fsdp_enabled:  # of a SHARDED_STATE_DICT the Trainer would save no adapter
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        pruning = callback.pruning
        for name, save in results.items():
            old = out / name  # that of a training that went on here
            pruning.model.comm.write_on_rank_0(old, partial(remove_folder, old))
            save(old)
        lora: Any = pruning.peft_model.peft_config[ADAPTER]
        settings = lora.to_dict
        # PEFT would read a base that the live setting names, with the class of the dense model
        lora.to_dict = lambda: settings() | {"base_model_name_or_path": str(out / BASE_FOLDER)}
        return result

    trainer.train = resume_and_train


def drive_next(config: PruneConfig, *, merged: bool = False) -> None:
    """Gives the next Trainer of this process a callback with these settings, and drives it."""
    begin = Trainer.__init__

    def begin_and_drive(self: Trainer, *args: Any, callbacks: Any = None, **more: Any) -> None:
        Trainer.__init__ = begin
        callback = LoraPruneCallback(config)
        begin(self, *args, callbacks=[callback, *(callbacks or ())], **more)
        drive(self, callback, merged=merged)

    Trainer.__init__ = begin_and_drive


def write_next(given: JsonObject, out: Path, model: str, **changes: Any) -> Path:
    """Writes what the user gave, with the folder `model` of `out` in the place of the dense one."""
    changes |= {
        "model_name_or_path": str(out / model),
        "trust_remote_code": True,  # for layers that differ
    }
    kept = {key: given[key] for key in given if key not in (BLOCK, *RESUME)}
    path = out / "next.yaml"
    write_text(path, yaml.safe_dump(kept | changes))
    return path


def find_base(adapter: Path) -> Path:
    """Finds the pruned base of an adapter, for a tool's next command. A checkpoint's is written first.

    Raises:
        UserError: the folder is gone, its training has not ended, or the base is of another one.
    """
    base = adapter / BASE_FOLDER
    if (adapter / PRUNING_FOLDER).is_dir():
        base = adapter / FROM_CHECKPOINT / BASE_FOLDER
        if not base.exists():
            export(find_contents(adapter), "adapter", base.parent)
    require(base.is_dir(), f"{base} is missing: train to the end, or take the newest checkpoint-N")
    header = read_header(adapter / ADAPTER_WEIGHTS)
    shape = open_pretrained(base).shape
    for i, linear in shape.linears():
        name = name_in_file(shape, i, f"{linear.linear}.lora_B")
        fits = name in header and header[name][0][0] == linear.matrix[0]
        require(fits, f"{name} in {adapter} does not fit {base}: they are of different trainings")
    return base
