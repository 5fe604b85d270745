"""Writes a step: the LoRA state from all ranks and the refitted linears, layer by layer."""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from loraprune_ds import files
from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import RESUME_FOLDER
from loraprune_ds.checkpoint.state import ResumeState, State
from loraprune_ds.errors import fail_point
from loraprune_ds.files import STATE_FILE, JsonObject
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.weight_files import write_weight_file
from loraprune_ds.pruning.compensate import refitted_linears
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator, LocalWrites
from loraprune_ds.ranks.device import empty_cache
from loraprune_ds.ranks.flat import owner_rounds


class Staging(AbstractContextManager["Staging"]):
    """Builds one folder that all ranks fill in parallel. Construction and `publish` are collective.

    Its files are removed if a `with` block fails.
    """

    def __init__(self, comm: Communicator, target: Path, kind: str) -> None:
        self._mark = comm.draw_mark()
        self.target = target
        self.folder = files.staging_of(target, self._mark)
        self._comm = comm
        self._kind = kind
        self._writes = LocalWrites(comm, self.folder)
        self._sealed: dict[str, JsonObject] = {}
        empty_cache()  # torch may hold memory that NCCL needs for the gathers
        self._writes.do_on_rank_0(lambda: files.begin_folder(target, self._mark))

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._comm.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes and seals one file on this rank, because only the writer's fsync surely flushes its cache.

        The name may begin with a subfolder, which then gets a separate manifest.
        """
        path = self.folder / name

        def write_and_seal() -> None:
            path.parent.mkdir(exist_ok=True)
            write(path)
            self._sealed[name] = layout.seal(path)

        self._writes.do(write_and_seal)

    def publish(self) -> None:
        """Writes the manifest and renames the folder. If a write failed on some rank, all ranks raise RunError."""
        self._writes.agree()
        manifests: dict[str, JsonObject] = {}  # folder -> file -> entry
        for sealed in self._comm.gather_objects(self._sealed):
            for path, entry in sealed.items():
                folder, name = os.path.split(path)
                manifests.setdefault(folder, {})[name] = entry
        self._writes.do_on_rank_0(lambda: self._rename(manifests))

    def _rename(self, manifests: dict[str, JsonObject]) -> None:
        for folder, entries in manifests.items():
            layout.write_manifest(self.folder / folder, entries)
            files.flush(self.folder / folder)
        if self.target.exists():
            files.remove_folder(self.target)
        fail_point(f"save.{self._kind}_before_rename")
        files.publish_folder(self.target, self._mark)
        fail_point(f"save.{self._kind}_after_rename")


def write_step(staging: Staging, pruner: Pruner, state: State, resume: ResumeState) -> None:
    """Writes the files of a step. Each layer is written by its owner. Collective."""
    model = pruner.model
    if model.rank == 0:
        staging.write(STATE_FILE, lambda path: path.write_text(files.json_text(state)))
        staging.write(
            f"{RESUME_FOLDER}/{STATE_FILE}", lambda path: path.write_text(files.json_text(resume))
        )
    lora = model.lora_parameters()
    others = model.trained_parameters()
    for layers in owner_rounds(len(lora), model.world_size):
        _write_trained(staging, model, "lora", {i: lora[i] for i in layers})
        _write_refits(staging, pruner, layers)
        fail_point("save.layer")
    for layer, named in enumerate(others):
        _write_trained(staging, model, "trained", {layer: named})
    _write_pruner(staging, pruner)


def _write_trained(
    staging: Staging, model: PrunableModel, part: str, layers: dict[int, dict[str, nn.Parameter]]
) -> None:
    """Writes the fp32 masters and the optimizer's states of layers, each on its owner. Collective."""
    collected = list[tuple[str, int, dict[str, Tensor]]]()
    for layer, named in layers.items():
        owner = model.owner(layer)
        masters = model.collect_named(named, owner, master=True)
        states = model.optimizer_state.collect(named, owner)
        collected += [(part, layer, masters), (f"{RESUME_FOLDER}/{part}", layer, states)]
    for written in collected:  # all owners write in parallel
        _write_layer(staging, *written)


def _write_refits(staging: Staging, pruner: Pruner, layers: Iterable[int]) -> None:
    """Writes the refitted linears of a round of layers, each on its owner, in their storage format. Collective."""
    if pruner.passes is None:
        return
    model = pruner.model
    collected: dict[int, dict[str, Tensor]] = {}
    for layer in layers:
        prefix = model.shape.prefix(layer)
        collected[layer] = {}
        for name in refitted_linears(pruner.limits.dense, model.shape, layer):
            stored = model.collect_stored(LinearId(layer, name))
            for part, tensor in stored.items():
                collected[layer][f"{prefix}{name}.{part}"] = tensor
    for layer, tensors in collected.items():  # all owners write in parallel
        _write_layer(staging, "refit", layer, tensors)


def _write_pruner(staging: Staging, pruner: Pruner) -> None:
    """Writes the moving averages in float64, on rank 0, and the inputs of the passes that each rank keeps."""
    scores = pruner.average.on_host() if pruner.model.rank == 0 else None
    if scores:
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(scores):
            for kind, groups in layer.items():
                tensors[f"{i}.{kind}"] = groups
        staging.write(
            f"{RESUME_FOLDER}/{layout.SCORES_FILE}", lambda path: write_weight_file(path, tensors)
        )
    if pruner.passes is not None and pruner.passes.steps:
        name = f"{RESUME_FOLDER}/{layout.PASSES.format(pruner.model.rank)}"
        staging.write(name, partial(_write_passes, pruner.passes.to_plain()))


def _write_passes(passes: JsonObject, path: Path) -> None:
    with path.open("wb") as file:  # whose errors are OSErrors, unlike those of torch's own writer
        torch.save(passes, file)


def _write_layer(staging: Staging, part: str, layer: int, tensors: dict[str, Tensor]) -> None:
    """Writes a part of a layer, if this rank has it."""
    if tensors:
        staging.write(layout.layer_file(part, layer), lambda path: write_weight_file(path, tensors))


def drop_old(root: Path, step: int, keep_last: int) -> None:
    """Removes old steps once `step-{step}` is published. On rank 0 only.

    Also removes steps above `step`, which a start from an older checkpoint leaves, and the remains of killed saves.
    """
    files.remove_leftovers(root)
    numbers = layout.numbered(root, "step")
    kept = [number for number in numbers if number <= step][-keep_last:]
    for number in numbers:
        folder = layout.step_folder(root, number)
        if number not in kept and files.is_ours(folder):
            files.remove_folder(folder)
            fail_point("save.dropped")
